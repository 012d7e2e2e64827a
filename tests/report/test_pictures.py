"""The pictures in docs/ are of pages as they are made today: the same elements stand on them."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from rich.console import Console

from halfbyte.cli.live import view
from halfbyte.config import load_config
from halfbyte.report import RunReport, run_page
from halfbyte.report.dashboard import PARTS
from halfbyte.train import Observer, StepMetrics, train
from halfbyte.train.story import Story

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
ROOT = Path(__file__).parent.parent.parent
MOST_BYTES = 200_000


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
        "look-dashboard": live, "look-dashboard-phone": live, "look-terminal": text.getvalue(),
        "look-report": run_page(listener.story.report()),
    }  # fmt: skip
    assert set(pages) == set(pictures.PICTURES) - {"chat"}
    for name, page in pages.items():
        assert [word for word in pictures.PICTURES[name].words if word not in page] == [], name


def test_the_pictures_are_of_such_pages(pictures: ModuleType) -> None:
    """Each was taken when all these words stood on its page: who adds one takes the pictures again."""
    for name, picture in pictures.PICTURES.items():
        file = ROOT / "docs" / f"{name}.png"
        with Image.open(file) as taken:
            assert taken.size == picture.size
            assert json.loads(taken.text["words"]) == list(picture.words), f"{name}: python scripts/pictures.py"
        assert file.stat().st_size < MOST_BYTES
        assert any(f"]({name}.png)" in page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.browser
def test_all_of_them_are_taken(
    pictures: ModuleType, tmp_path: Path, make_llama: Callable[..., Path], chat_file: Path, eval_file: Path
) -> None:
    """Of a tiny model, in Chromium: what the docs' pictures are taken by sees all that belongs on each page."""
    pytest.importorskip("playwright.sync_api", reason='pip install "halfbyte[browser]"')
    chromium = pictures.chromium_here()
    if not chromium:
        pytest.skip("no browser: install chromium, or name one in CHROMIUM")
    model = make_llama(intermediate_size=128, max_position_embeddings=1024)
    config = load_config(
        model__path=str(model), data__train=str(chat_file), data__eval=str(eval_file), lora__r=2,
        train__output=str(tmp_path / "run"), train__steps=6, train__eval_every=2, data__max_seq_len=96,
        memory__budget="8GB",
    )  # fmt: skip
    pictures.take_pictures(config, tmp_path, chromium)
    for name, picture in pictures.PICTURES.items():
        with Image.open(tmp_path / f"{name}.png") as taken:
            assert taken.size == picture.size
            assert len(taken.convert("RGB").getcolors(taken.width * taken.height)) > 20, name
