"""The meter: operations counted as the kernels did them, seconds that add up, reports that say what bounded a run."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import batch_rows, run, write_lines
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.cli import main
from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, LayerCache, RaggedBatch
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.matrix import PackedWeight
from headrace.kernels.timed import TimedKernels
from headrace.meter.energy import EnergyCounter
from headrace.meter.meter import KERNEL_PARTS, MOST_POINTS, Meter
from headrace.meter.operations import ModelShape, Piece, Product, count_seen, count_step
from headrace.meter.page import draw_page
from headrace.meter.peaks import NoisyMachine, Peaks, load_peaks, measure_rate, save_peaks
from headrace.meter.stopwatch import Stopwatch
from headrace.meter.trace import TraceWriter
from headrace.meter.verdict import explain

PEAKS = Peaks("here", 1, {"fp32": 1e12, "bf16": 1e12, "int8": 2e12}, {}, {"read": 1e11})


def smollm2_shape() -> ModelShape:
    """SmolLM2-135M with every layer computed for every token, as the published formulas count."""
    sizes = {"query_key_value": (576, 960), "output": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
    products = [Product(name, size, out, out, 2 * size * out, 30, 0, "bf16") for name, (size, out) in sizes.items()]
    head = Product("head", 576, 49152, 49152, 2 * 576 * 49152, 0, 1, "bf16")
    return ModelShape((*products, head), 9, 3, 64, 576, (None,) * 30, 2, "bf16")


def test_constants_of_smollm2() -> None:
    shape = smollm2_shape()
    decode = count_step(shape, [Piece(1000, 1, 1, True)])
    assert sum(cost.operations for cost in decode.values()) == 268_959_744 + 69_120 * 1001
    shared = count_step(shape, [Piece(1000, 1, 1, True), Piece(1000, 1, 1, True, 960)])["attention"]
    alone = count_step(shape, [Piece(1000, 1, 1, True)] * 2)["attention"]
    assert shared.operations == alone.operations
    assert alone.bytes - shared.bytes == 960 * 2 * shape.kv_heads * shape.head_size * shape.item_bytes * len(
        shape.windows
    )
    prefill = count_step(shape, [Piece(0, 512, 1, False)])
    assert sum(cost.operations for cost in prefill.values()) == pytest.approx(117.85e9, rel=1e-4)
    assert sum(p.weight_bytes * p.layers for p in shape.products) == 2 * 106_168_320
    # Keys and values of 1,000 tokens read and of one read and written, and the step's queries and outputs.
    assert decode["attention"].bytes == 23_040 * 1002 + 30 * 2 * 9 * 64 * 2


@pytest.mark.parametrize("window", [None, 1, 4, 10, 100])
def test_seen_tokens_equal_counting_them(window: int | None) -> None:
    for start in range(14):
        for length in range(14):
            seen = sum(
                1
                for query in range(start, start + length)
                for key in range(query + 1)
                if window is None or key > query - window
            )
            assert count_seen(start, length, window) == seen


class Recorder(CpuKernels):
    """The C++ kernels, with the operations of each product and attention added up from their own arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attended = 0

    def linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        self.products += 2 * x.shape[0] * x.shape[1] * weight.rows
        return super().linear(x, weight, dtype)

    def find_largest(self, x: Tensor, weight: PackedWeight) -> Tensor:
        self.products += 2 * x.shape[0] * x.shape[1] * weight.rows
        return super().find_largest(x, weight)

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        self.products += 2 * residual.shape[0] * residual.shape[1] * weight.rows
        return super().norm_linear(x, residual, norm, eps, weight)

    def attention(self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec) -> Tensor:
        positions = batch.positions + 1 if spec.window is None else (batch.positions + 1).clamp(max=spec.window)
        self.attended += 4 * queries.shape[1] * queries.shape[2] * int(positions.sum())
        return super().attention(queries, cache, batch, spec)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_operations_are_those_that_the_kernels_did(tiny_model: Path, precision: Any) -> None:
    with LLM(str(tiny_model), precision=precision, kv_cache_bytes=1 << 22, step_tokens=24, threads=1) as llm:
        timed = llm.engine.model.kernels
        assert isinstance(timed, TimedKernels)
        timed.kernels = recorder = Recorder()
        prompts = [list(range(1, 40)), list(range(5, 12)), list(range(3, 60))]
        llm.generate(prompts, SamplingParams(max_tokens=7, ignore_eos=True))
        meter = llm.engine.meter
        products = sum(cost.operations for name, cost in meter.operators.items() if name != "attention")
        assert products == recorder.products
        assert meter.operators["attention"].operations == recorder.attended
        phases = meter.phases
        assert phases["prefill"].tokens == llm.engine.counters.computed_prompt_tokens
        # The last token of an output is said and never computed on.
        assert phases["decode"].tokens == llm.engine.counters.output_tokens - len(prompts)


