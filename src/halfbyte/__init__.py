"""halfbyte: QLoRA fine-tuning on the machine you have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.config import RunConfig, load_config
    from halfbyte.errors import HalfbyteError
    from halfbyte.merge import merge
    from halfbyte.model.fuse import fuse
    from halfbyte.model.hf_config import HalfbyteConfig, prequantized_config
    from halfbyte.model.load import load_model
    from halfbyte.model.quantize import quantize_model
    from halfbyte.model.source import load_tokenizer
    from halfbyte.nn import Linear4bit
    from halfbyte.optim import AdamW
    from halfbyte.plan import Plan, plan
    from halfbyte.quant import QuantizedWeight, quantize
    from halfbyte.train import TrainResult, train

_HOMES = {
    "AdamW": "halfbyte.optim",
    "HalfbyteConfig": "halfbyte.model.hf_config",
    "HalfbyteError": "halfbyte.errors",
    "Linear4bit": "halfbyte.nn",
    "Plan": "halfbyte.plan",
    "QuantizedWeight": "halfbyte.quant",
    "RunConfig": "halfbyte.config",
    "TrainResult": "halfbyte.train",
    "fuse": "halfbyte.model.fuse",
    "load_config": "halfbyte.config",
    "load_model": "halfbyte.model.load",
    "load_tokenizer": "halfbyte.model.source",
    "merge": "halfbyte.merge",
    "plan": "halfbyte.plan",
    "prequantized_config": "halfbyte.model.hf_config",
    "quantize": "halfbyte.quant",
    "quantize_model": "halfbyte.model.quantize",
    "train": "halfbyte.train",
}

__all__ = [
    "AdamW", "HalfbyteConfig", "HalfbyteError", "Linear4bit", "Plan", "QuantizedWeight", "RunConfig", "TrainResult",
    "fuse", "load_config", "load_model", "load_tokenizer", "merge", "plan", "prequantized_config", "quantize",
    "quantize_model", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `halfbyte --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    if _HOMES[name] == "halfbyte.quant":
        import_module("halfbyte.kernels")  # or quantize() would run its slow specification
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
