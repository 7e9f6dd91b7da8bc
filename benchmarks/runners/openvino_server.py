"""OpenVINO GenAI's continuous batching behind a plain HTTP front, as serving.py asks it: GenAI brings no server.

    python openvino_server.py EXPORTED_FOLDER PORT

Install: as openvino_runner.py says. Streams of /v1/completions for token ids only, without their text, so the front
does less than a real one. A thread steps the engine; each request has a thread that waits for its tokens.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue

import numpy as np
import openvino
import openvino_genai as genai


class Engine:
    """Steps while there are requests, and tells each how many tokens it has gained."""

    def __init__(self, folder: str) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = 4, True
        # Its default of tokens a step: more of them would hold up the answers beside a prefill.
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 256, 128
        self.pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self.names = itertools.count()
        self.running: list[tuple[genai.GenerationHandle, SimpleQueue[int]]] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: list[int], length: int) -> SimpleQueue[int]:
        """A queue of how many tokens each step brought; 0 is the end."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
        tokens: SimpleQueue[int] = SimpleQueue()
        with self.changed:
            tensor = openvino.Tensor(np.array([prompt], dtype=np.int64))
            self.running.append((self.pipe.add_request(next(self.names), tensor, config), tokens))
            self.changed.notify()
        return tokens

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.running)
            self.pipe.step()
            with self.changed:
                self.running = [each for each in self.running if self._tell(*each)]

    def _tell(self, handle: genai.GenerationHandle, tokens: SimpleQueue[int]) -> bool:
        """Whether the request goes on."""
        goes_on = handle.get_status() == genai.GenerationStatus.RUNNING
        while handle.can_read():
            tokens.put(sum(len(each.generated_ids) for each in handle.read().values()))
        if not goes_on:
            tokens.put(0)
        return goes_on


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self) -> None:
        found = self.path in ("/health", "/v1/models")
        self._begin("application/json", 200 if found else 404)
        self.wfile.write(json.dumps({"object": "list", "data": [{"id": "openvino"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens, count = self.engine.submit(body["prompt"], body["max_tokens"]), 0
        self._begin("text/event-stream")
        while new := tokens.get():
            count += new
            self._send({"choices": [{"index": 0, "text": ""}]})
        self._send({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _send(self, event: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *values: object) -> None:
        """Nothing: a line a request would take time."""


class Front(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


def main() -> None:
    folder, port = sys.argv[1:]
    Handler.engine = Engine(folder)
    Front(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
