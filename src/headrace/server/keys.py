"""Who may use the server: a TOML file of key hashes and limits. Knows nothing of HTTP.

The file holds no key itself: a key has 256 random bits, so that a plain hash of it is safe.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import time
import tomllib
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from headrace.core import InputError
from headrace.server.quotas import Clock, Grant, Key, Quota, Refused

__all__ = ["Grant", "Key", "Keys", "Quota", "Refused", "add_key", "read_keys"]

LOG = logging.getLogger("headrace.server")
RECHECK_SECONDS = 1.0
PREFIX = "hr-"
NAME = r"\A[A-Za-z0-9._-]{1,64}\Z"
HEADER = re.compile(r"\s*\[\[\s*keys\s*\]\]")
HOW = "every [[keys]] needs a name and a sha256, as `headrace key NAME` writes them"

Limit = Annotated[int, msgspec.Meta(ge=1)]
Status = tuple[int, ...]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One [[keys]] of the file."""

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Fa-f]{64}\Z")]
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrency: Limit | None = None

    def key(self) -> Key:
        return Key(self.name, self.requests_per_minute, self.tokens_per_minute, self.concurrency)


class KnownKey(NamedTuple):
    """A key and its hash: 64 hexadecimal digits in lower case."""

    digest: str
    key: Key


class Keys:
    """The keys of a file, which is looked at again once a second at most, and their quotas. One thread owns it.

    A changed file that is wrong changes nothing and is logged: a slip of the pen must not lock everyone out.
    """

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        """Raises InputError, saying what is wrong with the file and where."""
        self.path = path
        text, status = read_file(path)
        self._known = parse_keys(text, path)
        self._status: Status | None = status
        self._quotas: dict[str, Quota] = {}
        self._clock = clock
        self._looked = clock()

    def find(self, token: str) -> Key | None:
        """Whose key this is, or None. Takes equally long whichever it is."""
        self._refresh()
        given, found = hash_key(token), None
        for known in self._known:
            if compare_digest(known.digest, given):
                found = known.key
        return found

    def quota(self, key: Key) -> Quota:
        """The quota of a key that `find` gave. What was taken stays counted when the file changes its limits."""
        quota = self._quotas.setdefault(key.name, Quota(key, self._clock))
        quota.key = key
        return quota

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < RECHECK_SECONDS:
            return
        self._looked = now
        status = find_status(self.path)
        if status == self._status:
            return
        self._status = status
        try:
            text, self._status = read_file(self.path)
            self._known = parse_keys(text, self.path)
        except InputError as error:
            LOG.error("%s; the keys that were read before stay valid", error)
            return
        LOG.info("%s: has changed; %d keys are valid now", self.path, len(self._known))


def read_keys(path: Path, clock: Clock = time.monotonic) -> Keys:
    """The keys of a TOML file. Raises InputError, saying what is wrong, where, and what to do."""
    return Keys(path, clock)


def hash_key(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def describe_status(status: os.stat_result) -> Status:
    """What makes it the same file with the same contents as when it was read."""
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


def find_status(path: Path) -> Status | None:
    try:
        return describe_status(path.stat())
    except OSError:
        return None


def read_file(path: Path) -> tuple[str, Status]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        make = f"`headrace key NAME --file {path}` makes a key and the file"
        raise InputError(f"{path}: cannot read the keys: {error.strerror}; {make}") from None
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"{path}: others may write into it, and so add keys: `chmod go-w {path}` forbids it")
    try:
        return data.decode(), describe_status(status)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} in byte {error.start}; {HOW}") from None


def parse_keys(text: str, path: Path) -> list[KnownKey]:
    """The keys of a file's text; `path` is for the errors only. Raises InputError."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}; {HOW}") from None
    entries = tables.pop("keys", [])
    if tables or not isinstance(entries, list):
        raise InputError(f"{path}: {next(iter(tables), 'keys')!r} is not a list of [[keys]]; {HOW}")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if HEADER.match(line)]
    known: list[KnownKey] = []
    places: dict[tuple[str, str], str] = {}
    for index, value in enumerate(entries):
        # TOML's reader tells no lines; the headers do, unless the entries were written as an inline list.
        place = f"line {lines[index]}" if len(lines) == len(entries) else f"entry {index + 1}"
        try:
            entry = msgspec.convert(value, Entry)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}, {place}: {error}; {HOW}") from None
        for which in (("name", entry.name), ("sha256", entry.sha256.lower())):
            if which in places:
                raise InputError(f"{path}, {place}: the {which[0]} is that of {places[which]}; give each key its own")
            places[which] = place
        known.append(KnownKey(entry.sha256.lower(), entry.key()))
    return known


def add_key(path: Path, key: Key) -> str:
    """Make a random key and append its entry to the file, which is made where there is none; returns the key itself.

    The file is replaced whole, keeps its other contents, and lets only its owner in when it is new.
    Raises InputError for a name or a file that is wrong, and OSError.
    """
    if re.match(NAME, key.name) is None:
        raise InputError(f"{key.name!r}: the name of a key is 1 to 64 letters, digits, dots, dashes and underscores")
    path = path.resolve()
    token = PREFIX + secrets.token_urlsafe(32)
    part = path.with_name(f"{path.name}.part")
    try:
        # It must be new, so that two commands at once do not lose each other's key.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{part}: another `headrace key` is at work; if none is, remove this file") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(append_entry(path, key, hash_key(token)))
            file.flush()
            os.fsync(descriptor)
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink()
        raise
    return token


def append_entry(path: Path, key: Key, digest: str) -> str:
    """The file's text with one more entry. Raises InputError where that is no right key file."""
    text = read_file(path)[0] + "\n" if path.exists() else ""
    text += format_entry(key, digest)
    parse_keys(text, path)
    return text


def format_entry(key: Key, digest: str) -> str:
    limits = {name: value for name, value in msgspec.structs.asdict(key).items() if name != "name"}
    lines = ["[[keys]]", f'name = "{key.name}"', f'sha256 = "{digest}"']
    return "\n".join([*lines, *(f"{name} = {value}" for name, value in limits.items() if value is not None), ""])
