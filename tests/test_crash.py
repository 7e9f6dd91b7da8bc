"""kill -9 at random instants of a real run: nothing finished is lost, nothing is computed twice, same bytes at last."""

from __future__ import annotations

import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import shared_data

KILLS = 25
ROWS = 48


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


def finished(target: Path) -> dict[int, bytes]:
    """Every finished row's record, as the journal has it."""
    path = Path(f"{target}.journal")
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as journal:
        try:
            return dict(journal.execute("SELECT row, record FROM rows").fetchall())
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}


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
    calm = tmp_path / "calm.jsonl"
    began = time.monotonic()
    subprocess.run(command(pile, calm, smollm2_path), check=True, timeout=300)
    whole = time.monotonic() - began
    source, kills, rounds = random.Random(1), 0, 0
    while kills < KILLS:
        rounds += 1
        target = tmp_path / f"killed-{rounds}.jsonl"
        known: dict[int, bytes] = {}
        for _ in range(200):
            process = subprocess.Popen(command(pile, target, smollm2_path))
            try:
                process.wait(timeout=source.uniform(0.3, whole * 0.7))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            now = finished(target)
            assert known.items() <= now.items(), "a finished row was lost or computed again"
            known = now
            if process.returncode == 0:
                break
        assert len(known) == ROWS
        assert without_times(target) == without_times(calm)
        assert target.with_name(f"killed-{rounds}.errors.jsonl").exists()


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(pile: Path, smollm2_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "stopped.jsonl"
    run = [part for part in command(pile, target, smollm2_path) if part != "--quiet"]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while len(finished(target)) < 8:
        time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be stopped"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    saved = finished(target)
    assert process.returncode == 130 and 8 <= len(saved) < ROWS
    assert "same command" in said and not target.exists()
    subprocess.run(run, check=True, timeout=300, capture_output=True)
    assert saved.items() <= finished(target).items() and len(finished(target)) == ROWS
