"""Headrace as compare.py drives it: python headrace_runner.py MODEL PRECISION [SETTING=VALUE ...]"""

from __future__ import annotations

import sys

from protocol import serve

from headrace import LLM, SamplingParams


def main() -> None:
    model, precision, *settings = sys.argv[1:]
    pairs = (each.split("=", 1) for each in settings)
    options = {name: int(value) if value.isdigit() else value for name, value in pairs}

    def load() -> LLM:
        return LLM(model, precision=precision, kv_cache_bytes=4 * 2**30, **options)

    llm = load()

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
        outputs = llm.generate(prompts, params, progress=False)
        return sum(len(each.outputs[0].token_ids) for each in outputs)

    def renew() -> None:
        nonlocal llm
        llm.close()
        llm = load()

    serve(answer, renew)


if __name__ == "__main__":
    main()
