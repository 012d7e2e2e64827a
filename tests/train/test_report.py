"""report.html: what stands on it is what the run was, and nothing of the data can run."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from halfbyte.config import load_config
from halfbyte.dtypes import format_bytes
from halfbyte.report import RunReport
from halfbyte.train import Observer, train
from halfbyte.train import trace as traces
from halfbyte.train.story import Story
from halfbyte.train.trace import MOST_BUCKETS, MemoryTrace

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e"


class Page(HTMLParser):
    """Its text, and what it would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.fetches: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetches += [f"{name}={value}" for name, value in attrs if name in ("src", "href") or name[:2] == "on"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


class Listener(Observer):
    """Keeps what it is told of plan and phases, and reads the story meanwhile."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.reports: list[RunReport] = []

    def on_begin(self, story: Story) -> None:
        self.story = story

    def on_phase(self, name: str) -> None:
        self.phases.append(name)
        self.reports.append(self.story.report())


@pytest.fixture(scope="module")
def evil_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evil") / "evil <b>.jsonl"
    row = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": f"No {EVIL}"}]}
    path.write_text((json.dumps(row) + "\n") * 12)
    return path


def test_the_page_says_what_the_run_was(tmp_path: Path, tiny_llama: Path, evil_file: Path) -> None:
    config = load_config(
        model__path=str(tiny_llama), data__train=str(evil_file), data__eval=str(evil_file), lora__r=4,
        train__output=str(tmp_path / "run"), train__steps=6, train__eval_every=3, train__save_every=4,
        data__max_seq_len=256, memory__budget="8GB",
    )  # fmt: skip
    listener = Listener()
    result = train(config, observer=listener)
    assert result.report == str(tmp_path / "run" / "report.html")
    data = Path(result.report).read_bytes()
    assert len(data) < 100_000  # measured: 37 kB
    page = Page(data.decode())
    assert not page.tags & {"script", "img", "iframe", "link"}
    assert page.fetches == []
    assert not {"\x1b", "\u202e"} & set(page.text)
    assert "<script>alert(1)</script>" in page.text  # as text
    for value in (
        f"{result.eval_loss:.4f}", f"{result.eval_loss_before:.4f} before", f"{result.train_loss:.4f}",
        format_bytes(result.peak_memory), "6 of 6 steps", "planned peak", "budget", "line 1: ", "lora.r",
        hashlib.sha256((tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()).hexdigest(),
        json.loads((tmp_path / "run/adapter/halfbyte.json").read_text())["base_sha256"], "fresh start",
    ):  # fmt: skip
        assert value in page.text, value
    report = listener.story.report()
    assert report.state == "finished"
    assert [step for step, _ in report.held_out] == [0, 3, 6]
    assert report.memory == sorted(report.memory)
    assert 0 < max(size for _, size in report.memory) <= 1.01 * result.peak_memory
    assert {"load", "train", "evaluate", "save", "generate"} <= set(report.peaks)
    assert report.plan is not None
    assert report.plan.peak_memory == result.predicted_peak_memory


def test_the_command_makes_the_same_run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    config = load_config(
        model__path=str(tiny_llama), data__train=str(chat_file), train__output=str(tmp_path / "a b"), train__steps=2,
        quant__skip_modules=("k_proj", "v_proj"), data__packing=False, lora__r=2,
    )  # fmt: skip
    listener = Listener()
    train(config, observer=listener)
    told = re.search(r"<pre>(halfbyte train .*?)</pre>", Path(tmp_path / "a b/report.html").read_text())
    assert told
    words = shlex.split(told[1].replace("&quot;", '"').replace("&#x27;", "'"))
    assert words[:2] == ["halfbyte", "train"]
    assert load_config(None, words[3::2]) == listener.story.config


def test_there_is_something_to_say_at_any_time(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    config = load_config(
        model__path=str(tiny_llama), data__train=str(chat_file), data__eval=str(chat_file), lora__r=2,
        train__output=str(tmp_path / "run"), train__steps=2,
    )  # fmt: skip
    listener = Listener()
    train(config, observer=listener)
    assert listener.phases == [
        "prepare", "load", "train", "evaluate", "train", "evaluate", "train", "save", "generate"
    ]  # fmt: skip
    assert listener.reports[0].plan is None
    assert listener.reports[1].plan is not None
    assert [report.step for report in listener.reports[2:6]] == [0, 0, 0, 2]


def test_a_trace_is_bounded_and_keeps_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    now, size = [0.0], [0]
    monkeypatch.setattr(traces, "in_use", lambda device: size[0])
    monkeypatch.setattr(traces.time, "perf_counter", lambda: now[0])
    trace = MemoryTrace(torch.device("cpu"), interval=0.1)
    trace.enter("load")
    for look in range(5 * MOST_BUCKETS):
        now[0], size[0] = 0.1 * look, 10 + (10**6 if look == 700 else look % 5)
        trace.look()
    points = trace.points()
    assert MOST_BUCKETS / 2 < len(points) <= MOST_BUCKETS
    assert max(points, key=lambda point: point[1])[0] == pytest.approx(70, abs=1)
    assert trace.peaks == {"load": 10 + 10**6}
    assert points[-1][0] == pytest.approx(now[0], abs=1)
