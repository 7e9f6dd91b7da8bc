"""The page in a browser: what it shows, how it asks, by mouse and keyboard."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from page_site import NASTY, Site

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="needs a Chromium on PATH and the package playwright",
)


@contextmanager
def served(site: Site) -> Iterator[str]:
    """The site on a port of this machine."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(site.app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [holder]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{holder.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=SWITCHES)
        yield opened
        opened.close()


@contextmanager
def opened(browser: Any, site: Site) -> Iterator[Any]:
    """The page of a site in a browser; fails if the browser complains of anything but a refused call."""
    with served(site) as url:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.goto(url)
        yield page
        page.close()
    assert not [text for text in complaints if "Failed to load resource" not in text]


def test_browser_shows_the_figures(browser: Any) -> None:
    with opened(browser, Site()) as page:
        page.get_by_text("Ready").wait_for()
        assert page.locator("#models").inner_text() == "smollm2-135m, int8"
        assert page.locator("#output-rate").inner_text() == "215"
        assert page.locator("#mfu").inner_text() == "41 %"
        assert page.locator("#kv-note").inner_text() == "1 GiB of 4 GiB"
        assert page.locator("#waiting").inner_text() == "1 waiting, 12 of batches"
        assert page.locator("#rates path.line").count() == 2
        assert page.locator("#rates-words").inner_text().startswith("Output: 200 now, 225 on average, 249 at most.")
        page.get_by_text("As a table").click()
        page.locator("#halves tr").nth(9).wait_for()
        assert page.locator("#halves tr").count() == 10


def test_browser_says_what_was_not_measured(browser: Any) -> None:
    with opened(browser, Site(mfu=None)) as page:
        page.get_by_text("Ready").wait_for()
        assert page.locator("#mfu").inner_text() == "\u2013"
        assert "headrace bench peaks" in page.locator("#mfu-note").inner_text()


def test_browser_shows_and_cancels_batches(browser: Any) -> None:
    site = Site()
    with opened(browser, site) as page:
        rows = page.locator("#batch-rows tr")
        rows.nth(2).wait_for()
        assert "40 of 100 rows, 1 failed" in rows.nth(0).inner_text()
        assert "1 min 35 s" in rows.nth(0).inner_text()
        assert not rows.nth(1).get_by_role("button").is_visible()
        assert NASTY in rows.nth(2).inner_text()
        assert page.locator("#batch-rows img").count() == 0
        page.get_by_role("button", name="Cancel batch_one").click()
        page.get_by_role("button", name="Let it run").click()
        page.get_by_role("button", name="Cancel batch_one").click()
        page.get_by_role("button", name="Cancel the batch").click()
        page.get_by_text("batch_one is being cancelled.").wait_for()
        assert site.asked == [("cancel", "batch_one")]


def test_browser_chats_with_the_keyboard(browser: Any) -> None:
    site = Site()
    with opened(browser, site) as page:
        page.get_by_text("Ready").wait_for()
        page.get_by_text("System prompt").first.click()
        page.locator("#system").fill("Be brief.")
        page.locator("#message").fill(NASTY)
        page.keyboard.press("Enter")
        page.get_by_text("7 tokens").wait_for()
        assert page.locator("#log article p").all_inner_texts() == [NASTY, f"Heard: {NASTY}."]
        assert page.locator("#log img").count() == 0
        page.locator("#message").fill("Again?")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Heard: Again?.").wait_for()
        sent = site.asked[-1][1]
        assert [each["role"] for each in sent["messages"]] == ["system", "user", "assistant", "user"]
        assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("smollm2-135m", 0, 512)
        page.get_by_role("button", name="Clear").click()
        assert page.locator("#log article").count() == 0


def test_browser_stops_an_answer(browser: Any) -> None:
    site = Site()
    with opened(browser, site) as page:
        page.get_by_text("Ready").wait_for()
        page.locator("#message").fill("endless")
        page.keyboard.press("Enter")
        page.get_by_text("Heard: endless. on on").wait_for()
        assert page.locator("#log [aria-busy=true]").count() == 1
        page.get_by_role("button", name="Stop").first.click()
        page.get_by_text("Stopped.").wait_for()
        assert site.gone.wait(10)
        assert page.locator("#log [aria-busy=true]").count() == 0


def test_browser_gives_a_refused_question_back(browser: Any) -> None:
    with opened(browser, Site()) as page:
        page.get_by_text("Ready").wait_for()
        page.locator("#message").fill("refuse")
        page.keyboard.press("Enter")
        page.get_by_text("the prompt is too long").wait_for()
        assert page.locator("#message").input_value() == "refuse"
        assert page.locator("#log article").count() == 0


def test_browser_completes_a_plain_prompt(browser: Any) -> None:
    site = Site()
    with opened(browser, site) as page:
        page.get_by_text("Ready").wait_for()
        page.get_by_role("tab", name="Chat").focus()
        page.keyboard.press("ArrowRight")
        page.locator("#prompt").fill("Once upon")
        page.get_by_role("button", name="Complete").click()
        page.get_by_text("Heard: Once upon.").wait_for()
        assert site.asked[-1][0] == "/v1/completions"
        assert site.asked[-1][1]["prompt"] == "Once upon"


def test_browser_asks_for_a_key_and_sends_it(browser: Any) -> None:
    with opened(browser, Site(key="sesame")) as page:
        for key, words in (("wrong", "The server does not know this key"), ("sesame", None)):
            page.locator("#key").fill(key)
            page.get_by_role("button", name="Use it").click()
            if words:
                page.get_by_text(words).wait_for()
        page.get_by_text("Ready").wait_for()
        assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        assert not page.locator("#key-dialog").is_visible()


def test_browser_page_fits_a_telephone(browser: Any) -> None:
    with served(Site()) as url:
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto(url)
        page.get_by_text("Ready").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()
