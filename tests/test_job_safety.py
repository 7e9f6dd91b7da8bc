"""What may happen to a job: SIGKILL, Ctrl-C, a full disk, a read-only folder, a second run on the same output."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import batch_rows, read_journal, read_lines, run, run_killed, without_times, write_lines

from headrace.core import InputError
from headrace.job.stop import JobStopped, StopSignals, explain_disk_errors, lock_output, take_lock

HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-c", "import sys; from headrace.cli import main; sys.exit(main())"]


def command(model: Path, source: Path, output: Path, *flags: str) -> list[str]:
    fixed = ["--precision", "fp32", "--block-size", "16", "--kv-cache-bytes", "4MiB", "--threads", "1"]
    fixed += ["--max-sequences", "8", "--max-tokens", "24"]
    return [*PROGRAM, "run", str(source), "-o", str(output), "--model", str(model), *fixed, *flags]


def wait_for_rows(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if len(read_journal(output)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"the job ended too early: {process.communicate()}")


@pytest.mark.parametrize("kills", [25])
def test_killed_at_random_instants_the_result_is_that_of_an_undisturbed_run(
    kills: int, tiny_model: Path, tmp_path: Path
) -> None:
    rows = batch_rows(240) + batch_rows(5)
    rows += [{**row, "custom_id": f"warm-{row['custom_id']}"} for row in batch_rows(120, temperature=0.8, n=2)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    calm, killed = tmp_path / "calm.jsonl", tmp_path / "killed.jsonl"
    report = run(tiny_model, source, calm, {"max_tokens": 24})
    assert run_killed(tiny_model, source, killed, kills, 4 << 20) == 365
    assert without_times(killed) == without_times(calm)
    assert read_lines(tmp_path / "killed.errors.jsonl") == read_lines(tmp_path / "calm.errors.jsonl")
    last = json.loads(Path(f"{killed}.report.json").read_text())
    assert last["job"] == report["job"] and last["requests"] + last["rows_resumed"] == 365


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(number: int, tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(600)), tmp_path / "out.jsonl"
    with subprocess.Popen(command(tiny_model, source, output), stderr=subprocess.PIPE, text=True) as process:
        wait_for_rows(output, 1, process)
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read()
    rows = len(read_journal(output))
    assert process.returncode == 130 and 0 < rows < 600
    assert "finishing this step and saving; press Ctrl-C again to stop at once" in said
    last = said.splitlines()[-1]
    assert last.startswith(f"headrace: error: interrupted: {rows:,} of 600 rows are saved in {output}.journal")
    assert last.endswith("run the same command again to go on") and "Traceback" not in said
    assert not output.exists() and not Path(f"{output}.lock").exists()
    report = run(tiny_model, source, output, {"max_tokens": 24})
    assert report["rows_resumed"] == rows and report["requests"] == 600 - rows


def test_a_second_interrupt_stops_at_once() -> None:
    code = (
        "import os, signal, time\nfrom headrace.job.stop import StopSignals\n"
        "with StopSignals() as stop:\n os.kill(os.getpid(), signal.SIGINT)\n print(stop.requested, flush=True)\n"
        " os.kill(os.getpid(), signal.SIGINT)\n time.sleep(9)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "True\n")


def test_signals_are_given_back_and_left_alone_in_threads() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    seen: list[object] = []

    def enter() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_two_runs_on_one_output_the_second_refuses(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(600)), tmp_path / "out.jsonl"
    with subprocess.Popen(command(tiny_model, source, output), stderr=subprocess.PIPE, text=True) as process:
        wait_for_rows(output, 1, process)
        with pytest.raises(
            InputError, match=rf"another run \(process {process.pid}\) is writing {output}: wait for it"
        ):
            run(tiny_model, source, output, {"max_tokens": 24}, fresh=True)
        process.kill()
    # A lock dies with its process, whatever happened to it.
    assert len(read_journal(output)) > 0 and Path(f"{output}.lock").exists()
    report = run(tiny_model, source, output, {"max_tokens": 24})
    assert report["rows_resumed"] > 0 and len(read_lines(output)) == 600


def test_an_interrupt_that_takes_the_reader_with_it_is_one(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(600)), tmp_path / "out.jsonl"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(tiny_model, source, output), text=True, **streams) as process:
        wait_for_rows(output, 1, process)
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
    rows = len(read_journal(output))
    assert process.returncode == 130 and 0 < rows < 600
    assert run(tiny_model, source, output, {"max_tokens": 24})["rows_resumed"] == rows


def test_a_job_goes_on_when_nobody_reads_what_it_says(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(3, audio={})), tmp_path / "out.jsonl"
    words = [*command(tiny_model, source, output), "--unknown-fields", "warn"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        process.stderr.close()
        assert "3 done, 3 succeeded" in process.stdout.read()
    assert process.returncode == 0 and len(read_lines(output)) == 3


def test_a_locked_journal_and_another_disk_have_words_of_their_own(tmp_path: Path) -> None:
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    holder = sqlite3.connect(journal, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with (
        pytest.raises(JobStopped, match=f"another program holds {journal}: database is locked.* end that program"),
        explain_disk_errors(output),
    ):
        sqlite3.connect(journal, timeout=0).execute("BEGIN IMMEDIATE")
    holder.close()
    with (
        pytest.raises(JobStopped, match=r"cannot read or write else/where.json: no space left on device. .* make room"),
        explain_disk_errors(output),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "else/where.json")


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with lock_output(output), pytest.raises(InputError, match=f"process {os.getpid()}"):
        take_lock(tmp_path / "out.lock", output)
    assert not (tmp_path / "out.lock").exists()
    with lock_output(output):
        assert (tmp_path / "out.lock").read_text() == f"{os.getpid()}\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 384 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=384k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_what_is_finished(small_disk: Path, tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(700, logprobs=True, top_logprobs=5))
    output = small_disk / "out.jsonl"
    with pytest.raises(JobStopped) as stopped:
        run(tiny_model, source, output)
    message = str(stopped.value)
    assert stopped.value.exit_code == 3 and "\n" not in message
    assert message.startswith(f"cannot write beside {output}: ") and "run the same command again" in message
    saved = len(read_journal(output))
    assert 0 < saved < 700 and not output.exists()
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    report = run(tiny_model, source, output)
    assert report["rows_resumed"] == saved and report["requests"] == 700 - saved
    run(tiny_model, source, tmp_path / "roomy.jsonl")
    assert without_times(output) == without_times(tmp_path / "roomy.jsonl")


def test_a_disk_full_at_the_end_leaves_the_old_output(small_disk: Path, tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(150, logprobs=True)), small_disk / "out.jsonl"
    with pytest.raises(JobStopped, match="no space left on device"):
        run(tiny_model, source, output)
    assert len(read_journal(output)) == 150 and [path.name for path in small_disk.glob("*.part")] == []
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert run(tiny_model, source, output)["rows_resumed"] == 150 and len(read_lines(output)) == 150


def test_a_file_size_limit_ends_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(700)), tmp_path / "out.jsonl"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    words = command(tiny_model, source, output, "--quiet")
    result = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 3 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"headrace: error: cannot write beside {output}: ")
    saved = len(read_journal(output))
    assert saved > 0
    assert run(tiny_model, source, output, {"max_tokens": 24})["rows_resumed"] == saved


def test_a_read_only_folder_is_said_at_once(small_disk: Path, tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(2))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        JobStopped, match=f"cannot read or write {small_disk}/out.jsonl.lock: read-only file system"
    ) as stopped:
        run(tiny_model, source, small_disk / "out.jsonl")
    assert stopped.value.exit_code == 3


def test_a_folder_without_the_right_to_write_is_said_at_once(tiny_model: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    source = write_lines(tmp_path / "in.jsonl", batch_rows(2))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(JobStopped, match="permission denied"):
        run(tiny_model, source, closed / "out.jsonl")


def test_an_input_that_changes_under_the_job_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(600)), tmp_path / "out.jsonl"
    with subprocess.Popen(command(tiny_model, source, output), stderr=subprocess.PIPE, text=True) as process:
        wait_for_rows(output, 1, process)
        with source.open("r+b") as file:
            file.truncate(60_000)
        said = process.communicate()[1]
    assert process.returncode == 2 and not output.exists()
    assert said.splitlines()[-1].startswith(f"headrace: error: {source} changed while the job ran")
