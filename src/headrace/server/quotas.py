"""How much a key may take: requests and tokens in a minute, requests at a time. Knows no file and no HTTP."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate

import msgspec

from headrace.core import HeadraceError

WINDOW_SECONDS = 60.0
BUSY_SECONDS = 1.0

Clock = Callable[[], float]


class Refused(HeadraceError):
    """A key has used up what it may; `retry_after_seconds` is None where waiting does not help."""

    def __init__(self, message: str, retry_after_seconds: float | None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Key(msgspec.Struct, frozen=True):
    """Someone who may use the server, and how much: a limit that is None does not exist."""

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class Grant:
    """One request that a quota admitted: `tokens` are charged for it, until they leave the window."""

    def __init__(self, quota: Quota, tokens: int, granted: float) -> None:
        self.tokens = tokens
        self.granted = granted
        self._quota = quota
        self._running = True

    def settle(self, tokens: int) -> None:
        """The request has ended and took so many tokens. Only the first call does something."""
        if self._running:
            self._running = False
            self._quota.settle(self, tokens)


class Quota:
    """What one key took in the last minute, and has running. `key` is replaced when the file says other limits.

    Counted over a sliding minute, so that no 60 seconds hold more than a key may take. One thread owns it.
    """

    def __init__(self, key: Key, clock: Clock = time.monotonic) -> None:
        self.key = key
        self._clock = clock
        self._grants: deque[Grant] = deque()
        self._tokens = 0
        self._running = 0

    def admit(self, tokens_expected: int) -> Grant:
        """Charge a request with the most it can take, prompt and max_tokens. Whoever gets the grant must settle it.

        Raises Refused.
        """
        now = self._clock()
        self._forget(now)
        self._check_possible(tokens_expected)
        waits = [*self._wait_for_requests(now), *self._wait_for_tokens(now, tokens_expected)]
        if waits:
            seconds, message = max(waits)
            raise Refused(message, seconds)
        grant = Grant(self, tokens_expected, now)
        self._grants.append(grant)
        self._tokens += tokens_expected
        self._running += 1
        return grant

    def settle(self, grant: Grant, tokens: int) -> None:
        """For `Grant.settle`, which calls it once."""
        self._running -= 1
        self._forget(self._clock())
        if self._grants and grant.granted >= self._grants[0].granted:
            self._tokens += tokens - grant.tokens
            grant.tokens = tokens

    def _forget(self, now: float) -> None:
        while self._grants and self._grants[0].granted <= now - WINDOW_SECONDS:
            self._tokens -= self._grants.popleft().tokens

    def _check_possible(self, tokens: int) -> None:
        """Raises Refused where no time that passes alone lets the request in."""
        most, limit = self.key.tokens_per_minute, self.key.concurrency
        if most is not None and tokens > most:
            wrong = f"the request can take {tokens} tokens and this key may take {most} a minute"
            raise Refused(f"{wrong}: shorten the prompt or lower max_tokens", None)
        if limit is not None and self._running >= limit:
            raise Refused(f"{self._running} requests of this key are running and it may have {limit}", BUSY_SECONDS)

    def _wait_for_requests(self, now: float) -> Iterator[tuple[float, str]]:
        """In how many seconds there is room for one more request, and why not now; nothing where there is."""
        count, limit = len(self._grants), self.key.requests_per_minute
        if limit is not None and count >= limit:
            message = f"this key had {count} requests in the last minute and may have {limit}"
            yield self._grants[count - limit].granted + WINDOW_SECONDS - now, message

    def _wait_for_tokens(self, now: float, tokens: int) -> Iterator[tuple[float, str]]:
        """Likewise for tokens."""
        limit = self.key.tokens_per_minute
        if limit is not None and self._tokens + tokens > limit:
            totals = accumulate(grant.tokens for grant in self._grants)
            needed = self._tokens + tokens - limit
            last = next(grant for grant, total in zip(self._grants, totals, strict=True) if total >= needed)
            message = (
                f"this key took {self._tokens} tokens in the last minute; with {tokens} more it passes its {limit}"
            )
            yield last.granted + WINDOW_SECONDS - now, message
