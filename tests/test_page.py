"""The page at `/`: headers and types, and what can be said of it without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_site import Site
from starlette.testclient import TestClient

import headrace.server.page

STATIC = Path(headrace.server.page.__file__).parent / "static"


@pytest.fixture
def client() -> TestClient:
    return TestClient(Site().app)


def test_index_has_its_headers(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    policy = response.headers["Content-Security-Policy"].split("; ")
    assert policy[0] == "default-src 'self'"
    assert not [word for word in policy if "unsafe" in word or "data:" in word]
    assert client.head("/").headers["Content-Length"] == str(len(response.content))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_files_have_their_types(client: TestClient, name: str, kind: str) -> None:
    response = client.get(f"/static/{name}")
    assert response.headers["Content-Type"] == kind
    assert response.content == (STATIC / name).read_bytes()


def test_every_file_is_served(client: TestClient) -> None:
    names = {path.name for path in STATIC.iterdir() if path.suffix in (".css", ".js", ".svg")}
    assert len(names) >= 3
    assert {name: client.get(f"/static/{name}").status_code for name in names} == dict.fromkeys(names, 200)
    assert client.get("/static/none.js").status_code == 404
    assert client.get("/static/../page.py").status_code == 404


def test_what_has_not_changed_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/static/app.js")
    assert first.headers["Cache-Control"] == "no-cache"
    tag = first.headers["ETag"]
    for tags in (tag, f'"other", W/{tag}'):
        again = client.get("/static/app.js", headers={"If-None-Match": tags})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert client.get("/static/app.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/static/style.css").headers["ETag"] != tag


class Outline(HTMLParser):
    """What the checks below need of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


def test_page_has_nothing_inline_and_nothing_from_outside(client: TestClient) -> None:
    outline = Outline(client.get("/").text)
    assert not outline.inline
    assert not [tag for tag, names in outline.tags if "style" in names or any(name.startswith("on") for name in names)]
    wanted = [names[name] for _, names in outline.tags for name in ("src", "href") if name in names]
    wanted = [path for path in wanted if path is not None and not path.startswith("#")]
    assert "/static/app.js" in wanted
    assert {path: client.get(path).status_code for path in wanted} == dict.fromkeys(wanted, 200)


def test_page_can_be_used_without_seeing_it(client: TestClient) -> None:
    outline = Outline(client.get("/").text)
    tags = [tag for tag, _ in outline.tags]
    assert {"header", "main", "footer", "h1", "h2", "noscript"} <= set(tags)
    assert ("html", {"lang": "en"}) in outline.tags
    ids = [names["id"] for _, names in outline.tags if "id" in names]
    assert len(ids) == len(set(ids))
    named = [
        name
        for _, names in outline.tags
        for key in ("for", "aria-labelledby", "aria-controls", "aria-describedby")
        if (name := names.get(key))
    ]
    assert set(named) <= set(ids)
    labelled = {names.get("for") for tag, names in outline.tags if tag == "label"}
    text = client.get("/").text
    for tag, names in outline.tags:
        if tag in ("textarea", "input", "select") and names["id"] not in labelled:
            assert re.search(rf'<label[^>]*>[^<]*<{tag} id="{names["id"]}"', text), names
    roles = [names.get("role") for _, names in outline.tags]
    assert roles.count("status") >= 3 and "log" in roles and roles.count("tab") == roles.count("tabpanel") == 2


def test_scripts_import_what_is_there_and_never_write_markup() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        for name in re.findall(r'from "([^"]+)"', text):
            assert (STATIC / name).is_file(), (path, name)


def test_elements_that_scripts_ask_for_are_on_the_page(client: TestClient) -> None:
    ids = {names["id"] for _, names in Outline(client.get("/").text).tags if "id" in names}
    asked = {
        name
        for path in STATIC.glob("*.js")
        for name in re.findall(r'(?<!\.)\b(?:byId|say)\("([^"]+)"', path.read_text())
    }
    assert len(asked) > 20
    assert asked <= ids


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    """WCAG's contrast at level AA: 4.5 for text, 3 for lines, borders and focus."""
    blocks = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text(), re.DOTALL)
    colours: dict[str, str] = {}
    for block in blocks[: 1 if scheme == "light" else 2]:
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for ground in ("ground", "panel", "field"):
        for text in ("ink", "soft", "accent", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for line in ("output", "prompt", "border", "good"):
            assert contrast(colours[line], colours[ground]) >= 3, (line, ground)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["ink"], colours["mine"]) >= 4.5


def contrast(one: str, other: str) -> float:
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
