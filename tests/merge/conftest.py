"""An adapter for the tiny Llama: random factors, large enough to change what the model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoint import save_adapter, versions
from halfbyte.config import LoraConfig, QuantConfig
from halfbyte.model import load_model, load_tokenizer
from halfbyte.model.adapt import adapter_state, attach_lora
from halfbyte.model.source import tokenizer_sha256

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(model, size=..., **lora)`: the folder of an adapter for `model`, as training leaves one."""

    def make(model: Path, *, size: float = 0.1, seed: int = 0, record: bool = True, **lora: Any) -> Path:
        loaded = load_model(str(model), QuantConfig(), compute_dtype=torch.float32)
        adapted = attach_lora(loaded.model, LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: tensor if "lora_A" in name else torch.randn(tensor.shape, generator=generator) * size
            for name, tensor in adapter_state(adapted).items()
        }
        info = {
            "base": str(model), "base_sha256": loaded.base_sha256, "quant": loaded.quant, "versions": versions(),
            "tokenizer_sha256": tokenizer_sha256(load_tokenizer(str(model))),
        }  # fmt: skip
        folder = tmp_path_factory.mktemp("adapter") / "adapter"
        save_adapter(folder, state, adapted.peft_config["default"].to_dict(), info if record else {})
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapter(make_adapter: MakeAdapter, tiny_llama: Path) -> Path:
    """An adapter of rank 4 on every layer of `tiny_llama`."""
    return make_adapter(tiny_llama)
