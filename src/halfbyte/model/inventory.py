"""What a loaded model holds: dtypes and bytes by group, and every large weight that is not quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.dtypes import format_bytes
from halfbyte.nn import Linear4bit

LARGE = 1_000_000
"""Bytes above which a weight that is not quantized is listed with its reason."""

LINEARS, EMBEDDINGS, HEAD, NORMS, OTHER = "quantized linears", "embeddings", "head", "norms and biases", "other"
GROUPS = (LINEARS, EMBEDDINGS, HEAD, NORMS, OTHER)

EXPERTS = "fused expert weights (one 3-D tensor), stored so beside quantized layers or of a kind not supported"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: the tensors of one group in one dtype."""

    group: str
    dtype: str
    """torch's name, or the codebook ("nf4")."""
    tensors: int
    parameters: int
    """Weights: a packed byte holds several."""
    bytes: int
    """With the scales of quantized weights."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Dtypes and bytes of a model; ``str()`` is a table."""

    rows: tuple[Row, ...]
    unquantized: list[tuple[str, int, str]]
    """(name, bytes, reason) of every weight matrix over `LARGE` bytes that is not quantized."""

    @property
    def bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'group':<18}{'dtype':<10}{'tensors':>8}{'parameters':>16}{'bytes':>18}"]
        lines += [
            f"{row.group:<18}{row.dtype:<10}{row.tensors:>8}{row.parameters:>16,}{row.bytes:>18,}" for row in self.rows
        ]
        tensors, parameters = (sum(getattr(row, key) for row in self.rows) for key in ("tensors", "parameters"))
        lines.append(f"{'total':<28}{tensors:>8}{parameters:>16,}{self.bytes:>18,}  ({format_bytes(self.bytes)})")
        lines += [f"not quantized: {name} ({format_bytes(size)}): {reason}" for name, size, reason in self.unquantized]
        return "\n".join(lines)


def inventory(model: nn.Module, reasons: Mapping[str, str] | None = None, *, large: int = LARGE) -> Inventory:
    """Count every parameter and buffer of `model` once (a tied weight under its first name).

    Args:
        reasons: why a module was left as it is, by module name; what is not named gets the reason its kind has.
        large: bytes above which an unquantized weight is listed.
    """
    head = _head(model)
    totals: dict[tuple[str, str], list[int]] = {}
    unquantized: list[tuple[str, int, str]] = []
    for name, tensor, module in _tensors(model):
        if isinstance(module, Linear4bit) and name.endswith("weight"):
            weight = module.quantized_weight
            key, count, size = (LINEARS, weight.quant_type), module.in_features * module.out_features, weight.nbytes
        else:
            group, scales = _group(tensor, module, head), getattr(module, "scales", None)
            key, count, size = (group, str(tensor.dtype).removeprefix("torch.")), tensor.numel(), tensor.nbytes
            if name.endswith("weight") and scales is not None:
                size += scales.nbytes
            elif tensor.ndim >= 2 and size > large and isinstance(tensor, nn.Parameter):
                given = (reasons or {}).get(name.rpartition(".")[0])
                unquantized.append((name, size, given or _reason(tensor, module, head)))
        total = totals.setdefault(key, [0, 0, 0])
        for index, amount in enumerate((1, count, size)):
            total[index] += amount
    rows = tuple(
        Row(group=group, dtype=dtype, tensors=tensors, parameters=parameters, bytes=size)
        for (group, dtype), (tensors, parameters, size) in sorted(
            totals.items(), key=lambda item: (GROUPS.index(item[0][0]), item[0][1])
        )
    )
    return Inventory(rows=rows, unquantized=unquantized)


def expert_weights(model: nn.Module) -> list[str]:
    """Names of fused expert weights, which no linear layer holds and so nothing quantizes."""
    return [name for name, tensor, module in _tensors(model) if _is_experts(tensor, module)]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor, nn.Module]]:
    """(name, parameter or buffer, its module), each tensor once; without the scales of 4-bit weights."""
    modules = dict(model.named_modules())
    named = [*model.named_parameters(), *model.named_buffers()]
    owned = [(name, tensor, modules[name.rpartition(".")[0]]) for name, tensor in named]
    return [
        (name, tensor, module)
        for name, tensor, module in owned
        if isinstance(tensor, nn.Parameter) or not (isinstance(module, Linear4bit) or name.endswith(".scales"))
    ]


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def _is_experts(tensor: torch.Tensor, module: nn.Module) -> bool:
    is_stack = isinstance(tensor, nn.Parameter) and tensor.ndim == 3 and min(tensor.shape) > 1
    return is_stack and not isinstance(module, nn.modules.conv._ConvNd)


def _group(tensor: torch.Tensor, module: nn.Module, head: nn.Module | None) -> str:
    if not isinstance(tensor, nn.Parameter):
        return OTHER
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if module is head:
        return HEAD
    return NORMS if tensor.ndim <= 1 else OTHER


def _reason(tensor: torch.Tensor, module: nn.Module, head: nn.Module | None) -> str:
    if isinstance(module, nn.Embedding):
        tied = head is not None and getattr(head, "weight", None) is tensor
        return "embedding table" + (", also the output head (tied)" if tied else "")
    if module is head:
        return "output head"
    if _is_experts(tensor, module):
        return EXPERTS
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "linear layer that was left as it is"
    return f"parameter of {type(module).__name__}, which is not a linear layer"
