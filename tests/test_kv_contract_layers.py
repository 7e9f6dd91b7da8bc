"""What every KV policy must keep to, whatever a model's layers are: sliding windows, wide heads, any number of them."""

from __future__ import annotations

import pytest
import torch
from ragged import RaggedDriver
from test_kv_contract import AGAIN, LOSSLESS, LOSSY
from test_models import GEMMA, make_pair, make_text
from torch import Tensor

from headrace.cache.policies.base import KVShape
from headrace.cache.policies.choice import make_policy
from headrace.core import InputError
from headrace.judge.driver import CacheDriver
from headrace.kernels import choose_kernels
from headrace.model import Model

WINDOWS, ALL = ["sliding_attention"], ["full_attention"]
PROMPT, OUTPUT = 150, 50


@pytest.fixture(scope="module")
def model() -> Model:
    """Layers with windows around two without."""
    heads = {"head_dim": 256, "num_attention_heads": 3, "num_key_value_heads": 1}
    layers = {"num_hidden_layers": 5, "layer_types": 2 * WINDOWS + 2 * ALL + WINDOWS, "sliding_window": 40}
    return make_pair("Gemma3", GEMMA | heads | layers, choose_kernels("auto", "cpu"))[1]


@pytest.mark.parametrize("kv", LOSSLESS.values(), ids=LOSSLESS)
def test_sliding_windows_and_heads_of_256_are_served(kv: str, model: Model) -> None:
    tokens = make_text(200)
    found = []
    for policy in ("plain", kv):
        driver = RaggedDriver(model, block_size=32, kv=policy)
        number = driver.add(tokens)
        pieces = []
        for length in (70, 1, 58, 71):
            pieces.append(driver.run({number: length})[number])
            driver.slide(number)
        found.append(torch.cat(pieces))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kv", [*LOSSY.values(), *AGAIN.values()], ids=[*LOSSY, *AGAIN])
def test_with_windows_a_text_is_read_alike_alone_and_in_any_batch_and_chunk(kv: str, model: Model) -> None:
    expected = read(model, kv, [PROMPT], company=False)
    assert torch.equal(read(model, kv, [70, 1, 58, 21], company=True), expected)
    assert torch.equal(read(model, "plain", [PROMPT], company=False), expected) == (kv == "plain")


def read(model: Model, kv: str, chunks: list[int], company: bool) -> Tensor:
    """Hidden states [OUTPUT + 1, hidden] after a prompt in these chunks and each token of output."""
    text, other = make_text(PROMPT + OUTPUT), make_text(PROMPT + OUTPUT, seed=1)
    driver = CacheDriver(model, make_policy(kv), 32, 2, PROMPT + OUTPUT)
    sequences = [(driver.start(each[:PROMPT]), each) for each in ([other, text] if company else [text])]
    hidden, end = [], 0
    for length in chunks + [1] * OUTPUT:
        end += length
        hidden.append(driver.feed([(sequence, tokens[end - length : end]) for sequence, tokens in sequences])[-1])
    return torch.stack(hidden[len(chunks) - 1 :])


@pytest.mark.parametrize("kv", LOSSY.values(), ids=LOSSY)
def test_a_layout_places_every_layer_in_blocks_that_are_large_enough(kv: str) -> None:
    for windows in ((None,) * 30, (512, 512, 512, 512, None, None) * 3):
        layout = make_policy(kv).arrange(KVShape(windows, 3, 64, torch.bfloat16), 32)
        for layer, window in enumerate(windows):
            group = layout.groups[layout.place(layer).group]
            assert group.layer_bytes >= 2 * 32 * 3 * 64 * 2 and not group.sealed
            assert window is None or (group.window == window and layout.place_sealed(layer) is None)
        assert max(len(group.layers) * group.layer_bytes for group in layout.groups) == layout.block_bytes


def test_what_would_change_nothing_is_refused() -> None:
    shape = KVShape((512, 512, 512, 512, 512, None) * 3, 1, 256, torch.bfloat16)
    with pytest.raises(InputError, match="from layer 9 of 18 on, no two neighbouring layers"):
        make_policy("minicache").arrange(shape, 32)
    for kv in ("kivi", "snapkv"):
        with pytest.raises(InputError, match="every layer of this model has a sliding window"):
            make_policy(kv).arrange(KVShape((512,) * 4, 1, 256, torch.bfloat16), 32)
    with pytest.raises(InputError, match="head size 544 cannot be sealed: it must be at most 512"):
        make_policy("kivi").arrange(KVShape((None,) * 4, 1, 544, torch.bfloat16), 32)
