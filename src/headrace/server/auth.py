"""Who may ask: by the key in a request's headers, and the page that sends it. Knows no route but the open ones."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.errors import ApiError, error_response, is_anthropic
from headrace.server.keys import Keys

# The page itself holds nothing; what it shows it asks for with a key.
OPEN = ("/", "/health", "/ready")


class KeyCheck:
    """Answers 401 to a request without a known key, but for open paths. Puts `key`, `key_name` and `owner` into the
    request's state; without `keys` everybody is the owner ""."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keys is None or is_open(scope["path"]):
            return await self._app(scope, receive, send)
        token = read_token(Headers(scope=scope))
        key = self._keys.find(token) if token else None
        if key is None:
            message = "this key is not known here" if token else "give your key as `Authorization: Bearer KEY`"
            error = ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
            return await error_response(error, is_anthropic(scope["path"]))(scope, receive, send)
        scope.setdefault("state", {}).update(key=key, key_name=key.name, owner=key.name)
        await self._app(scope, receive, send)


class OriginCheck:
    """Answers 403 to what a web page of another origin sends, but for `allowed` origins: it would come with the rights
    of whoever looks at that page. Programs send no Origin."""

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            own = origin is not None and origin.partition("://")[2].lower() == headers.get("host", "").lower()
            if origin is not None and not own and origin not in self._allowed:
                message = f"pages of {origin[:80]} may not call this server: allow it with --origin"
                error = ApiError(403, "origin_not_allowed", message)
                return await error_response(error, is_anthropic(scope["path"]))(scope, receive, send)
        await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    return path in OPEN or path.startswith("/static/")


def read_token(headers: Headers) -> str:
    """The key as OpenAI's clients send it, or Anthropic's."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
