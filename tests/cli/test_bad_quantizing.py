"""`halfbyte quantize` of what cannot be, and use of what it wrote that cannot be: docs/refusals.md has the lines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.refusals import check, promised
from transformers import AutoModel, BertConfig, T5Config

from halfbyte.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")
PISSA = ["--set", "lora.init=pissa", "--set", "lora.r=4"]
QUANTIZE: dict[str, list[str]] = {
    "an unknown scale": ["--set", "quant.scale=best"],
    "too few bits": ["--set", "quant.bits=1"],
    "bits below the narrowest format": ["--set", "quant.bits=2.05"],
    "a text that is not there": ["--set", "quant.calibrate=PLACE/none.jsonl"],
    "a text that is no JSON": ["--set", "quant.calibrate=PLACE/model/config.json"],
    "too little memory to calibrate": ["--set", "quant.calibrate=PLACE/data.jsonl", "--memory", "20MB"],
    "a start on a text, and no text": ["--set", "lora.init=cloq"],
    "a text for a start that takes none": ["--set", "quant.calibrate=PLACE/data.jsonl", "--set", "lora.init=loftq"],
    "a start of a rank beyond the layers": ["--set", "lora.init=pissa", "--set", "lora.r=97"],
    "the same on a text": [
        "--set",
        "quant.calibrate=PLACE/data.jsonl",
        "--set",
        "lora.init=cloq",
        "--set",
        "lora.r=97",
    ],
    "a report that is no page": ["--report", "PLACE/report.txt"],
    "a report on PiSSA's base": [*PISSA, "--report", "PLACE/report.html"],
    "perplexity, and no report": ["--eval-data", "PLACE/data.jsonl"],
    "no model": ["--model", "PLACE/nope"],
    "an encoder": ["--model", "PLACE/bert"],
    "an encoder with a decoder": ["--model", "PLACE/t5"],
    "an output that is there": ["--output", "PLACE/adapter"],
    "a model that is quantized": ["--model", "PLACE/base"],
}
OTHER_HEADS = {
    "bert": BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    ),
    "t5": T5Config(vocab_size=40, d_model=32, d_ff=48, d_kv=16, num_layers=1, num_heads=2),
}
USE: dict[str, list[str]] = {
    "PiSSA's base, and no adapter": ["eval", "--data", "PLACE/data.jsonl"],
    "PiSSA's base, text from it": ["generate", "--prompt", "the"],
    "PiSSA's base, served": ["serve"],
    "training PiSSA's base from elsewhere": ["train", "--data", "PLACE/data.jsonl", "--output", "PLACE/out"],
    "a start of another rank": ["train", "--data", "PLACE/data.jsonl", "--output", "PLACE/out", *PISSA[:2]],
    "a start of other layers": [
        "train", "--data", "PLACE/data.jsonl", "--output", "PLACE/out", *PISSA, "--set", "lora.target_modules=q_proj",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def pissa(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its start."""
    base = tmp_path_factory.mktemp("pissa") / "base"
    assert main(["quantize", "--model", str(make_llama()), "--output", str(base), *PISSA]) == 0
    return base


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize(case: str, place: Path, pissa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(pissa, place / "base")
    for name, config in OTHER_HEADS.items():
        if f"PLACE/{name}" in QUANTIZE[case]:
            AutoModel.from_config(config).save_pretrained(place / name)
    command = ["quantize", "--model", "PLACE/model", "--output", "PLACE/out", *QUANTIZE[case]]
    check("quantizing", case, command, place, capsys)
    assert not list(place.glob("report*"))


@pytest.mark.parametrize("case", USE)
def test_use(case: str, place: Path, pissa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(pissa, place / "base")
    check("quantizing", case, [*USE[case], "--model", "PLACE/base"], place, capsys)


def test_the_page_shows_these() -> None:
    assert list(promised("quantizing")) == [*QUANTIZE, *USE]
