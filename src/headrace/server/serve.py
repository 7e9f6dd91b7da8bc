"""`serve`: load the model, listen, answer until a signal comes, then finish what has begun."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from headrace.core import InputError
from headrace.options import EngineOptions, SamplingOptions, ServeOptions
from headrace.server.access_log import configure_logging
from headrace.server.app import build_app, make_address
from headrace.server.connections import limit_heads
from headrace.server.keys import read_keys
from headrace.server.limits import is_loopback
from headrace.server.models import Models
from headrace.server.service import Service

LOG = logging.getLogger("headrace.server")
# Seconds that requests have to end in after a signal.
DRAIN_SECONDS = 30
# Between two kernels the engine's thread takes the interpreter's lock again, hundreds of times a step. With Python's
# own 5 ms another thread that is busy makes a token of 7 ms take 2 s; with this, 20 ms (docs/log.md).
SWITCH_SECONDS = 5e-5
KEEP_ALIVE_SECONDS = 75
MOST_HEADER_BYTES = 64 * 1024
MOST_CONNECTIONS = 4096


def serve(
    engine: EngineOptions, sampling: SamplingOptions, options: ServeOptions, chosen: frozenset[str] = frozenset()
) -> None:
    """Answer until SIGTERM or Ctrl-C. `chosen` are the settings of sampling that the user gave.

    Raises InputError or ModelError for what keeps it from starting.
    """
    configure_logging(options.log_json)
    sys.setswitchinterval(SWITCH_SECONDS)
    with open_socket(options) as listener:
        asyncio.run(answer_all(engine, sampling, options, chosen, listener))


async def answer_all(
    engine: EngineOptions,
    sampling: SamplingOptions,
    options: ServeOptions,
    chosen: frozenset[str],
    listener: socket.socket,
) -> None:
    keys = None if options.api_key_file is None else read_keys(Path(options.api_key_file))
    if keys is None and not is_loopback(options.host):
        LOG.warning("anyone who reaches %s may use this server: --api-key-file asks for keys", options.host)
    models = Models(engine, options)
    service = Service(options, sampling, models, keys, chosen)
    models.start()
    try:
        await asyncio.wrap_future(models.workers[models.first].ready)
    except BaseException:
        await models.close()
        raise
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        http=limit_heads(options.body_timeout),
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        limit_concurrency=MOST_CONNECTIONS,
    )
    await Server(config, service).serve([listener])


class Server(uvicorn.Server):
    """uvicorn's server; a signal lets what has begun end, and takes nothing new. The second signal ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        address = make_address(self._service.options, sockets[0].getsockname()[1] if sockets else 0)
        first = self._service.models.first
        print(f"headrace: {first} answers at {address} (a page there, the API under /v1); Ctrl-C ends", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for each in signals:
            loop.add_signal_handler(each, self._drain, each)
        try:
            yield
        finally:
            for each in signals:
                loop.remove_signal_handler(each)

    def _drain(self, number: int) -> None:
        self._service.draining = True
        self.handle_exit(number, None)


def open_socket(options: ServeOptions) -> socket.socket:
    """The socket to listen on. Raises InputError where it cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # asyncio sends small answers at once only on sockets that name TCP; others wait 40 ms for the client's receipt.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"cannot listen on {options.host} port {options.port}: {error}; choose another --port"
        ) from None
    return listener