def test_parts_add_up_and_nothing_passes_its_peak(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path), precision="bf16", kv_cache_bytes=1 << 28) as llm:
        llm.engine.meter.peaks = PEAKS
        llm.generate([[100 + place for place in range(300)]] * 2, SamplingParams(max_tokens=8, ignore_eos=True))
        report = llm.report()
    parts = report["time_by_part_s"]
    assert sum(parts.values()) == pytest.approx(report["wall_s"], rel=0.02)
    assert parts["matrix products"] > parts["scheduling"] > 0
    for phase in (report, report["prefill"], report["decode"]):
        assert 0 < phase["mfu"] < 1 and 0 < phase["mbu"] < 1 and phase["mfu"] <= phase["floor_share"] < 1
    steps = sum(point[2] + point[3] for point in report["timeline"])
    assert steps == report["prefill"]["tokens"] + report["decode"]["tokens"]
    assert all(0 < each["seconds"] < report["wall_s"] for each in report["operators"].values())


def test_a_part_within_a_part_counts_once() -> None:
    watch = Stopwatch()
    began = time.perf_counter()
    with watch.part("outer"):
        time.sleep(0.02)
        with watch.part("inner"):
            time.sleep(0.03)
    with watch.whole("all of it"), watch.part("inner"):
        time.sleep(0.02)
    passed = time.perf_counter() - began
    assert watch.seconds["all of it"] >= 0.02
    assert watch.seconds["inner"] >= 0.03 and watch.seconds["outer"] >= 0.02
    assert sum(watch.seconds.values()) <= passed


def test_the_timeline_stays_short() -> None:
    meter = Meter(smollm2_shape(), None, Stopwatch())
    for _ in range(3 * MOST_POINTS):
        meter.count([Piece(5, 1, 1, True)], time.perf_counter())
    points = meter.describe(1.0)["timeline"]
    assert len(points) <= MOST_POINTS and sum(point[3] for point in points) == 3 * MOST_POINTS


