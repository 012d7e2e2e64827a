"""The chat page in a real browser: Chromium, driven by playwright."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from halfbyte.model.batch import BatchDecoder
from halfbyte.serve import Engine

sync_api = pytest.importorskip("playwright.sync_api", reason='pip install "halfbyte[browser]"')
pytestmark = pytest.mark.browser

CHAT = "**/v1/chat/completions"


class Slow:
    """A runner that a person can follow."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self._decoder = decoder
        self.num_blocks, self.context = decoder.num_blocks, decoder.context

    def run(self, *arguments: Any) -> Any:
        time.sleep(0.02)
        return self._decoder.run(*arguments)


@pytest.fixture
def engine(decoder: BatchDecoder) -> Iterator[Engine]:
    engine = Engine(Slow(decoder), most_running=8)
    engine.start()
    yield engine
    engine.stop(5)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no browser: install chromium, or name one in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    """The page with its key given. Nothing may be asked of another server or said on the console."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    outside: list[str] = []
    page.on("request", lambda asked: None if asked.url.startswith(server.url) else outside.append(asked.url))
    page.on("pageerror", lambda error: outside.append(str(error)))
    page.on("console", lambda said: outside.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(server.url)
    page.get_by_label("Key").fill("user-key")  # the dialog is open: the server has asked for it
    page.get_by_label("Longest answer").fill("24")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    sync_api.expect(page.locator("select").first).to_have_value("a1")
    yield page
    assert outside == []
    context.close()


def send(page: Any, text: str = "What follows 3?") -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any, count: int) -> list[str]:
    """The texts of all answers, when the last of `count` is there."""
    sync_api.expect(page.locator(".it .foot").nth(count - 1)).to_contain_text("first after")
    sync_api.expect(page.locator(".it[aria-busy]")).to_have_count(0)
    return list(page.locator(".said").all_inner_texts())


def said(text: str, *, ends: bool = True) -> dict[str, Any]:
    """A streamed answer of one piece."""
    piece = {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
    body = f"data: {json.dumps(piece)}\n\n" + ("data: [DONE]\n\n" if ends else "")
    return {"status": 200, "content_type": "text/event-stream", "body": body}


def test_a_conversation(page: Any, server: Any) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "chat" in request.url else None)
    send(page)
    sync_api.expect(page.locator(".it[aria-busy] .foot")).to_contain_text(re.compile(r"[2-9] tokens · \d+ tokens/s"))
    (first,) = answers(page, 1)
    assert re.search(r"a1 · 24 tokens · \d+ tokens/s · first after [\d.]+ s · cut", page.locator(".foot").inner_text())
    page.get_by_label("Message", exact=True).fill("And")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("then?")
    page.keyboard.press("Enter")
    second = answers(page, 2)[1]
    roles = [message["role"] for message in asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert asked[-1]["messages"][2]["content"] == "And\nthen?"

    page.get_by_role("button", name="Copy the answer").last.click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == second.strip()
    page.locator("select").first.select_option("base")
    page.get_by_role("button", name="Answer again").click()
    sync_api.expect(page.locator(".it .foot").last).to_contain_text("base")
    assert answers(page, 2)[0] == first
    assert answers(page, 2)[1] != second
    assert asked[-1]["messages"] == asked[-2]["messages"]

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("Count.")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    send(page)
    answers(page, 1)
    assert [message["role"] for message in asked[-1]["messages"]] == ["system", "user"]


def test_two_side_by_side(page: Any) -> None:
    send(page)
    (alone,) = answers(page, 1)
    page.get_by_role("button", name="Compare").click()
    assert page.locator(".said").all_inner_texts() == [alone, alone]  # goes on from the same conversation
    send(page, "And then?")
    left, right = page.locator("section").all()
    sync_api.expect(right.locator(".foot").last).to_contain_text("base · 24 tokens")
    sync_api.expect(left.locator(".foot").last).to_contain_text("a1 · 24 tokens")
    assert left.locator(".said").last.inner_text() != right.locator(".said").last.inner_text()


def test_stop(page: Any, server: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("100")
    page.get_by_role("button", name="Done").click()
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        page.get_by_role("button", name="New chat").click()
        send(page)
        sync_api.expect(page.locator(".it[aria-busy] .foot")).to_contain_text("tokens/s")
        stop()
        sync_api.expect(page.locator(".foot")).to_contain_text("stopped")
    until = time.monotonic() + 10
    while server.engine.running and time.monotonic() < until:
        time.sleep(0.01)
    assert server.engine.counts.finished["cancelled"] == 2


def test_what_is_said_stays_text(page: Any) -> None:
    bad = "<script>document.title='gone'</script><img src=x onerror=\"document.title='gone'\">"
    code = "a\n```python\nif x < 3:\n    print('<b>')\n```\nb"
    page.route(CHAT, lambda route: route.fulfill(**said(bad + "\n" + code)))
    send(page, bad)
    sync_api.expect(page.locator(".said pre")).to_have_text("if x < 3:\n    print('<b>')")
    assert page.locator(".you").inner_text() == bad
    assert page.locator(".said").inner_text().startswith(bad)
    assert page.title() == "halfbyte"


def test_errors(page: Any) -> None:
    error = page.locator(".error")
    page.route(CHAT, lambda route: route.abort())
    send(page)
    sync_api.expect(error).to_contain_text("Is halfbyte serve still running?")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.fulfill(**said("half", ends=False)))
    page.get_by_role("button", name="Answer again").click()
    sync_api.expect(error).to_contain_text("connection to the server was lost")
    assert page.locator(".said").inner_text() == "half"
    page.unroute(CHAT)
    page.get_by_role("button", name="Answer again").click()
    answers(page, 1)
    sync_api.expect(error).to_have_count(0)
    send(page, "x " * 200)
    sync_api.expect(error).to_contain_text("Start a new chat")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_and_dark(page: Any, scheme: str) -> None:
    page.set_viewport_size({"width": 390, "height": 700})
    page.emulate_media(color_scheme=scheme)
    for two in (False, True):
        if two:
            page.get_by_role("button", name="Compare").click()
        send(page, "word " * 12)
        sync_api.expect(page.locator(".it[aria-busy]")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing to the side
        boxes = [box.bounding_box() for box in page.locator("button:visible, select:visible, #text").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 24 for box in boxes if box)
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", shade))) < 60) == (scheme == "dark")
