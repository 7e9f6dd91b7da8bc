"""kill -9 at random instants of a real run: nothing finished is lost, nothing is computed twice, same bytes at last."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import shared_data
from jobs import read_journal, read_lines, run_killed

ROWS = 72


def command(source: Path, target: Path, model: Path) -> list[str]:
    options = [
        "--model",
        str(model),
        "--precision",
        "fp32",
        "--kv-cache-bytes",
        "256MiB",
        "--max-sequences",
        "24",
        "--quiet",
    ]
    return [sys.executable, "-m", "headrace", "run", str(source), "-o", str(target), *options]


def without_times(path: Path) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', path.read_bytes())


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real texts as an OpenAI Batch file: chats and completions, some rows bad, some equal."""
    texts = [line for line in shared_data("wikitext2_test.txt").read_text().splitlines() if len(line) > 200][
        : ROWS - 10
    ]
    path = tmp_path_factory.mktemp("crash") / "pile.jsonl"
    source = random.Random(0)
    with path.open("w") as file:
        for index, text in enumerate([*texts, *texts[:10]]):
            body = {"model": "m", "max_tokens": source.randrange(1, 16), "temperature": 0}
            if index % 2:
                row = {"url": "/v1/completions", "body": body | {"prompt": text[:160]}}
            else:
                messages = [{"role": "user", "content": "Summarise: " + text[:160]}]
                row = {"url": "/v1/chat/completions", "body": body | {"messages": messages}}
            if index % 30 == 7:
                row["body"]["temperature"] = -1
            file.write(json.dumps({"custom_id": f"row-{index}", "method": "POST"} | row) + "\n")
    return path


def test_killed_at_25_random_instants_and_continued(pile: Path, smollm2_path: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm.jsonl", tmp_path / "killed.jsonl"
    subprocess.run(command(pile, calm, smollm2_path), check=True, timeout=300)
    assert run_killed(smollm2_path, pile, killed, 25, 256 << 20) == ROWS
    assert without_times(killed) == without_times(calm)
    assert read_lines(tmp_path / "killed.errors.jsonl") == read_lines(tmp_path / "calm.errors.jsonl")


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(pile: Path, smollm2_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "stopped.jsonl"
    run = [part for part in command(pile, target, smollm2_path) if part != "--quiet"]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while len(read_journal(target)) < 8:
        time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be stopped"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    saved = read_journal(target)
    assert process.returncode == 130 and 8 <= len(saved) < ROWS
    assert "same command" in said and not target.exists()
    subprocess.run(run, check=True, timeout=300, capture_output=True)
    assert saved.items() <= read_journal(target).items() and len(read_journal(target)) == ROWS
