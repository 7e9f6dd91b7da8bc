"""Draw what was found of KV policies as one page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.judge.kv_words import format_policies, headline
from headrace.meter.page import Drawing, make_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"prefix": "#9ecae1", "stream": "#fd8d3c"}


def draw_policies(values: Mapping[str, Any]) -> str:
    """The page of `headrace eval kv`. Raises InputError without the extra that draws."""
    drawings: list[Drawing] = [
        ("Loss beside memory: lower and further left is better", draw_trade),
        ("Loss of each policy, with its standard error", draw_losses),
        ("Attention of one query, a token of its context", draw_attention),
    ]
    return make_page("KV policies", headline(values), format_policies(values), drawings, values)


def draw_trade(axes: Axes, values: Mapping[str, Any]) -> None:
    for row in values["policies"]:
        place = row["bytes_per_token"], row["stream"]["dnll"]
        axes.errorbar(*place, row["stream"]["error"], fmt="o", color="#222", ecolor="#aaa")
        axes.annotate(name_row(row, values), place, textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_xlabel("bytes a token of context")
    axes.set_ylabel("dNLL (stream), nats a token")
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def draw_losses(axes: Axes, values: Mapping[str, Any]) -> None:
    rows = values["policies"][::-1]
    for shift, (way, color) in zip((0.2, -0.2), COLORS.items(), strict=True):
        places = [place + shift for place in range(len(rows))]
        losses = [row[way]["dnll"] for row in rows]
        axes.barh(places, losses, 0.4, xerr=[row[way]["error"] for row in rows], color=color, ecolor="#666", label=way)
    axes.set_yticks(range(len(rows)), [name_row(row, values) for row in rows])
    axes.set_xlabel("dNLL, nats a token")
    axes.legend()


def draw_attention(axes: Axes, values: Mapping[str, Any]) -> None:
    rows = values["policies"][::-1]
    axes.barh([name_row(row, values) for row in rows], [row["attention_ns"] for row in rows], color="#6baed6")
    axes.set_xlabel("nanoseconds, all layers together")


def name_row(row: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The policy, and the context where there are several."""
    return row["kv"] if len(values["plain"]) == 1 else f"{row['kv']} at {row['context']:,}"
