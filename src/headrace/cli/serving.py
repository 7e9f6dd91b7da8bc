"""`headrace serve`."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

from headrace.cli.config import fill, read_config
from headrace.cli.flags import make_parameter
from headrace.cli.settings import SERVE, all_settings

# Where a request says nothing: as OpenAI's API has it, not as rows of a job.
DEFAULTS = {"temperature": 1.0, "schedule": "interactive"}
# As help shows it: max_tokens is what the context leaves.
SHOWN = DEFAULTS | {"max_tokens": None}
FLAGS = [
    make_parameter(dataclasses.replace(each, default=SHOWN.get(each.name, each.default)))
    for each in all_settings(SERVE)
]


def serve(config: Path | None, **flags: object) -> None:
    """Answer OpenAI's and Anthropic's APIs over HTTP, batches included, with a page that shows how busy it is.

    It listens on this machine only, unless --host says otherwise. Where a request says nothing, answers are drawn as
    the model's generation_config.json advises, else with temperature 1, and may be as long as the context allows.
    Batches run while nothing else does, and get a tenth of the time under clients who never pause (--batch-share).

    \b
    Examples:
      headrace serve
      headrace serve --model ./Qwen3-0.6B --precision int8 --itl-target 0.1
      headrace key alice && headrace serve --host 0.0.0.0 --api-key-file keys.toml
    """
    given = {name: value for name, value in flags.items() if value is not None}
    chosen = frozenset(given) | frozenset(read_config(config, SERVE) if config else ())
    engine, sampling, options = fill(SERVE, given, config, DEFAULTS)
    from headrace.server.serve import serve as answer

    gc.freeze()
    answer(engine, sampling, options, chosen)
