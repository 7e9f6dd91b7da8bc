"""Rows and measures of the tasks beside this file. Knows nothing of models."""

from __future__ import annotations

from typing import Any


def add_wrong_solutions(rows: Any) -> Any:
    """Give each row of a data set of the harness the solution of the next one, as `wrong_solution`."""
    solutions = rows["canonical_solution"]
    return rows.add_column("wrong_solution", [*solutions[1:], solutions[0]])


def measure_solution(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """How improbable the row's solution is; the harness gives its log probability, and whether it is greedy."""
    ((log_probability, _),) = results
    return {"nats_per_character": -log_probability / len(row["canonical_solution"])}
