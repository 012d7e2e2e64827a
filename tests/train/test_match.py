"""A start matched to the 16-bit model predicts more as it does, on samples that it was not matched on too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte as hb
from halfbyte.calibrate import calibrate_model
from halfbyte.checkpoint import load_adapter
from halfbyte.config import DataConfig, QuantConfig, RunConfig
from halfbyte.data import load_data
from halfbyte.dtypes import format_bytes
from halfbyte.model import load_model, load_tokenizer
from halfbyte.model.adapt import attach_saved
from halfbyte.train.match import _settings, match_start

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def divergence(base: Path, model: Path, text: Path) -> float:
    """KL(16 bits || base and its start) by supervised token."""
    wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours = load_model(str(base), QuantConfig(), compute_dtype=torch.float32).model
    ours = attach_saved(ours, load_adapter(base / "start"))
    total = count = 0.0
    rows = load_data(str(text), load_tokenizer(str(model)), DataConfig())
    with torch.no_grad():
        for row in rows:
            ids, learned = torch.from_numpy(row.input_ids)[None].long(), torch.from_numpy(row.labels[1:] != -100)
            goal, own = (m(input_ids=ids).logits[0, :-1][learned].log_softmax(1) for m in (wanted, ours))
            total += float((goal.exp() * (goal - own)).sum())
            count += len(goal)
    return total / count


def test_predicts_more_like_16_bits(
    make_llama: Callable[..., Path], chat_file: Path, eval_file: Path, tmp_path: Path
) -> None:
    """A random model's predictions are nearly uniform; measured: KL falls to 0.84 here, 0.95 on other samples."""
    model = make_llama(intermediate_size=128)
    settings = {"model__path": str(model), "quant__calibrate": str(chat_file), "lora__init": "cloq", "lora__r": 4}
    config = hb.load_config(**settings, lora__match_steps=30)
    calibrate_model(config, tmp_path / "plain")
    said: list[str] = []
    result = calibrate_model(config, tmp_path / "matched", match=match_start, say=said.append)
    matched = result.matched
    assert matched is not None
    assert matched["steps"] == 30
    assert matched["kl_last"] < 0.92 * matched["kl_first"]
    assert said[-1].startswith("start: 30 steps towards the 16-bit model's predictions")
    assert said[-2].startswith("start: step 20 of 30, KL ")
    assert f"about {format_bytes(matched['planned_memory'])} at the fullest moment" in said[-3]
    assert result.predicted_peak_memory >= matched["planned_memory"] > 0
    kl = [divergence(tmp_path / name, model, eval_file) for name in ("plain", "matched")]
    assert kl[1] < 0.98 * kl[0]
    info = load_adapter(tmp_path / "matched" / "start").info
    assert info["matched"] == {"steps": 30, "tokens": matched["tokens"]}
    assert info["base_sha256"] == load_adapter(tmp_path / "plain" / "start").info["base_sha256"]


def test_too_little_memory_leaves_the_closed_form(
    make_llama: Callable[..., Path], chat_file: Path, tmp_path: Path
) -> None:
    config = hb.load_config(
        model__path=str(make_llama(intermediate_size=128)), quant__calibrate=str(chat_file), lora__init="cloq"
    )

    def too_little(config: RunConfig, base: Path, say: Callable[[str], None]) -> dict[str, Any]:
        return match_start(replace(config, memory=replace(config.memory, budget="1MB")), base, say)

    said: list[str] = []
    result = calibrate_model(config, tmp_path / "base", match=too_little, say=said.append)
    assert result.matched is None
    assert said[-1].startswith("start: not matched to the 16-bit model: memory.budget: ")
    assert "matched" not in load_adapter(tmp_path / "base" / "start").info


def test_the_steps_are_made_on_the_cpu(tiny_llama: Path, chat_file: Path, tmp_path: Path) -> None:
    """Where the 16-bit model is that they follow, whatever else the machine has."""
    for device in ("auto", "cuda"):
        config = hb.load_config(
            model__path=str(tiny_llama), model__device=device, quant__calibrate=str(chat_file), lora__match_steps=2
        )
        assert _settings(config, tmp_path).model.device == "cpu"
