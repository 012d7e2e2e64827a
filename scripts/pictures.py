"""The docs' pictures, taken of a real run: python scripts/pictures.py [--steps N]. Needs Chromium and playwright.

Fine-tunes SmolLM2-135M as `halfbyte demo` does; after two thirds of the steps it looks at the dashboard and the
terminal's view, at the end at the report and at the chat page of `halfbyte serve`. A page that lacks what belongs on
it ends the script, and docs/ stays as it was. tests/report/test_pictures.py takes all of them of a tiny model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from halfbyte.cli.demo import SETTINGS, smollm2_path
from halfbyte.cli.demo_data import write_docstring_qa
from halfbyte.cli.live import view
from halfbyte.config import RunConfig, load_config
from halfbyte.report import Dashboard
from halfbyte.train import Observer, StepMetrics, train
from halfbyte.train.story import Story

DOCS = Path(__file__).parent.parent / "docs"
COLOURS = 128
"""Of a picture: with all of them the report alone takes 220 kB."""
TERMINAL = '<html><body style="margin:0;background:#fff">{svg}</body></html>'
WIDTH = 104
"""Of the terminal, in characters."""
QUESTIONS = (
    "In Python, what does the method `threading.Condition.notify_all` do?",
    "Write a Python function that adds two numbers, in a code block.",
)


class Picture(NamedTuple):
    """Its width and height in pixels, and what stands on its page."""

    size: tuple[int, int]
    words: tuple[str, ...]


PICTURES = {
    "look-dashboard": Picture((1200, 1000), ("Loss", "Memory", "planned peak", "time left")),
    "look-dashboard-phone": Picture((500, 1400), ("Loss", "time left")),
    "look-terminal": Picture((1290, 422), ("loss", "held-out", "speed", "memory", "planned", "a sample")),
    "look-report": Picture(
        (1200, 1700),
        ("Held-out prompts, before and after", "What is learned of a sample", "Memory, planned and measured"),
    ),
    "chat": Picture((1100, 640), ("Compare", "New chat", "Settings", "tuned", "(base)", "first after", "Send")),
}
"""By name in docs/; the words are kept in the file, so that a test sees which page it was taken of."""


class Photographer(Observer):
    """Looks at a run after two thirds of its steps.

    Args:
        browser: playwright's.
        folder: for the pictures.
    """

    def __init__(self, browser: Any, folder: Path, dashboard: Dashboard) -> None:
        self._browser, self._folder, self._dashboard = browser, folder, dashboard

    def on_begin(self, story: Story) -> None:
        self._story = story
        self._dashboard.report = story.report

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step != 2 * metrics.steps // 3:
            return
        for name in ("look-dashboard", "look-dashboard-phone"):
            self.look(self._dashboard.url, name)
        console = Console(record=True, width=WIDTH, file=io.StringIO())
        console.print(view(self._story.report()))
        page = self._folder / "terminal.html"
        page.write_text(TERMINAL.format(svg=console.export_svg(title="halfbyte train")), encoding="utf-8")
        self.look(page.as_uri(), "look-terminal")

    def look(self, url: str, name: str) -> None:
        """A picture of the page at `url`, when all that belongs on it is there."""
        with self.page(name) as page:
            page.goto(url)
            page.wait_for_selector("svg")
            self.keep(page, name)

    @contextmanager
    def page(self, name: str) -> Iterator[Any]:
        """An empty page of that picture's size."""
        width, height = PICTURES[name].size
        page = self._browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.set_default_timeout(120_000)
        try:
            yield page
        finally:
            page.close()

    def keep(self, page: Any, name: str) -> None:
        """Take what is on `page`."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        found = page.content().replace("&nbsp;", " ").replace("\xa0", " ")
        missing = [word for word in PICTURES[name].words if word not in found]
        if missing:
            sys.exit(f"{name}: {', '.join(missing)} not on the page")
        told = PngInfo()
        told.add_text("words", json.dumps(PICTURES[name].words))
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(
            self._folder / f"{name}.png", pnginfo=told, optimize=True
        )


def take_pictures(config: RunConfig, folder: Path, chromium: str) -> None:
    """Train as `config` says, and put `PICTURES` into `folder`.

    Args:
        chromium: the browser's file.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, Dashboard() as dashboard:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        photographer = Photographer(browser, folder, dashboard)
        result = train(config, observer=photographer)
        photographer.look(Path(result.report).as_uri(), "look-report")
        with served(config.model.path, result.adapter) as url, photographer.page("chat") as page:
            page.goto(url)
            chat(page)
            photographer.keep(page, "chat")
        browser.close()


@contextmanager
def served(model: str, adapter: str) -> Iterator[str]:
    """The address of `halfbyte serve`."""
    command = [sys.executable, "-m", "halfbyte", "serve", "--model", model, "--adapter", f"tuned={adapter}"]
    with subprocess.Popen([*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield json.loads(line)["url"]
        finally:
            process.terminate()


def chat(page: Any) -> None:
    """Ask the adapter and the base the same questions, side by side."""
    from playwright.sync_api import expect

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("120")
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare").click()
    page.locator("select").nth(0).select_option("tuned")
    for number, question in enumerate(QUESTIONS, 1):
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        for side in page.locator("section").all():
            expect(side.locator(".it .foot").nth(number - 1)).to_contain_text("first after", timeout=120_000)


def chromium_here() -> str | None:
    """The browser's file, if there is one."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def main() -> None:
    """Run, look, and put the pictures into docs/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=90)
    steps = parser.parse_args().steps
    chromium = chromium_here()
    if not chromium:
        sys.exit("no browser: install chromium, or name one in CHROMIUM")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        write_docstring_qa(data, held_out, num_train=2000, num_held_out=60)
        run = load_config(
            None, (*SETTINGS, f"train.steps={steps}", f"train.eval_every={steps // 6}", "memory.budget=2GB"),
            model__path=smollm2_path(), data__train=str(data), data__eval=str(held_out),
            train__output=str(folder / "run"),
        )  # fmt: skip
        take_pictures(run, folder, chromium)
        for picture in PICTURES:
            shutil.copyfile(folder / f"{picture}.png", DOCS / f"{picture}.png")


if __name__ == "__main__":
    main()
