"""OpenVINO GenAI's continuous batching as compare.py drives it: python openvino_runner.py FOLDER [KEYS VALUES BYTES]

KEYS and VALUES are the formats of the KV cache (u8, u4, bf16), BYTES what it may take.

Install: pip install torch openvino-genai optimum-intel nncf (and remove torchvision), then
optimum-cli export openvino -m MODEL_FOLDER --task text-generation-with-past --weight-format int8 EXPORTED_FOLDER
"""

from __future__ import annotations

import sys

import numpy as np
import openvino
import openvino_genai as genai
from protocol import serve

# Of SmolLM2-135M: a block has 32 tokens, a token of 8 or 4 bits a float scale and zero point in each head.
LAYERS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 3, 64, 32
BITS = {"bf16": 16, "u8": 8, "u4": 4}


def count_block_bytes(keys: str, values: str) -> int:
    """Bytes of one block, keys and values of all layers."""
    parts = [HEAD_SIZE * BITS[each] // 8 + (0 if each == "bf16" else 8) for each in (keys, values)]
    return LAYERS * KV_HEADS * BLOCK_SIZE * sum(parts)


def main() -> None:
    folder, *cache = sys.argv[1:]
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 4, True
    properties = {}
    if cache:
        keys, values, size = cache
        properties = {"KEY_CACHE_PRECISION": keys, "VALUE_CACHE_PRECISION": values}
        scheduler.cache_size, scheduler.num_kv_blocks = 0, int(size) // count_block_bytes(keys, values)
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, 128

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        configs = []
        for length in lengths:
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
            configs.append(config)
        return sum(len(each.m_generation_ids[0]) for each in pipe.generate(tensors, configs))

    pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    def renew() -> None:
        # A new pipeline is the only way to an empty prefix cache.
        nonlocal pipe
        pipe = None
        pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    serve(answer, renew)


if __name__ == "__main__":
    main()
