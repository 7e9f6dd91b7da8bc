"""Compile a grammar in a process of its own first: a hostile one crashes that process, or is stopped with it.

llguidance bounds its automata, but neither the depth of its recursion nor its time. Knows no tokens and no requests.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import threading

from llguidance import LLMatcher, LLTokenizer

SECONDS = 5.0
# Half of what the threads here have: what fits into it has room to spare.
STACK_BYTES = 4 * 2**20
MEMORY_BYTES = 4 * 2**30
# One at a time: trials of hostile grammars must not take all cores.
TURN = threading.Lock()


def try_grammar(grammar: str) -> str | None:
    """Why an llguidance grammar must not be compiled here, or None. What is merely wrong with it is not found here."""
    command = [sys.executable, "-P", __file__]
    with TURN:
        try:
            done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"it takes longer than {SECONDS:g} s to prepare; make it smaller"
    # Below 0 it is the signal that ended the process.
    return "it is too deep or too large; make it smaller" if done.returncode < 0 else None


def compile_input() -> None:
    """Compile the grammar that stands in standard input, and find what may come first."""
    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=compile_input)
    thread.start()
    thread.join()