def test_a_trace_opens_and_holds_every_step(tiny_model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    report = run(tiny_model, source, tmp_path / "out.jsonl", trace=str(trace), price_per_hour=3600.0)
    events = json.loads(trace.read_text())
    steps = [event for event in events if event["name"] == "step"]
    assert len(steps) == report["steps"] and all(event["ph"] == "X" and event["dur"] > 0 for event in events)
    assert sum(event["args"]["output tokens"] for event in steps) == report["decode"]["tokens"]
    assert report["cost"] == pytest.approx(report["load_s"] + report["wall_s"], abs=0.002)


def test_a_trace_that_cannot_go_on_is_said_once_and_the_job_goes_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    writer = TraceWriter(Path("/dev/full"), 0.0, said.append)
    for _ in range(1000):
        writer.hear("step", 1.0, 2.0)
    assert said == ["the trace /dev/full ends here: no space left on device; all else goes on"]
    writer.close()
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    report = run(tiny_model, source, tmp_path / "out.jsonl", trace="/dev/full", quiet=False)
    assert report["succeeded"] == 3 and len(said) == 1
    assert capsys.readouterr().err.count(f"headrace: {said[0]}\n") == 1


def test_what_cannot_be_written_is_said_before_the_work(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(1))
    for trace in (tmp_path / "missing" / "trace.json", tmp_path):
        with pytest.raises(InputError, match="trace cannot be written"):
            run(tiny_model, source, tmp_path / "out.jsonl", trace=str(trace))
    run(tiny_model, source, tmp_path / "out.jsonl")
    page = tmp_path / "missing" / "page.html"
    assert main(["report", str(tmp_path / "out.jsonl.report.json"), "--html", str(page)]) == 2


def test_a_report_is_shown_without_the_extra_that_draws(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_model, write_lines(tmp_path / "in.jsonl", batch_rows(1)), tmp_path / "out.jsonl")
    monkeypatch.delitem(sys.modules, "headrace.meter.page", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    path = str(tmp_path / "out.jsonl.report.json")
    assert main(["report", path]) == 0 and "Bounded by" in capsys.readouterr().out
    assert main(["report", path, "--html", str(tmp_path / "page.html")]) == 2
    assert "headrace[plot]" in capsys.readouterr().err


def test_a_report_is_shown_and_drawn(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_model, write_lines(tmp_path / "in.jsonl", batch_rows(3)), tmp_path / "<out>.jsonl")
    path, page = tmp_path / "<out>.jsonl.report.json", tmp_path / "page.html"
    assert main(["report", str(path)]) == 0
    assert "Bounded by" in capsys.readouterr().out
    assert main(["report", str(path), "--html", str(page)]) == 0
    html = page.read_text()
    assert html.count("<svg") == 3 and "&lt;out&gt;.jsonl" in html and "<out>" not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html), "the page must open without a network"
    assert main(["report", str(tmp_path / "in.jsonl")]) == 2
    assert "cannot be read as a report" in capsys.readouterr().err
    with pytest.raises(InputError, match="nothing to draw"):
        draw_page({"settings": {}})


@pytest.mark.parametrize(
    ("part", "field", "wanted"),
    [
        ("", "requests", []),
        ("", "rows_shared", []),
        ("", "verdict", []),
        ("job", "succeeded", []),
        ("", "operators", ["--html", "page.html"]),
    ],
)
def test_a_report_of_another_version_is_refused_in_words(
    part: str,
    field: str,
    wanted: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = dict.fromkeys(("requests", "prompt_tokens", "cached_prompt_tokens", "output_tokens", "steps"), 1)
    fields |= dict.fromkeys(("preemptions", "kv_peak_bytes", "kv_budget_bytes", "peak_rss_bytes"), 1)
    fields |= dict.fromkeys(("load_s", "wall_s", "total_tokens_per_s", "output_tokens_per_s"), 1)
    fields |= dict.fromkeys(("rows_resumed", "rows_shared", "rows_shortened"), 0)
    report: dict[str, Any] = fields | describe(verdict="Bounded by nothing.", mfu=None, peaks=None, operators={})
    report["job"] = {"rows": 1, "succeeded": 1, "failed": 0}
    path = tmp_path / "old.report.json"
    path.write_text(json.dumps(report))
    assert main(["report", str(path), *wanted]) == 0
    del (report[part] if part else report)[field]
    path.write_text(json.dumps(report))
    assert main(["report", str(path), *wanted]) == 2
    assert f"another version of headrace: its field '{field}' is missing" in capsys.readouterr().err


def test_peaks_are_kept_by_machine_and_threads(tmp_path: Path) -> None:
    path = tmp_path / "peaks.json"
    assert load_peaks("here", 1, path) is None
    other = Peaks("here", 2, {"fp32": 3.0}, {"fp32": {"1": 2.0}}, {"read": 1.0})
    save_peaks(PEAKS, path)
    save_peaks(other, path)
    save_peaks(other, path)
    assert load_peaks("here", 2, path) == other and load_peaks("here", 1, path) == PEAKS
    assert load_peaks("there", 1, path) is None
    path.write_text("{broken")
    assert load_peaks("here", 1, path) is None


def test_scattered_measurements_are_refused() -> None:
    amounts = iter(range(1, 10**9))

    def erratic() -> float:
        time.sleep(0.001)
        return float(next(amounts)) ** 2

    with pytest.raises(NoisyMachine, match=r"products: 9 measurements scatter by \d+%"):
        measure_rate(erratic, "products")


def test_registers_and_memory_do_the_work_they_report() -> None:
    kernels = CpuKernels()
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert kernels.multiply_registers(dtype, 200) == 2 * kernels.multiply_registers(dtype, 100) > 0
    data = torch.arange(4 << 20, dtype=torch.int32).view(torch.uint8)
    assert kernels.sweep(2, data) == data.nbytes
    assert torch.equal(data[: 8 << 20], data[8 << 20 :])


def test_energy_counters_wrap(tmp_path: Path) -> None:
    assert EnergyCounter(tmp_path).read() is None
    zone = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (zone / "energy_uj").write_text("9000000\n")
    counter = EnergyCounter(tmp_path)
    (zone / "energy_uj").write_text("500000\n")
    assert counter.read() == pytest.approx(1.5)
    # Every three seconds of a long run, in which the counter begins again every hundred.
    for second in range(0, 3000, 3):
        (zone / "energy_uj").write_text(f"{(500_000 + second * 100_000) % 10_000_000}\n")
        counter.follow(float(second))
    assert counter.read() == pytest.approx(1.5 + 299.7)


def test_energy_is_that_of_the_packages_and_of_nothing_around_them(tmp_path: Path) -> None:
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "psys", "intel-rapl:2": "package-1-die-0"}
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text("0\n")
    counter = EnergyCounter(tmp_path)
    for place, zone in enumerate(names):
        (tmp_path / zone / "energy_uj").write_text(f"{10**place * 1_000_000}\n")
    assert counter.read() == pytest.approx(101)


def describe(**changes: Any) -> dict[str, Any]:
    """A report of a run that spent most of its time in products."""
    parts = {"matrix products": 8.0, "attention": 1.0, "other kernels": 0.2, "between kernels": 0.3, "sampling": 0.5}
    report = {
        "time_by_part_s": parts,
        "mfu": 0.7,
        "mbu": 0.3,
        "preemptions": 0,
        "kv_peak_bytes": 10,
        "kv_budget_bytes": 100,
        "settings": {"threads": 2, "precision": "int8"},
        "decode": {"seconds": 4.0},
        "timeline": [[0.0, 10.0, 50, 50, 64]],
        "peaks": {"operations_per_s": {"fp32": 1.0, "bf16": 2.0, "int8": 4.0}},
        "recomputed_tokens": 0,
        "computed_prompt_tokens": 100,
    }
    return report | changes


@pytest.mark.parametrize(
    ("changes", "cores", "said"),
    [
        ({}, 2, "Bounded by arithmetic: 80% of the time went to matrix products, and the run used 70%"),
        ({}, 2, "no setting is left"),
        ({"mbu": 0.8}, 2, "Bounded by memory"),
        ({"mfu": None, "mbu": None, "peaks": None}, 2, "headrace bench peaks"),
        ({"preemptions": 3}, 2, "more KV memory"),
        ({"kv_peak_bytes": 99}, 2, "more KV memory"),
        ({}, 4, "2 of 4 cores worked"),
        ({"settings": {"threads": 2, "threads_reason": "tuned", "precision": "int8"}}, 4, "no setting is left"),
        ({"settings": {"threads": 2, "precision": "bf16"}}, 2, "--precision int8 would help most: .* 2.0 times"),
        (
            {
                "settings": {"threads": 2, "precision": "bf16"},
                "peaks": {"operations_per_s": {"fp32": 1.0, "bf16": 2.0, "int8": 2.1}},
            },
            2,
            "no setting is left",
        ),
        ({"decode": {"seconds": 9.0}, "timeline": [[0.0, 10.0, 1, 9, 1]]}, 2, "more rows at once"),
        (
            {"time_by_part_s": dict.fromkeys(KERNEL_PARTS, 0.5) | {"tokenization": 18.0}},
            2,
            "Bounded by tokenization: 90%.*waited",
        ),
        ({"recomputed_tokens": 50}, 2, "another order"),
    ],
)
def test_the_verdict(changes: dict[str, Any], cores: int, said: str) -> None:
    assert re.search(said, explain(describe(**changes), cores))
