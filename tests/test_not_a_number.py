"""What is no number stays none on its way through the kernels, and fails the rows that it is of, and no others."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import serving
from test_kernels import PLAIN, make_case
from test_sealed import make_batch
from test_sealed import make_cache as make_sealed_cache
from tiny import make_tiny_model

from headrace import LLM, Constraint, SamplingParams
from headrace.core import InputError
from headrace.kernels import _cpu
from headrace.kernels.base import AttentionSpec, SealedForm
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.vectors import VectorForm
from headrace.quant import FORMATS, Quantization
from headrace.quant.int4 import Int4
from headrace.quant.int8 import Int8

NAN, INFINITE = float("nan"), float("inf")
BROKEN_TOKEN = 77
DTYPES = [torch.float32, torch.bfloat16]
EVERY_FORMAT = [FORMATS["fp32"], FORMATS["bf16"], Int8(32), Int4(32, 32)]


@pytest.fixture(params=_cpu.instruction_sets())
def fast(request: pytest.FixtureRequest) -> CpuKernels:
    torch.manual_seed(0)
    return CpuKernels(request.param)


@pytest.mark.parametrize("format", EVERY_FORMAT, ids=["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("wrong", [NAN, INFINITE])
def test_a_product_of_what_is_no_number_is_none(fast: CpuKernels, format: Quantization, wrong: float) -> None:
    for kernels in (fast, PLAIN):
        weight = kernels.pack(format.store(torch.randn(40, 96)))
        x = torch.randn(5, 96).to(format.dtype)
        right = kernels.linear(x, weight, torch.float32)
        x[2, 50] = wrong
        found = kernels.linear(x, weight, torch.float32)
        assert not found[2].isfinite().any()
        others = torch.tensor([0, 1, 3, 4])
        assert torch.equal(found[others], right[others])
        assert kernels.find_largest(x[others], weight).tolist() == right[others].argmax(-1).tolist()
        if wrong is NAN:
            assert kernels.find_largest(x, weight)[2] == -1


@pytest.mark.parametrize("column", [0, 31, 32, 45, 69])
def test_a_row_with_one_element_that_is_no_number_has_no_largest(fast: CpuKernels, column: int) -> None:
    """In any panel, in one that is not full, and where columns end."""
    matrix = FORMATS["fp32"].store(torch.randn(70, 64))
    bias = torch.zeros(70)
    bias[column] = NAN
    x = torch.randn(30, 64)
    for kernels in (fast, PLAIN):
        assert kernels.find_largest(x, kernels.pack(replace(matrix, bias=bias))).tolist() == [-1] * 30
        assert -1 not in kernels.find_largest(x, kernels.pack(matrix)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [AttentionSpec(0.2), AttentionSpec(0.2, soft_cap=3.0)], ids=["plain", "soft cap"])
@pytest.mark.parametrize("wrong", [NAN, INFINITE])
def test_attention_over_a_key_that_is_no_number(
    fast: CpuKernels, dtype: torch.dtype, spec: AttentionSpec, wrong: float
) -> None:
    cache, batch = make_case([(70, 1), (64, 20)], 2, 64, 32, dtype)
    queries = torch.randn(21, 4, 64).to(dtype)
    right = fast.attention(queries, cache, batch, spec)
    # The first token of the first sequence, all of kv head 1: whatever the query, some of its products are none.
    cache.keys[int(batch.block_tables[0][0, 0]), 1, :, 0] = wrong
    cache.keys[int(batch.block_tables[0][0, 0]), 1, 0, 0, 0] = NAN
    found = fast.attention(queries, cache, batch, spec)
    assert found[0, 2:].isnan().all()
    assert torch.equal(found[0, :2], right[0, :2]) and torch.equal(found[1:], right[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [SealedForm(2, 2), SealedForm(4, 4), SealedForm(8, 8)], ids=["2", "4", "8"])
@pytest.mark.parametrize("wrong", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("keys", [True, False], ids=["key", "value"])
def test_what_is_no_number_is_sealed_as_such(
    dtype: torch.dtype, form: SealedForm, wrong: float, keys: bool, fast: CpuKernels
) -> None:
    cache, batch = make_sealed_cache(12, 2, 64, 32, dtype, form), make_batch([(100, 1)], 32)
    assert cache.sealed is not None
    exact, sealed = (
        batch.block_tables[0][0, :3].contiguous(),
        batch.block_tables[cache.sealed_group][0, :3].contiguous(),
    )
    (cache.keys if keys else cache.values)[exact[1], 1, 3, 4, 0] = wrong
    fast.seal(cache, exact, sealed)
    queries = torch.randn(1, 4, 64).to(dtype)
    found = fast.attention(queries, cache, batch, AttentionSpec(0.1))
    assert found[0, :2].isfinite().all()
    assert found[0, 2:].isnan().any(-1).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_shared_exponents_say_so_of_their_group_alone(bits: int) -> None:
    form = VectorForm(32, 64, bits, 16, exponents=True, by_channel=True)
    x = torch.randn(3, 32, 64)
    whole = form.decode(form.encode(x))
    x[1, 5, 20], x[2, 7, 63] = NAN, math.inf
    found = form.decode(form.encode(x))
    broken = torch.zeros(3, 32, 4, dtype=torch.bool)
    broken[1, 5, 1] = broken[2, 7, 3] = True
    broken = broken.repeat_interleave(16, -1)
    assert not found[broken].isfinite().any() and torch.equal(found[~broken], whole[~broken])


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one token's embedding is no number; its head is its own, and whole."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "broken", tie_word_embeddings=False, head_dim=32)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    # Whole rows must not say it: nothing is its logit, and where tokens are drawn it is ruled out.
    weights["lm_head.weight"][BROKEN_TOKEN] = 0
    weights["model.embed_tokens.weight"][BROKEN_TOKEN] = NAN
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


RULED_OUT = {"logit_bias": {BROKEN_TOKEN: -100.0}}
ROWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8} | RULED_OUT,
    {"temperature": 0.8, "top_k": 5} | RULED_OUT,
    {"temperature": 0.8, "top_p": 0.9} | RULED_OUT,
    {"temperature": 0.8, "min_p": 0.1} | RULED_OUT,
    {"logprobs": 3},
    {"constraint": Constraint("regex", "[a-f ]{3,40}")},
]


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("kv", ["plain", "kivi(k=4, v=4)", "bfp(block=16)"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_only_rows_with_the_broken_token_fail(broken_model: Path, kernels: str, kv: str, precision: str) -> None:
    def open_llm() -> LLM:
        return LLM(str(broken_model), precision=precision, kernels=kernels, kv=kv, kv_cache_bytes=1 << 20, threads=1)  # type: ignore[arg-type]

    whole = [list(range(100, 180)), list(range(10, 15)), [200] * 40]
    broken = [[5, BROKEN_TOKEN, 9], [*range(100, 150), BROKEN_TOKEN, *range(100, 180)], [BROKEN_TOKEN]]
    params = [SamplingParams(max_tokens=12, seed=1, ignore_eos=True, **each) for each in ROWS]
    with open_llm() as llm:
        expected = llm.generate([prompt for prompt in whole for _ in params], params * len(whole))
    pairs = [(prompt, each) for a, b in zip(whole, broken, strict=True) for each in params for prompt in (a, b)]
    # Twice: blocks that broken rows have left are written by others.
    with open_llm() as llm:
        for _ in range(2):
            outputs = llm.generate([prompt for prompt, _ in pairs], [each for _, each in pairs])
            assert [each.error.code if each.error else None for each in outputs] == [None, "not_a_number"] * (
                len(pairs) // 2
            )
            found = [each.outputs[0].token_ids for each in outputs[::2]]
            if kernels == "cpu":
                assert found == [each.outputs[0].token_ids for each in expected]


def test_scores_and_vectors_say_so_too(broken_model: Path) -> None:
    with LLM(str(broken_model), kernels="cpu", kv_cache_bytes=1 << 20, threads=1) as llm:
        for call in (llm.score, llm.embed):
            with pytest.raises(InputError, match="no number"):
                call([[4, 5, 6], [4, BROKEN_TOKEN, 6]])


def test_a_server_says_that_it_is_not_the_clients_fault(broken_model: Path) -> None:
    with serving(broken_model) as server, server.client() as client:
        body = {"model": broken_model.name, "prompt": [[4, BROKEN_TOKEN, 6]], "max_tokens": 3}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 500, answer.text
        error = answer.json()["error"]
        assert error["code"] == "not_a_number" and error["type"] == "server_error" and error["param"] is None
        whole = client.post("/v1/completions", json=body | {"prompt": [[4, 5, 6]]})
        assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] >= 1
