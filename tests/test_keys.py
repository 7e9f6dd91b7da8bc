"""The server's keys: the file, the search, the command that makes one, and how much a key may take in a minute."""

from __future__ import annotations

import hmac
import logging
import os
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli.keys import key as key_command
from headrace.core import InputError
from headrace.server import keys as keys_module
from headrace.server.keys import Grant, Key, Keys, Quota, Refused, add_key, read_keys
from headrace.server.keys import hash_key as hash_token


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def entry(name: str, token: str, more: str = "") -> str:
    return f'[[keys]]\nname = "{name}"\nsha256 = "{hash_token(token)}"\n{more}\n'


def test_a_key_is_found_by_its_token_only(tmp_path: Path) -> None:
    text = entry("alice", "one", "requests_per_minute = 3\nconcurrency = 2") + entry("bob", "two").replace(
        hash_token("two"), hash_token("two").upper()
    )
    keys = read_keys(write(tmp_path / "keys.toml", text))
    assert keys.find("one") == Key("alice", requests_per_minute=3, concurrency=2)
    assert keys.find("two") == Key("bob")
    assert keys.find("three") is keys.find("") is keys.find("\udcff") is keys.find(hash_token("one")) is None


def test_every_entry_is_compared_whichever_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = read_keys(write(tmp_path / "keys.toml", "".join(entry(f"k{i}", f"token {i}") for i in range(50))))
    compared: list[str] = []

    def compare(known: str, found: str) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, found)

    monkeypatch.setattr(keys_module, "compare_digest", compare)
    for token, name in (("token 0", "k0"), ("token 49", "k49"), ("none", None)):
        compared.clear()
        found = keys.find(token)
        assert (found.name if found else None) == name
        assert compared == [hash_token(f"token {i}") for i in range(50)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[keys]\n", "not TOML: .*line 1"),
        ("key = 3\n", "'key' is not a list of "),
        ("keys = 3\n", "'keys' is not a list of "),
        (entry("a", "1") + "\n[[keys]]\nname = 'b'\n", "line 6: .*sha256"),
        (entry("a", "1") + entry("b c", "2"), r"line 5: .*`\$.name`"),
        (entry("a", "1", "concurrency = 0"), "line 1: .*concurrency"),
        (entry("a", "1", "tokens_per_minute = true"), "line 1: .*tokens_per_minute"),
        (entry("a", "1", "requests = 3"), "line 1: .*requests"),
        ('[[keys]]\nname = "a"\nsha256 = "hr-secret"\n', "line 1: .*sha256"),
        (f'keys = [{{name = "a", sha256 = "{"0" * 63}"}}]', "entry 1: .*sha256"),
        (entry("a", "1") + entry("a", "2"), "line 5: the name is that of line 1"),
        (entry("a", "1") + entry("b", "1"), "line 5: the sha256 is that of line 1"),
    ],
)
def test_a_wrong_file_says_where(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", text)
    with pytest.raises(InputError, match=f"^{path}.*{message}") as caught:
        read_keys(path)
    assert "hr-secret" not in str(caught.value)


def test_files_that_cannot_be_trusted_or_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(InputError, match=r"No such file.*headrace key NAME --file"):
        read_keys(path)
    with pytest.raises(InputError, match="Is a directory"):
        read_keys(tmp_path)
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(InputError, match="not UTF-8 text: invalid start byte in byte 8"):
        read_keys(path)
    write(path, entry("a", "1"))
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(InputError, match=r"others may write into it.*chmod go-w"):
            read_keys(path)
    path.chmod(0o644)
    assert read_keys(path).find("1") == Key("a")


def test_a_changed_file_counts_within_a_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module.LOG, "propagate", True)
    path, clock = write(tmp_path / "keys.toml", entry("a", "1")), Clock()
    keys = Keys(path, clock)
    write(path, entry("a", "1") + entry("b", "2"))
    assert keys.find("2") is None
    clock.now += 1
    assert keys.find("2") == Key("b")
    with caplog.at_level(logging.ERROR, "headrace.server"):
        for damage in ("[[keys", None):
            write(path, damage) if damage else path.unlink()
            for _ in range(3):
                clock.now += 1
                assert keys.find("2") == Key("b")
        path.write_text(entry("c", "3"))
        path.chmod(0o666)
        clock.now += 1
        assert keys.find("3") is None
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 3 and all("the keys that were read before stay valid" in each for each in said)
    # What was wrong with the file is put right without touching its contents.
    path.chmod(0o600)
    clock.now += 1
    assert keys.find("3") == Key("c") and keys.find("2") is None


def test_changed_limits_keep_what_was_taken(tmp_path: Path) -> None:
    path, clock = write(tmp_path / "keys.toml", entry("a", "1", "requests_per_minute = 5")), Clock()
    keys = Keys(path, clock)
    for _ in range(3):
        keys.quota(keys.find("1") or Key("")).admit(1)
        clock.now += 10
    write(path, entry("a", "1", "requests_per_minute = 2"))
    clock.now += 1
    with pytest.raises(Refused, match="had 3 requests in the last minute and may have 2") as refused:
        keys.quota(keys.find("1") or Key("")).admit(1)
    # Two of the three must have left: at 0, 10 and 20 seconds they came, and it is 31.
    assert refused.value.retry_after_seconds == 39


