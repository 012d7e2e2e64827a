"""The pictures of docs/look.md, taken of a real run: python scripts/pictures.py [--steps N]. Needs Chromium.

Fine-tunes SmolLM2-135M as `halfbyte demo` does; after two thirds of the steps it looks at the dashboard and the
terminal's view, at the end at the report. A page that lacks what belongs on it ends the
script, and docs/ stays as it was.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from halfbyte.cli.demo import SETTINGS, smollm2_path
from halfbyte.cli.demo_data import write_docstring_qa
from halfbyte.cli.live import view
from halfbyte.config import load_config
from halfbyte.report import Dashboard
from halfbyte.train import Observer, StepMetrics, train
from halfbyte.train.story import Story

DOCS = Path(__file__).parent.parent / "docs"
ON_THEM = {
    "dashboard": ("Loss", "Memory", "planned peak", "time left"), "dashboard-phone": ("Loss", "time left"),
    "terminal": ("held-out", "memory", "planned"),
    "report": ("Held-out prompts, before and after", "What is learned of a sample", "Memory, planned and measured"),
}  # fmt: skip
"""Of each picture's page; tests/report/test_pictures.py sees that such pages still hold it."""
SIZES = {"dashboard": (1200, 1000), "dashboard-phone": (500, 1400), "terminal": (1290, 370), "report": (1200, 1700)}
TERMINAL = '<html><body style="margin:0;background:#fff">{svg}</body></html>'


class Photographer(Observer):
    """Looks at a run after two thirds of its steps."""

    def __init__(self, chromium: str, folder: Path, dashboard: Dashboard) -> None:
        self._chromium, self._folder, self._dashboard = chromium, folder, dashboard

    def on_begin(self, story: Story) -> None:
        self._story = story
        self._dashboard.report = story.report

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step != 2 * metrics.steps // 3:
            return
        self.take(self._dashboard.url, "dashboard")
        self.take(self._dashboard.url, "dashboard-phone")
        console = Console(record=True, width=104, file=io.StringIO())
        console.print(view(self._story.report()))
        page = self._folder / "terminal.html"
        page.write_text(TERMINAL.format(svg=console.export_svg(title="halfbyte train")))
        self.take(page.as_uri(), "terminal")

    def take(self, url: str, name: str) -> None:
        """A picture of the page at `url`."""
        common = [
            self._chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={self._folder / 'browser'}", "--virtual-time-budget=3000",
            "--window-size={},{}".format(*SIZES[name]),
        ]  # fmt: skip
        dom = subprocess.run([*common, "--dump-dom", url], check=True, capture_output=True, text=True).stdout
        missing = [word for word in (*ON_THEM[name], "<svg") if word not in dom]
        if missing:
            sys.exit(f"{name}: {', '.join(missing)} not on the page")
        picture = self._folder / f"{name}.png"
        subprocess.run([*common, f"--screenshot={picture}", url], check=True, capture_output=True)


def main() -> None:
    """Run, look, and put the pictures into docs/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=90)
    steps = parser.parse_args().steps
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("no browser: install chromium, or name one in CHROMIUM")
    with tempfile.TemporaryDirectory() as name, Dashboard() as dashboard:
        folder = Path(name)
        data, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        write_docstring_qa(data, held_out, num_train=2000, num_held_out=60)
        run = load_config(
            None, (*SETTINGS, f"train.steps={steps}", f"train.eval_every={steps // 6}", "memory.budget=2GB"),
            model__path=smollm2_path(), data__train=str(data), data__eval=str(held_out),
            train__output=str(folder / "run"),
        )  # fmt: skip
        photographer = Photographer(chromium, folder, dashboard)
        result = train(run, observer=photographer)
        photographer.take(Path(result.report).as_uri(), "report")
        for picture in sorted(folder.glob("*.png")):
            shutil.copyfile(picture, DOCS / f"look-{picture.name}")


if __name__ == "__main__":
    main()
