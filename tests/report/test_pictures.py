"""The pictures in docs/ are of pages as they are made today: the same elements stand on them."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from halfbyte.cli.live import view
from halfbyte.config import load_config
from halfbyte.report import RunReport, run_page
from halfbyte.report.dashboard import PARTS
from halfbyte.train import Observer, StepMetrics, train
from halfbyte.train.story import Story

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "scripts" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Listener(Observer):
    def on_begin(self, story: Story) -> None:
        self.story = story

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == 2:
            self.midway: RunReport = self.story.report()


def test_pages_hold_what_the_pictures_show(
    pictures: ModuleType, tmp_path: Path, tiny_llama: Path, chat_file: Path, eval_file: Path
) -> None:
    config = load_config(
        model__path=str(tiny_llama), data__train=str(chat_file), data__eval=str(eval_file), lora__r=2,
        train__output=str(tmp_path / "run"), train__steps=3, data__max_seq_len=96, memory__budget="8GB",
    )  # fmt: skip
    listener = Listener()
    train(config, observer=listener)
    text = io.StringIO()
    Console(file=text, width=104).print(view(listener.midway))
    live = "".join(draw(listener.midway) for draw in PARTS.values())
    pages = {
        "dashboard": live, "dashboard-phone": live, "terminal": text.getvalue(),
        "report": run_page(listener.story.report()),
    }  # fmt: skip
    assert set(pages) == set(pictures.ON_THEM) == set(pictures.SIZES)
    for name, words in pictures.ON_THEM.items():
        assert [word for word in words if word not in pages[name]] == [], name
        assert (ROOT / "docs" / f"look-{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
