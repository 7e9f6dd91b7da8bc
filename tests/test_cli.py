"""The command line: help, mistyped flags, exit codes, and how soon it answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace import __version__
from headrace.cli import main
from headrace.cli.settings import all_settings

PROGRAM = [sys.executable, "-c", "import sys; from headrace.cli import main; sys.exit(main())"]
HEAVY = ("torch", "numpy", "pyarrow", "tokenizers", "rich", "llguidance")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from headrace.cli import main; main({arguments}); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("--max-tokens" in result.stdout) == ("run" in arguments)
    assert not set(HEAVY) & set(result.stderr.split())


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    missing = [setting.flag for setting in all_settings() if f"{setting.flag} " not in text]
    assert not missing
    assert "Examples:\n    headrace run " in text
    assert all(f"\n{group}:\n" in text for group in ("Model", "Sampling", "Run"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"headrace {__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["--help"], ["-h"], ["pull", "--help"], ["models", "--help"], ["bench"], ["eval"]]
)
def test_help_of_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("Usage: headrace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "missing argument 'INPUT'"),
        (["run", "in.jsonl", "--max-token", "3"], "no such flag: --max-token; did you mean --max-tokens?"),
        (["run", "in.jsonl", "--zzzz"], "no such flag: --zzzz; --help lists them"),
        (["run", "in.jsonl", "--max-tokens", "x"], "--max-tokens: must be a whole number, got 'x'"),
        (
            ["run", "in.jsonl", "--precision", "fp8"],
            "--precision: must be one of auto, fp32, bf16, int8, int4, got 'fp8'",
        ),
        (["run", "in.jsonl", "--kv-cache-bytes", "4G"], "--kv-cache-bytes: '4G' is not a size"),
        (["run", "in.jsonl", "--kv-cache-bytes"], "option '--kv-cache-bytes' requires an argument"),
        (["run", "in.jsonl", "--config", "none.toml"], "none.toml: cannot read the settings"),
        (["run", "-"], "say where the answers go with -o OUTPUT"),
        (["plan", "-"], "a plan reads its rows from a file: name one instead of -"),
        (["run", "in.csv", "--regex", "(unclosed"], "the regex constraint cannot be used: at 1(8): invalid regex"),
        (["plan", "in.csv", "--regex", "a{2,1}"], "the regex constraint cannot be used: at 1(8): invalid regex"),
        (["rum"], "no such command 'rum'. Did you mean 'run'?"),
        (["models", "extra"], "got unexpected extra argument(s) (extra)"),
    ],
)
def test_typing_errors_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"headrace: error: {message}")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_input_is_an_input_error(tmp_path: Path) -> None:
    command = [*PROGRAM, "run", "none.jsonl", "-o", "out.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("headrace: error: ")
    assert "none.jsonl" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_model_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\nhello\n")
    command = [*PROGRAM, "run", "in.csv", "--prompt", "{{ text }}", "-o", "out.csv", "--model", "./no-such-model"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "no-such-model" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_unknown_name_to_pull_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "no-such-model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("headrace: error: ")
    assert "no-such-model" in error


def test_reader_that_goes_away_is_quiet() -> None:
    with subprocess.Popen([*PROGRAM, "run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("debug", [False, True])
def test_unexpected_error_is_short_without_debug(debug: bool, tmp_path: Path) -> None:
    """Any exception that is not one of Headrace's own ends as one line; --debug adds the traceback."""
    code = (
        "import sys; from headrace.cli import commands, main\n"
        "@commands.app.command()\n"
        "def fail() -> None:\n    raise RuntimeError('by design')\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *(["--debug"] if debug else []), "fail"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("headrace: error: unexpected RuntimeError: by design")
    assert ("Traceback" in result.stderr) is debug


def test_interrupt_exits_with_130() -> None:
    code = (
        "import sys; from headrace.cli import commands, main\n"
        "@commands.app.command()\n"
        "def stop() -> None:\n    raise KeyboardInterrupt\n"
        "sys.exit(main())"
    )
    result = subprocess.run([sys.executable, "-c", code, "stop"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "")
