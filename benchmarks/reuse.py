"""How much of a pile's prompts need not be computed, by way of sharing prefixes: a Markdown table of shares saved.

    python benchmarks/reuse.py ../shared/data/mooncake_conversation.jsonl [more files]

A file has a row a line with `hash_ids`, the numbers of its blocks of tokens, as the Mooncake traces have (Apache-2.0,
kvcache-ai/Mooncake, FAST25-release/traces). Blocks are the symbols that are counted. Columns:

  optimum          every distinct prefix computed once
  root level       one group for all rows with the same first block, which share what all of them have in common
  single level     BatchLLM's groups, and how many there are
  unspliced        the same without its last rule (a node that keeps one child becomes one with it), as the reference
  LRU, arrival     rows in the file's order through a cache of so many blocks that forgets what was used longest ago
  LRU, sorted      the same with the rows in lexicographic order
  ours             the same with the rows in the order of `our_order`

Below a published trace stands what is known of it; the command fails if a share is not the same to the last digit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from single_level import Group, group_by_gain, group_by_root, share_saved

from headrace.plan.reuse import count_distinct, count_least_recently_used
from headrace.schedule.prefixes import grow_tree, order_rows, pack

Rows = list[list[int]]

ARRIVAL_CAPACITIES = (500, 2_000, 8_000, 32_000)
SORTED_CAPACITY = 500
COLUMNS = (
    *("pile", "blocks", "optimum", "root level", "single level", "unspliced"),
    *(f"LRU, arrival, {capacity:,}" for capacity in ARRIVAL_CAPACITIES),
    *(f"LRU, sorted, {SORTED_CAPACITY}", f"ours, {SORTED_CAPACITY}"),
)
# The published traces, known by their number of blocks: shares computed by others, independently of this file.
# The number of groups of the second was not given.
REFERENCES = {
    288_500: ["36.64 %", "4.17 %", "", "33.62 % (2,227 groups)", "4.2 %", "5.4 %", "17.8 %", "33.2 %", "36.64 %"],
    121_877: ["63.96 %", "63.61 %", "", "63.79 %", "4.5 %", "14.6 %", "37.3 %", "62.8 %", "63.96 %"],
}


def our_order(rows: Rows) -> Rows:
    """The rows in the order of `schedule.planned`, in one window, every row with as many outputs."""
    return [rows[place] for place in order_rows(grow_tree([pack(row) for row in rows], [1.0] * len(rows)))]


def read_rows(path: Path) -> Rows:
    with path.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines if line.strip()]


def measure(rows: Rows) -> list[str]:
    """The cells of one pile, from the optimum on."""
    total = sum(map(len, rows))

    def saved(computed: int, digits: int) -> str:
        return f"{100 * (1 - computed / total):.{digits}f} %"

    def grouped(groups: list[Group]) -> str:
        return f"{100 * share_saved(rows, groups):.2f} % ({len(groups):,} groups)"

    return [
        saved(count_distinct(rows), 2),
        f"{100 * share_saved(rows, group_by_root(rows)):.2f} %",
        grouped(group_by_gain(rows)),
        grouped(group_by_gain(rows, splice=False)),
        *(saved(count_least_recently_used(rows, capacity), 1) for capacity in ARRIVAL_CAPACITIES),
        saved(count_least_recently_used(sorted(rows), SORTED_CAPACITY), 2),
        saved(count_least_recently_used(our_order(rows), SORTED_CAPACITY), 2),
    ]


def format_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    differing = []
    print(format_row(list(COLUMNS)))
    print(format_row(["---"] * len(COLUMNS)))
    for path in parser.parse_args().files:
        rows = read_rows(path)
        total = sum(map(len, rows))
        if not total:
            raise SystemExit(f"{path} has no blocks")
        cells = measure(rows)
        print(format_row([path.stem, f"{total:,}", *cells]))
        if total in REFERENCES:
            reference = REFERENCES[total]
            print(format_row(["reference", "", *reference, ""]))
            pairs = zip(COLUMNS[2:], cells, reference, strict=False)
            differing += [f"{path.stem}, {name}" for name, cell, known in pairs if not cell.startswith(known)]
    if differing:
        raise SystemExit("not as the reference: " + "; ".join(differing))


if __name__ == "__main__":
    main()
