"""Draw a report as one page: drawings and style are in the file, so it opens without a network."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from headrace.core import InputError
from headrace.meter.report import format_report

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise InputError("drawing needs the extra `plot`: pip install 'headrace[plot]'") from error

Drawing = tuple[str, Callable[[Axes, Mapping[str, Any]], None]]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Headrace: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; }}
figure {{ margin: 2rem 0; }}
svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><strong>{headline}</strong></p>
<pre>{text}</pre>
{figures}
</body>
</html>
"""


def draw_page(report: Mapping[str, Any]) -> str:
    """The page of a report. Raises InputError for one of a run that computed nothing."""
    if "timeline" not in report:
        why = "all rows were refused, or answered before"
        raise InputError(f"this run computed nothing ({why}): there is nothing to draw")
    drawings: list[Drawing] = [
        ("Tokens a second and sequences in a step, over the run", draw_timeline),
        ("Operators under the roofline of this machine", draw_roofline),
        ("Where the time went", draw_parts),
    ]
    title = str(report["settings"].get("output", "a run"))
    return make_page(title, report["verdict"], format_report(report), drawings, report)


def make_page(title: str, headline: str, text: str, drawings: Sequence[Drawing], values: Mapping[str, Any]) -> str:
    """A page with these drawings of some values under their captions."""
    figures = []
    for caption, draw in drawings:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        draw(figure.subplots(), values)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        svg = drawn.getvalue()
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
        figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>")
    return PAGE.format(title=escape(title), headline=escape(headline), text=escape(text), figures="\n".join(figures))


def draw_timeline(axes: Axes, report: Mapping[str, Any]) -> None:
    """Raises InputError where no step took any time, as of a pile of which every row is refused."""
    points = [point for point in report["timeline"] if point[1] > 0]
    if not points:
        raise InputError("none of these rows can be computed: there is nothing to draw")
    edges = [point[0] for point in points] + [points[-1][0] + points[-1][1]]
    prompt, output = ([point[place] / point[1] for point in points] for place in (2, 3))
    axes.stairs(prompt, edges, fill=True, color="#9ecae1", label="prompt tokens a second")
    both = [one + other for one, other in zip(prompt, output, strict=True)]
    axes.stairs(both, edges, baseline=prompt, fill=True, color="#fd8d3c", label="output tokens a second")
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens a second")
    sequences = axes.twinx()
    sequences.stairs([point[4] for point in points], edges, color="#444", label="sequences")
    sequences.set_ylabel("sequences in a step")
    sequences.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def draw_roofline(axes: Axes, report: Mapping[str, Any]) -> None:
    operators = {name: each for name, each in report["operators"].items() if each["seconds"] > 0 and each["bytes"]}
    intensities = {name: each["operations"] / each["bytes"] for name, each in operators.items()}
    if report["peaks"] is not None:
        span = [min([*intensities.values(), 0.5]), max([*intensities.values(), 1000.0])]
        bandwidth = report["peaks"]["memory_bytes_per_s"]["read"]
        for name, peak in report["peaks"]["operations_per_s"].items():
            places = [span[0], peak / bandwidth, span[1]]
            axes.plot(places, [min(peak, place * bandwidth) / 1e9 for place in places], label=f"{name} roof")
        axes.legend(loc="lower right")
    for name, each in operators.items():
        axes.plot(intensities[name], each["operations"] / each["seconds"] / 1e9, "o", color="#222")
        axes.annotate(f"{name} ({each['format']})", (intensities[name], each["operations"] / each["seconds"] / 1e9))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("G operations a second")


def draw_parts(axes: Axes, report: Mapping[str, Any]) -> None:
    parts = sorted(report["time_by_part_s"].items(), key=lambda part: part[1])
    axes.barh([name for name, _ in parts], [seconds for _, seconds in parts], color="#6baed6")
    axes.set_xlabel("seconds")
