"""DoRA trains as PEFT trains it, wherever the base lives; generate, eval and merge know it, serve refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfbyte as hb
from halfbyte.checkpoint import load_adapter
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig, RunConfig
from halfbyte.errors import AdapterError
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved
from halfbyte.model.quantize import quantize_model
from halfbyte.train import train

MakeRun = Callable[..., RunConfig]
DORA: dict[str, Any] = {"lora__use_dora": True, "train__steps": 3}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def adapter(make_run: MakeRun) -> Path:
    return Path(train(make_run("dora", **DORA)).adapter)


def losses(config: RunConfig) -> list[float]:
    train(config)
    lines = map(json.loads, (Path(config.train.output) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_where_things_live_changes_nothing(make_run: MakeRun, tiny_llama: Path, tmp_path: Path) -> None:
    quantize_model(str(tiny_llama), tmp_path / "base", QuantConfig())
    settings = DORA | {"model__path": str(tmp_path / "base")}
    expected = losses(make_run("resident", **settings))
    streamed = make_run("stream", **settings, memory__weights="stream", train__gradient_checkpointing=True)
    assert losses(streamed) == expected
    assert expected != losses(make_run("lora", **settings | {"lora__use_dora": False}))
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("resident", "stream")
    )
    assert len(one) == 3 * 14
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_peft_reads_it_and_says_the_same(adapter: Path, tiny_llama: Path) -> None:
    """Measured: 5e-7 apart."""
    ids = torch.arange(3, 40)[None]
    base = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32)
    decoded = {f"{n}.weight": m.dequantize(torch.float32) for n, m in base.model.named_modules()
               if isinstance(m, hb.Linear4bit)}  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    theirs.load_state_dict(decoded, strict=False)
    with torch.no_grad():
        plain = theirs(input_ids=ids).logits
        wanted = peft.PeftModel.from_pretrained(theirs, adapter)(input_ids=ids).logits
        ours = attach_saved(base.model, load_adapter(adapter))(input_ids=ids).logits
    assert float((wanted - plain).norm() / plain.norm()) > 1e-2
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


def test_merged_it_says_the_same(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    result = hb.merge(hb.load_config(model__path=str(tiny_llama)), adapter, tmp_path / "merged")
    assert result.layers == 14
    assert result.drift.kl < 1e-4
    with pytest.raises(AdapterError, match="is DoRA, whose update has no factors"):
        hb.merge(hb.load_config(model__path=str(tiny_llama)), adapter, tmp_path / "lora", format="gguf-lora")


def test_the_other_commands(
    adapter: Path, tiny_llama: Path, eval_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--model", str(tiny_llama), "--adapter", str(adapter), "--json"]
    assert main(["eval", *run, "--data", str(eval_file)]) == 0
    assert main(["generate", *run, "--prompt", "What follows 3?", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["serve", *run[:2], "--adapter", f"one={adapter}", "--port", "0"]) == 3
    assert "is DoRA, which is not served" in capsys.readouterr().err


def test_magnitudes_that_do_not_fit_are_refused(adapter: Path) -> None:
    (adapter / "manifest.json").unlink(missing_ok=True)
    state = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in state if name.endswith("lora_magnitude_vector"))
    save_file(state | {name: state[name][1:].clone()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"not a float for each row of lora_B"):
        load_adapter(adapter)
    save_file({key: state[key] for key in state if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="has no magnitude, use_dora is true"):
        load_adapter(adapter)
