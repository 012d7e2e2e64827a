"""Adapters made at random, for what serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint import save_adapter


def write_random_adapter(folder: Path, model: Any, base_sha256: str, seed: int, scale: float = 0.3) -> Path:
    """`folder`, with an adapter of rank 4 on all linear layers of `model`, packed or not."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        name: module.weight.shape if module.weight.dim() == 2 and module.weight.is_floating_point()
        else (module.out_features, module.in_features)
        for name, module in model.named_modules() if name.endswith("_proj")
    }  # fmt: skip
    state = {}
    for name, (rows, cols) in shapes.items():
        for part, shape in (("A", (4, cols)), ("B", (rows, 4))):
            key = f"base_model.model.{name}.lora_{part}.weight"
            state[key] = torch.randn(shape, generator=random) * scale
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    save_adapter(folder, state, config, {"base_sha256": base_sha256})
    return folder
