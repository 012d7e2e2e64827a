"""Every way to hold the base and to train on it comes to the same losses, streamed or not, packed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.calibrate import calibrate_model, quantize_with_start
from halfbyte.config import RunConfig, load_config
from halfbyte.config.formats import QUANT_TYPES
from halfbyte.model.quantize import quantize_model
from halfbyte.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SAMPLES, STEPS, R = 12, 3, 8
TOKENS = {"lora__trainable_tokens": ["After", "<|im_end|>"]}  # the first is in every answer, and no token so far
VARIANTS: dict[str, dict[str, Any]] = {
    **{quant_type: {"quant__quant_type": quant_type} for quant_type in QUANT_TYPES},
    "4.5 bits": {"quant__bits": 4.5},
    "4.5 bits, calibrated": {"quant__bits": 4.5, "quant__calibrate": "DATA"},
    "blocks of 256": {"quant__blocksize": 256},
    "scales in float32": {"quant__double_quant": False},
    "scales of least error": {"quant__scale": "mse-signed"},
    "calibrated": {"quant__calibrate": "DATA"},
    "CLoQ": {"quant__calibrate": "DATA", "lora__init": "cloq", "lora__match_steps": 0},
    "LoftQ": {"lora__init": "loftq", "lora__loftq_rounds": 2},
    "PiSSA": {"lora__init": "pissa"},
    "rsLoRA": {"lora__use_rslora": True},
    "LoRA+": {"optim__lr_b_ratio": 4.0},
    "DoRA": {"lora__use_dora": True},
    "DoRA from LoftQ": {"lora__use_dora": True, "lora__init": "loftq"},
    "new tokens": TOKENS,
    "new tokens, int8 tables": TOKENS | {"quant__embeddings": "int8"},
    "new tokens, DoRA from LoftQ": TOKENS | {"lora__use_dora": True, "lora__init": "loftq"},
    "embedding and head whole": TOKENS | {"lora__modules_to_save": ["embed_tokens", "lm_head"]},
    "8-bit states": {"optim__bits": 8, "lora__r": 64},
    "paged": {"optim__paged": True, "memory__optimizer_budget": "40kB"},
    "gradient checkpointing": {"train__gradient_checkpointing": True},
    "mixture of experts": {"model__path": "qwen3_moe"},
}
WAYS = [
    {"data__packing": packing, "memory__weights": weights}
    for packing in (True, False)
    for weights in ("resident", "stream")
]  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """Which fit one pack, so that packs and micro-batches are the same step."""
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join(f"{line}\n" for line in chat_file.read_text().splitlines()[:SAMPLES]))
    return path


def written(config: RunConfig, folder: Path) -> Path:
    """The base in 4 bits, as `halfbyte quantize` writes it."""
    if config.quant.calibrate:
        calibrate_model(config, folder)
    elif config.lora.init != "random":
        quantize_with_start(config, folder)
    else:
        quantize_model(config.model.path, folder, config.quant)
    return folder


QUICK = ("nf4", "DoRA", "LoftQ", "new tokens", "mixture of experts")


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_streaming_and_packing_change_no_loss(
    variant: str, make_llama: Callable[..., Path], make_mixture: Callable[[str], Path], samples: Path, tmp_path: Path
) -> None:
    """Measured: the same bits, all of them (AVX-512)."""
    settings = {
        "model__path": str(make_llama()), "data__train": str(samples), "quant__compute_dtype": "float32",
        "lora__r": R, "lora__lora_alpha": 16.0, "optim__lr": 5e-3, "train__steps": STEPS, "data__max_seq_len": 2048,
        "train__micro_batch_size": 1, "train__save_every": 0,
    } | {key: str(samples) if value == "DATA" else value for key, value in VARIANTS[variant].items()}  # fmt: skip
    if "model__path" in VARIANTS[variant]:
        settings["model__path"] = str(make_mixture(VARIANTS[variant]["model__path"]))
    base = written(load_config(**settings | {"quant__embeddings": "as_stored"}), tmp_path / "base")
    settings |= {"model__path": str(base), "quant__calibrate": ""}
    found = []
    for number, way in enumerate(WAYS):
        config = load_config(**settings, **way, train__output=str(tmp_path / str(number)))
        size = 1 if config.data.packing else SAMPLES
        train(replace(config, train=replace(config.train, micro_batch_size=size)))
        lines = map(json.loads, (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines())
        found.append([line["loss"] for line in lines if line["event"] == "step"])
    assert len(found[0]) == STEPS
    assert found[0][-1] < found[0][0]
    packed, streamed, apart, apart_streamed = found
    assert streamed == packed
    assert apart_streamed == apart
    assert apart == pytest.approx(packed, abs=1e-5)
