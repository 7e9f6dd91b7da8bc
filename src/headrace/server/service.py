"""What all routes share: settings, models, counts. Knows no route."""

from __future__ import annotations

import logging
import secrets
from functools import lru_cache
from pathlib import Path

from anyio import CapacityLimiter
from platformdirs import user_data_path

from headrace import __version__
from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.advice import FILE, read_advice
from headrace.core import InputError, SamplingParams
from headrace.job.intake import name_system
from headrace.llm import LLM
from headrace.options import SamplingOptions, ServeOptions
from headrace.server.batch_run import BatchSettings
from headrace.server.batches import Batches
from headrace.server.errors import ApiError
from headrace.server.keys import Keys
from headrace.server.metrics import Metrics
from headrace.server.models import Models
from headrace.server.observer import Observer
from headrace.server.stats import Stats, Tally
from headrace.server.store import Store
from headrace.server.tracing import open_tracer
from headrace.server.worker import Worker

LOG = logging.getLogger("headrace.server")


class Service:
    """See the module. Belongs to the event loop."""

    def __init__(
        self,
        options: ServeOptions,
        sampling: SamplingOptions,
        models: Models,
        keys: Keys | None = None,
        chosen: frozenset[str] = frozenset(),
    ) -> None:
        """`chosen` are the settings of sampling that the user gave.

        Raises InputError where the folder for files and batches cannot be used, or an extra is missing.
        """
        self.options = options
        self.sampling = sampling
        self.chosen = chosen
        self.models = models
        self.keys = keys
        self.tally = Tally()
        self.stats = Stats(models, self.tally)
        settings = BatchSettings(self.defaults, options.unknown_fields, options.share_prefixes)
        self.batches = Batches(Store(find_folder(options)), models, settings)
        self.metrics = Metrics(self.stats.snapshots, self.batches.count)
        tracer = open_tracer(options.otel_endpoint)
        self.observer = Observer(self.metrics, tracer, self.tally, options.log_content)
        # Of threads that compile large grammars.
        self.compiling = CapacityLimiter(2)
        self.draining = False

    def defaults(self, llm: LLM) -> SamplingParams:
        """What a request that says nothing asks for: what the user chose, else what the model's makers advise; and an
        answer may be as long as the context allows."""
        others = {"max_tokens": llm.context_length} | find_advice(llm)
        others = {name: value for name, value in others.items() if name not in self.chosen}
        return SamplingParams(**(vars(self.sampling) | others))

    def admit(self, worker: Worker, answers: int) -> None:
        """Raises ApiError: 429 where so many more answers would make the queue too long, 503 while closing."""
        if self.draining:
            raise ApiError(503, "closing", "the server is closing down", headers={"Retry-After": "10"})
        over = worker.held + answers - worker.options.max_sequences - self.options.max_queue
        if over > 0:
            self.tally.refused += 1
            wait = self.tally.seconds_for(over)
            message = f"{worker.held} answers wait or are written here, and no more fit: come back in {wait} s"
            raise ApiError(429, "queue_full", message, headers={"Retry-After": str(wait)})


@lru_cache(maxsize=16)
def name_fingerprint(llm: LLM) -> str:
    """OpenAI's system_fingerprint, as `headrace run` writes it."""
    facts = {
        name: llm.resolved[name] or None for name in ("precision", "weights", "kernels", "device", "kv", "block_size")
    }
    return name_system({**facts, "model": llm.model_hash, "version of headrace": __version__})


@lru_cache(maxsize=16)
def find_advice(llm: LLM) -> dict[str, float]:
    """How the model's makers would have it sampled, as far as that can be done."""
    path = open_checkpoint(llm.options.model).path
    advice = read_advice(path)
    try:
        SamplingParams(**advice)  # type: ignore[arg-type]
    except ValueError as error:
        LOG.warning("%s advises what cannot be done, and is left out: %s", path / FILE, error)
        return {}
    return advice


def find_folder(options: ServeOptions) -> Path:
    """Where files and batches lie. Raises InputError where that cannot be."""
    folder = Path(options.data) if options.data is not None else user_data_path("headrace", appauthor=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}; choose another --data FOLDER") from None
    return folder


def make_id(prefix: str) -> str:
    """A new id such as chatcmpl-9f0c..., which nobody can guess."""
    return f"{prefix}{secrets.token_hex(12)}"
