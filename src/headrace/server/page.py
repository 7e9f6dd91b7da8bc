"""The page at `/`: its files, read once from the package, with types and headers. Knows no model and no figures."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"


def page_routes() -> list[Route]:
    """Routes of the page: index.html at `/`, every other file at `/static/NAME`. They ask for no key."""
    folder = files("headrace.server") / "static"
    found = {file.name: file.read_bytes() for file in folder.iterdir() if PurePath(file.name).suffix in TYPES}
    index = StaticFile("index.html", found.pop("index.html"))
    others = [Route(f"/static/{name}", StaticFile(name, body).answer) for name, body in sorted(found.items())]
    return [Route("/", index.answer), *others]


class StaticFile:
    """One file in memory. A browser asks each time whether it has changed, so an upgrade shows at once."""

    def __init__(self, name: str, body: bytes) -> None:
        self.body = body
        self.headers = {
            "Content-Type": TYPES[PurePath(name).suffix],
            "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
            "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    async def answer(self, request: Request) -> Response:
        """The file, or 304 without it where the browser's copy is the same."""
        if self.headers["ETag"] in read_tags(request.headers.get("If-None-Match", "")):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def read_tags(header: str) -> list[str]:
    """The tags of an If-None-Match header. A proxy that compressed the file marks its tag as weak; it still counts."""
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]
