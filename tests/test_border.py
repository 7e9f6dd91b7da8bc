"""What the extension cannot take is refused before it sees an address: nothing crashes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_kernels import FAST, make_cache, make_case
from tiny import make_tiny_model
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.cache.policies.choice import make_policy
from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, HeadSpec, LayerCache, RaggedBatch, SealedForm
from headrace.kernels.matrix import Matrix
from headrace.kernels.vectors import VectorForm
from headrace.quant import packed
from headrace.quant.int4 import Int4
from headrace.quant.int8 import Int8

BYTES, NIBBLES = Int8(32).store(torch.randn(40, 96)), Int4(32, 64).store(torch.randn(40, 96))


@pytest.mark.parametrize(
    "matrix",
    [
        replace(BYTES, input_group=0),
        replace(BYTES, input_group=6),
        replace(BYTES, weight_group=32),
        replace(BYTES, scales=None),
        replace(BYTES, scales=torch.ones(20)),
        replace(BYTES, input_scales=torch.ones(95)),
        replace(BYTES, bias=torch.ones(41)),
        replace(NIBBLES, weight_group=0),
        replace(NIBBLES, weight_group=24),
        replace(NIBBLES, input_group=48),
        replace(NIBBLES, minimums=None),
        replace(NIBBLES, scales=torch.ones(40, 2).half()),
        replace(NIBBLES, scales=torch.ones(40, 3)),
        Matrix(torch.ones(5, 8), activation="silu"),
        Matrix(torch.ones(5, 8, dtype=torch.float64)),
        Matrix(torch.ones(8)),
    ],
)
def test_a_matrix_that_is_not_as_it_says_is_refused(matrix: Matrix) -> None:
    with pytest.raises(ValueError):
        FAST.pack(matrix)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64, torch.float16])
def test_products_are_of_floating_point(dtype: torch.dtype) -> None:
    weight = FAST.pack(BYTES)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        FAST.linear(torch.ones(2, 96), weight, dtype)
    with pytest.raises(ValueError, match="cannot take"):
        FAST.linear(torch.ones(2, 96).to(dtype), weight)


@pytest.mark.parametrize("norm", [torch.ones(7), torch.ones(8).bfloat16(), torch.ones(16)[::2]])
def test_norms_that_do_not_fit_are_refused(norm: Tensor) -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="norm's weight"):
        FAST.rms_norm(x, norm, 1e-5)
    with pytest.raises(ValueError, match="norm's weight"):
        FAST.add_rms_norm(x, x.clone(), norm, 1e-5)
    with pytest.raises(ValueError, match="norm's weight"):
        FAST.norm_linear(None, x, norm, 1e-5, FAST.pack(Matrix(torch.ones(4, 8))))


def place(**changes: Any) -> None:
    given: dict[str, Any] = {
        "fused": torch.ones(2, 4, 16),
        "cos": torch.ones(2, 8),
        "sin": torch.ones(2, 8),
        "slots": torch.arange(2),
        "norm": None,
    } | changes
    spec, rotation = HeadSpec(given["norm"], None, 1e-5), (given["cos"], given["sin"])
    FAST.place_heads(given["fused"], spec, rotation, make_cache(1, 1, 16, 16, torch.float32), given["slots"])


@pytest.mark.parametrize(
    "changes",
    [
        {"fused": torch.ones(2, 4, 16).bfloat16()},
        {"fused": torch.ones(2, 4, 8)},
        {"fused": torch.ones(2, 1, 16)},
        {"cos": torch.ones(2, 8).double()},
        {"sin": torch.ones(1, 8)},
        {"slots": torch.arange(2).int()},
        {"slots": torch.arange(3)},
        {"norm": torch.ones(8)},
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    place()
    with pytest.raises(ValueError):
        place(**changes)


CASE = make_case([(40, 3), (16, 1)], 2, 16, 16, torch.bfloat16)


def attend(queries: Tensor, cache: LayerCache | None = None, **changes: Any) -> None:
    batch: RaggedBatch = replace(CASE[1], **changes)
    FAST.attention(queries, cache or CASE[0], batch, AttentionSpec(0.2))


QUERIES = torch.ones(4, 4, 16).bfloat16()


@pytest.mark.parametrize(
    ("queries", "changes"),
    [
        (QUERIES.float(), {}),
        (QUERIES[:, :3], {}),
        (QUERIES[:, :, :8].contiguous(), {}),
        (QUERIES[:3], {}),
        (QUERIES, {"positions": CASE[1].positions.long()}),
        (QUERIES, {"query_starts": CASE[1].query_starts.long()}),
        (QUERIES, {"query_starts": CASE[1].query_starts[:2]}),
        (QUERIES, {"block_tables": (CASE[1].block_tables[0].long(),)}),
        (QUERIES, {"block_tables": (CASE[1].block_tables[0][:1],)}),
        (QUERIES, {"begins": torch.zeros(2).long()}),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries: Tensor, changes: dict[str, Any]) -> None:
    attend(QUERIES)
    with pytest.raises(ValueError):
        attend(queries, **changes)


@pytest.mark.parametrize("values", [CASE[0].values.float(), CASE[0].values[:, :1], CASE[0].values.transpose(2, 3)])
def test_values_that_are_not_of_their_keys_are_refused(values: Tensor) -> None:
    with pytest.raises(ValueError, match="values"):
        attend(QUERIES, replace(CASE[0], values=values))


@pytest.mark.parametrize(("size", "head"), [(256, 32), (16, 32), (32, 544)])
def test_blocks_that_cannot_be_sealed_are_refused(size: int, head: int) -> None:
    form, cache = SealedForm(4, 4), make_cache(2, 1, head, size, torch.float32)
    sealed = torch.zeros(2, 1, form.count_head_bytes(head, size), dtype=torch.uint8)
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be sealed"):
        FAST.seal(replace(cache, sealed=sealed, form=form), one, one)


@pytest.mark.parametrize("bits", [0, 1, 3, 16, 64])
def test_bits_that_no_code_has_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        SealedForm(4, bits)
    if bits != 16:
        with pytest.raises(ValueError, match="bits"):
            VectorForm(32, 64, bits)


@pytest.mark.parametrize(("slots", "into"), [((2, 20), 20), ((1, 4), 0), ((2, 4), -1)])
def test_tokens_that_do_not_fit_are_not_moved(slots: tuple[int, int], into: int) -> None:
    cache = make_cache(4, 2, 16, 16, torch.float32)
    with pytest.raises(ValueError):
        FAST.move_tokens(cache, torch.arange(2), torch.zeros(slots, dtype=torch.int64), into)


@pytest.mark.parametrize(
    ("kernels", "damage"),
    [
        *(("cpu", damage) for damage in ("shape", "dtype", "lacks a part", "lacks a norm", "embedding")),
        *(("reference", damage) for damage in ("shape", "lacks a part", "lacks a norm", "embedding")),
    ],
)
def test_damaged_packed_weights_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: Any, damage: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    model = make_tiny_model(tmp_path / "model")

    def answer() -> list[int]:
        with LLM(str(model), precision="int8", kernels=kernels, kv_cache_bytes=1 << 20, keep_packed=True) as llm:
            return llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8))[0].outputs[0].token_ids

    expected = answer()
    (path,) = (tmp_path / "cache" / "headrace" / "packed").iterdir()
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = dict(file.metadata())
    main = "panels" if kernels == "cpu" else "values"
    name = f"model.layers.1.mlp.down_proj/{main}"
    if damage == "shape":
        parts[name] = parts[name][:1].contiguous()
    elif damage == "dtype":
        parts[name] = parts[name].to(torch.float64)
    elif damage == "lacks a part":
        del parts[name]
    elif damage == "lacks a norm":
        del parts["model.norm/tensor"]
    else:
        parts["model.embed_tokens/tensor"] = parts["model.embed_tokens/tensor"][:9].contiguous()
    save_file(parts, tmp_path / "damaged", metadata=facts)
    shutil.move(tmp_path / "damaged", path)
    assert answer() == expected
    assert "made anew" in caplog.text
    caplog.clear()
    assert answer() == expected and not caplog.text


def test_a_cache_of_one_block_is_as_good_as_others(tiny_model: Path) -> None:
    with LLM(str(tiny_model), kernels="cpu", kv="kvmerger(keep=0.5)", block_size=32, kv_cache_bytes=1 << 20) as llm:
        shape, policy = llm.engine.model.kv_shape, make_policy("kvmerger(keep=0.5)")
        block = policy.arrange(shape, 32).block_bytes
        groups = len(policy.arrange(shape, 32).groups)
    options: dict[str, Any] = {"kernels": "cpu", "kv": "kvmerger(keep=0.5)", "block_size": 32}
    with LLM(str(tiny_model), kv_cache_bytes=block * groups, **options) as llm:
        assert (
            len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3
        )


def test_kvmerger_refuses_a_soft_cap(tiny_model: Path) -> None:
    with LLM(str(tiny_model), kernels="cpu", kv_cache_bytes=1 << 20) as llm:
        capped = replace(llm.engine.model.kv_shape, soft_cap=30.0)
    with pytest.raises(InputError, match="attn_logit_softcapping"):
        make_policy("kvmerger(keep=0.5)").arrange(capped, 32)
    make_policy("h2o(keep=0.5)").arrange(capped, 32)


def test_minicache_refuses_heads_that_cannot_be_sealed(tiny_model: Path) -> None:
    with LLM(str(tiny_model), kernels="cpu", kv_cache_bytes=1 << 20) as llm:
        large = replace(llm.engine.model.kv_shape, head_size=544)
    with pytest.raises(InputError, match="head size 544 cannot be sealed"):
        make_policy("minicache(start=0) + kivi(k=4, v=4)").arrange(large, 32)
