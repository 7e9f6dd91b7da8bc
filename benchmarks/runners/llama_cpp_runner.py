"""llama.cpp as compare.py drives it, one sequence after the other: python llama_cpp_runner.py MODEL.gguf [threads]

Install: pip install llama-cpp-python
"""

from __future__ import annotations

import sys
from itertools import islice

from llama_cpp import Llama
from protocol import serve

CONTEXT = 4096


def main() -> None:
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    llama = Llama(sys.argv[1], n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        return sum(
            len(list(islice(llama.generate(prompt, temp=0.0), length)))
            for prompt, length in zip(prompts, lengths, strict=True)
        )

    serve(answer, llama.reset)


if __name__ == "__main__":
    main()