def test_a_new_key_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first = add_key(path, Key("alice", tokens_per_minute=100))
    assert path.stat().st_mode & 0o777 == 0o600
    assert first.startswith("hr-") and len(first) >= 40 and first not in path.read_text()
    before = path.read_text() + "# a note without a line's end"
    path.write_text(before)
    path.chmod(0o640)
    second = add_key(path, Key("bob"))
    assert path.read_text().startswith(before) and path.stat().st_mode & 0o777 == 0o640
    keys = read_keys(path)
    assert keys.find(first) == Key("alice", tokens_per_minute=100) and keys.find(second) == Key("bob")
    assert os.listdir(tmp_path) == ["keys.toml"]


def test_a_key_that_cannot_be_added_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, Key("alice"))
    before = path.read_bytes()
    with pytest.raises(InputError, match="the name is that of line 1"):
        add_key(path, Key("alice"))
    with pytest.raises(InputError, match="'a b': the name of a key is"):
        add_key(path, Key("a b"))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["keys.toml"]
    part = tmp_path / "keys.toml.part"
    part.touch()
    with pytest.raises(InputError, match="another `headrace key` is at work"):
        add_key(path, Key("bob"))
    assert part.exists() and path.read_bytes() == before


def test_the_command_prints_the_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, app = tmp_path / "keys.toml", typer.Typer()
    app.command()(key_command)
    app(["alice", "--file", str(path), "--requests-per-minute", "9", "--concurrency", "2"], standalone_mode=False)
    token = capsys.readouterr().out.strip()
    assert read_keys(path).find(token) == Key("alice", requests_per_minute=9, concurrency=2)
    with pytest.raises(InputError, match="cannot be written: No such file"):
        app(["bob", "--file", str(tmp_path / "none" / "keys.toml")], standalone_mode=False)


def test_a_key_without_limits_is_never_refused() -> None:
    quota = Quota(Key("a"), Clock())
    assert all(isinstance(quota.admit(10**9), Grant) for _ in range(1000))


def test_concurrency_is_given_back_once() -> None:
    quota = Quota(Key("a", concurrency=2), Clock())
    first, _ = quota.admit(1), quota.admit(1)
    with pytest.raises(Refused, match="2 requests of this key are running and it may have 2") as refused:
        quota.admit(1)
    assert refused.value.retry_after_seconds == 1
    first.settle(1)
    first.settle(1)
    quota.admit(1)
    with pytest.raises(Refused):
        quota.admit(1)


def test_tokens_are_charged_and_corrected() -> None:
    clock = Clock()
    quota = Quota(Key("a", tokens_per_minute=100), clock)
    with pytest.raises(Refused, match=r"can take 101 tokens .* 100 a minute: shorten") as refused:
        quota.admit(101)
    assert refused.value.retry_after_seconds is None
    first = quota.admit(90)
    clock.now += 10
    with pytest.raises(Refused, match="took 90 tokens in the last minute; with 20 more it passes its 100") as refused:
        quota.admit(20)
    assert refused.value.retry_after_seconds == 50
    first.settle(30)
    late = quota.admit(70)
    clock.now += 60
    late.settle(0)
    quota.admit(100)
    with pytest.raises(Refused):
        quota.admit(1)


def test_a_refused_request_is_told_when_to_come_again() -> None:
    clock = Clock()
    quota = Quota(Key("a", requests_per_minute=4, tokens_per_minute=100), clock)
    for tokens in (10, 40, 50):
        quota.admit(tokens)
        clock.now += 10
    # The first to leave frees too little, the second enough.
    for wait, passed in ((40, 39), (1, 1)):
        with pytest.raises(Refused) as refused:
            quota.admit(50)
        assert refused.value.retry_after_seconds == wait
        clock.now += passed
    quota.admit(50)


ACTIONS = st.lists(
    st.tuples(st.booleans(), st.sampled_from((0, 0, 1, 20, 30)), st.integers(0, 60)), min_size=8, max_size=60
)
LIMITS = st.one_of(st.none(), st.integers(1, 8))


@settings(max_examples=300)
@given(ACTIONS, LIMITS, st.one_of(st.none(), st.integers(1, 200)), LIMITS)
def test_no_minute_holds_more_than_a_key_may_take(
    actions: list[tuple[bool, int, int]], requests: int | None, tokens: int | None, concurrency: int | None
) -> None:
    clock = Clock()
    quota = Quota(Key("a", requests, tokens, concurrency), clock)
    admitted: list[list[float]] = []
    running: list[tuple[Grant, list[float]]] = []

    def fits(now: float, more: int) -> bool:
        window = [charge for granted, charge in admitted if now - 60 < granted <= now]
        return (requests is None or len(window) < requests) and (tokens is None or sum(window) + more <= tokens)

    for admits, seconds, amount in actions:
        clock.now += seconds
        if not admits and running:
            grant, record = running.pop(amount % len(running))
            record[1] = min(record[1], amount)
            grant.settle(int(record[1]))
        elif admits:
            may = fits(clock.now, amount) and (concurrency is None or len(running) < concurrency)
            try:
                grant = quota.admit(amount)
            except Refused as error:
                assert not may
                if len(running) == concurrency or error.retry_after_seconds is None:
                    continue
                least = next(wait for wait in range(1, 61) if fits(clock.now + wait, amount))
                assert error.retry_after_seconds == least
                continue
            assert may
            admitted.append([clock.now, amount])
            running.append((grant, admitted[-1]))
