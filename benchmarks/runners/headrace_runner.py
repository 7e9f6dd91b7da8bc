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
        return LLM(model, precision=precision, **{"kv_cache_bytes": 4 * 2**30} | options)

    llm = load()

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
        before = llm.engine.counters.steps, llm.engine.counters.preemptions
        outputs = llm.generate(prompts, params, progress=False)
        steps, preemptions = llm.engine.counters.steps - before[0], llm.engine.counters.preemptions - before[1]
        print(f"{sum(lengths) / steps:.1f} output tokens a step, {preemptions} preemptions", file=sys.stderr)
        return sum(len(each.outputs[0].token_ids) for each in outputs)

    def renew() -> None:
        nonlocal llm
        llm.close()
        llm = load()

    serve(answer, renew)


if __name__ == "__main__":
    main()
