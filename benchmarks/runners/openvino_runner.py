"""OpenVINO GenAI's continuous batching as compare.py drives it: python openvino_runner.py EXPORTED_FOLDER

Install: pip install torch openvino-genai optimum-intel nncf (and remove torchvision), then
optimum-cli export openvino -m MODEL_FOLDER --task text-generation-with-past --weight-format int8 EXPORTED_FOLDER
"""

from __future__ import annotations

import sys

import numpy as np
import openvino
import openvino_genai as genai
from protocol import serve


def main() -> None:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 4, True
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, 128

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        configs = []
        for length in lengths:
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
            configs.append(config)
        return sum(len(each.m_generation_ids[0]) for each in pipe.generate(tensors, configs))

    pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")

    def renew() -> None:
        # A new pipeline is the only way to an empty prefix cache.
        nonlocal pipe
        pipe = None
        pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")

    serve(answer, renew)


if __name__ == "__main__":
    main()
