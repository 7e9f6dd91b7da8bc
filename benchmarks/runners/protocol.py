"""How compare.py speaks with a runner: a line of JSON in for each pile, a line out. Plain Python: peers' environments
have nothing of ours.

In:   {"rows": [[token ids, output tokens], ...]}
Out:  {"ready": seconds since the process began}, once; {"seconds": ..., "output_tokens": ..., "peak_rss_bytes": ...}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def serve(answer: Callable[[list[list[int]], list[int]], int], renew: Callable[[], object] | None = None) -> None:
    """Answer piles until the input ends. `renew` empties the prefix cache, outside the time that counts."""
    # What engines print must not come between the lines.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer([[100, 101, 102]], [2])
    print(json.dumps({"ready": time.time() - float(os.environ["COMPARE_BEGAN"])}), file=lines, flush=True)
    for line in sys.stdin:
        rows = json.loads(line)["rows"]
        if renew is not None:
            renew()
        began = time.perf_counter()
        tokens = answer([row[0] for row in rows], [row[1] for row in rows])
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "output_tokens": tokens, "peak_rss_bytes": peak}), file=lines, flush=True)
