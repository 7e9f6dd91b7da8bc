"""Settings: what is described of them, how text and TOML become values, and which of the two wins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.config import read_config, resolve
from headrace.cli.settings import GROUPS, RUN, SERVE, Setting, all_settings, format_size, parse_size, parse_value
from headrace.core import InputError, SamplingParams
from headrace.options import EngineOptions, RunOptions, SamplingOptions

SETTINGS = {setting.name: setting for setting in all_settings()}


def test_every_field_is_a_setting_once_with_a_meaning() -> None:
    for groups in (RUN, SERVE):
        fields = [field.name for group in groups for field in dataclasses.fields(GROUPS[group])]
        names = [setting.name for setting in all_settings(groups)]
        assert fields == names and len(set(names)) == len(names), "a command has two settings of one name"
    for setting in all_settings(tuple(GROUPS)):
        assert setting.meaning.endswith("."), setting.name
        assert "\n" not in setting.meaning, setting.name


def test_options_are_frozen() -> None:
    for options in (EngineOptions(), SamplingOptions(), RunOptions()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            options.model = "other"  # type: ignore[union-attr]


def test_sampling_options_are_sampling_params() -> None:
    defaults = dataclasses.asdict(SamplingOptions())
    params = SamplingParams(**defaults)
    assert {name: getattr(params, name) for name in defaults} == defaults


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": {"50": -100}},
        {"logit_bias": {True: 1}},
        {"stop_token_ids": ("50",)},
        {"stop_token_ids": "50"},
        {"stop_token_ids": (-1,)},
    ],
)
def test_token_ids_are_whole_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="token id of logit_bias and stop_token_ids must be a whole number of at least 0"
    ):
        SamplingParams(**wrong)
    assert SamplingParams(logit_bias={50: -100}, stop_token_ids=[7]).stop_token_ids == (7,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("4GiB", 4 * 2**30),
        ("4 gib", 4 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("64kB", 64_000),
        ("2TiB", 2**41),
        ("2.01GB", 2_010_000_000),
        ("1.07GB", 1_070_000_000),
        ("0.0000001TB", 100_000),
        ("1.1GiB", 1_181_116_006),
        ("0.3KiB", 307),
        ("9007199254740993.0B", 2**53 + 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "4G", "GiB", "-1", "1.5", "0.1B", "four", "1e9", "4GiBs", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InputError, match=r"size|whole number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("max_tokens", "64", 64),
        ("max_tokens", 64, 64),
        ("temperature", "0.5", 0.5),
        ("temperature", 1, 1.0),
        ("precision", "bf16", "bf16"),
        ("kv_cache_bytes", "1GiB", 2**30),
        ("kv_cache_bytes", 4096, 4096),
        ("prefix_cache", False, False),
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("threads", "2", 2),
    ],
)
def test_values(name: str, value: object, result: object) -> None:
    parsed = parse_value(SETTINGS[name], value, "here")
    assert parsed == result
    assert type(parsed) is type(result)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", "many", "here: must be a whole number, got 'many'"),
        ("max_tokens", 1.5, "here: must be a whole number, got 1.5"),
        ("max_tokens", True, "here: must be a whole number, got True"),
        ("temperature", "warm", "here: must be a number, got 'warm'"),
        ("precision", "fp8", "here: must be one of auto, fp32, bf16, int8, int4, got 'fp8'"),
        ("prefix_cache", "yes", "here: must be true or false, got 'yes'"),
        ("prompt", 7, "here: must be text, got 7"),
        ("stop", [1], r"here: must be text or a list of texts, got \[1\]"),
        ("kv_cache_bytes", "4G", "here: '4G' is not a size"),
        ("kv_cache_bytes", True, "here: must be a size such as 4GiB, got True"),
    ],
)
def test_bad_values(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        parse_value(SETTINGS[name], value, "here")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threads", 1.5, "a whole number, got 1.5"),
        ("threads", True, "a whole number, got True"),
        ("prefix_cache", "no", "true or false, got 'no'"),
        ("kv_memory_share", "a", "a number, got 'a'"),
        ("kv", 4, "text, got 4"),
        ("seed", "x", "a whole number, got 'x'"),
    ],
)
def test_values_of_another_kind_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^{name} must be {message}$"):
        EngineOptions(**{name: value})  # type: ignore[arg-type]


def test_a_number_of_threads_has_bounds() -> None:
    assert EngineOptions(threads=1024).threads == 1024
    for threads in (0, 1025):
        with pytest.raises(InputError, match=f"^threads must be a number from 1 to 1,024, got {threads}$"):
            EngineOptions(threads=threads)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = write(tmp_path / "a.toml", 'max_tokens = 64\ntop_k = 5\nkv_cache_bytes = "1GiB"\nprefix_cache = false\n')
    engine, sampling, run = resolve({"max_tokens": "8", "stop": ["x", "y"]}, config)
    assert (sampling.max_tokens, sampling.top_k, sampling.stop) == (8, 5, ("x", "y"))
    assert (engine.kv_cache_bytes, engine.prefix_cache) == (2**30, False)
    assert run == RunOptions()
    assert resolve({}) == (EngineOptions(), SamplingOptions(), RunOptions())
    assert resolve({"prefix_cache": True}, config).engine.prefix_cache is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_token = 3", "unknown setting 'max_token'; did you mean 'max_tokens'?"),
        ("max-tokens = 3", "unknown setting 'max-tokens'; did you mean 'max_tokens'?"),
        ("colour = 3", "unknown setting 'colour'; --help lists the settings"),
        ("max_tokens = 'x'", "max_tokens: must be a whole number, got 'x'"),
        ("max_tokens = ", "not TOML"),
        ("[sampling]\nmax_tokens = 3", "unknown setting 'sampling'"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.toml", text)
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the settings: No such file"):
        read_config(tmp_path / "none.toml")


def test_default_text_is_read_back() -> None:
    def read_back(setting: Setting) -> object:
        return parse_value(setting, setting.default_text, setting.name)

    for setting in SETTINGS.values():
        if setting.kind != "flag" and setting.default_text:
            assert read_back(setting) == setting.default, setting.name
