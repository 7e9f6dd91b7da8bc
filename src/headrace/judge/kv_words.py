"""What was found of KV policies, in words: tables for people. Knows plain values and nothing of how they were found."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from headrace.meter.report import format_bytes

# Wider than any table: a terminal may break lines as it likes.
WIDTH = 400


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first hold numbers."""
    table = Table(box=box.MARKDOWN)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    drawn = io.StringIO()
    Console(file=drawn, width=WIDTH, color_system=None, markup=False).print(table)
    return "\n".join(line.strip() for line in drawn.getvalue().splitlines() if line.strip())


def format_policies(values: Mapping[str, Any]) -> str:
    """The table of `headrace eval kv`."""
    columns = ["policy", "context", "bytes a token"]
    for way in ("prefix", "stream"):
        columns += [f"{way} dNLL", "KL", "top-1"]
    columns += ["attention ns a token", "batch"]
    job = any(row["tokens_per_s"] is not None for row in values["policies"])
    columns += ["tokens/s"] if job else []
    rows = []
    for row in values["policies"]:
        cells = [row["kv"], f"{row['context']:,}", f"{row['bytes_per_token']:,.0f}"]
        for way in ("prefix", "stream"):
            loss = row[way]
            cells += [f"{loss['dnll']:+.4f} ± {loss['error']:.4f}", f"{loss['kl']:.4f}", f"{loss['top1']:.1%}"]
        cells += [f"{row['attention_ns']:.1f}", f"{row['batch']:,}"]
        speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"
        rows.append(cells + ([speed] if job else []))
    return format_table(columns, rows)


def headline(values: Mapping[str, Any]) -> str:
    """One sentence: what was measured, on how much text."""
    read = ", ".join(
        f"{each['windows']} contexts of {each['context']:,} tokens (perplexity {each['perplexity']:.2f})"
        for each in values["plain"]
    )
    return (
        f"{values['model']} in {values['precision']}: {values['tail']} tokens after each of {read}; "
        f"a batch is what {format_bytes(values['kv_cache_bytes'])} holds."
    )


def format_contexts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `headrace eval contexts`."""
    columns = ["policy", "mode", "turns", "gold log-prob.", "worst turn", "agreement", "still right"]
    columns += ["first turn", "later turns"]
    cells = [
        [
            row["kv"],
            row["mode"],
            f"{row['turns']}",
            f"{row['delta']:+.4f}",
            f"{row['worst']:+.3f}",
            f"{row['agreement']:.1%}",
            "-" if row["kept_accuracy"] is None else f"{row['kept_accuracy']:.0%} of {row['full_correct']}",
            f"{-row['regret']['first']:+.4f}",
            "-" if row["regret"]["later"] is None else f"{-row['regret']['later']:+.4f}",
        ]
        for row in rows
    ]
    return format_table(columns, cells)
