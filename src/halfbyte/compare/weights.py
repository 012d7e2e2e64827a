"""What quantizing did to a model's weights: each layer's error, and how its values lie between the codebook's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.compare.cells import run_command
from halfbyte.config import RunConfig, load_config, settings_of
from halfbyte.config.model_config import read_model_config
from halfbyte.errors import ModelError
from halfbyte.model.load import skeleton
from halfbyte.model.names import match_names
from halfbyte.model.read import read_unquantized, state_names
from halfbyte.model.source import open_source
from halfbyte.quant import QuantizedWeight
from halfbyte.quant.codebook import codebook
from halfbyte.quant.mix import unit_of
from halfbyte.quant.nibbles import unpack_codes

BINS, LIMIT = 240, 1.5
"""Of the histogram of (weight - offset) / scale, from -LIMIT to LIMIT."""


@dataclass(frozen=True)
class LayerReport:
    """One weight.

    Attributes:
        error: squared error over the squared norm.
        worst_block: the same of the block where it is largest.
        clipped: share of the weights beyond the codebook's ends times their scale.
        negative: share of the blocks whose scale is negative.
        sensitivity: KL divergence of the model's predictions with the layer's unit alone in nf4, where quantizing
            measured it.
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    blocksize: int
    error: float
    worst_block: float
    clipped: float
    negative: float
    sensitivity: float | None = None


@dataclass(frozen=True)
class WeightReport:
    """All layers, and what they have in common.

    Attributes:
        error: of all weights together.
        values: of the format of most weights, 1 being what a block's largest gets; use: share of its codes;
            histogram: of its (weights - offset) / scale, BINS counts.
        loss, loss_16bit, perplexity, perplexity_16bit: of the text, where one was given.
        note: why there are none.
    """

    model: str
    folder: str
    layers: list[LayerReport]
    error: float
    values: list[float]
    use: list[float]
    histogram: list[int]
    text: str = ""
    loss: float | None = None
    loss_16bit: float | None = None
    perplexity: float | None = None
    perplexity_16bit: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For the JSON beside the page."""
        return asdict(self)


def weight_report(run: RunConfig, folder: Path) -> WeightReport:
    """Compare the 4-bit model in `folder` with `run.model.path`, of which it was made; one weight in memory at a time.

    With `run.data.eval` both are evaluated on it, each in a process of its own.

    Raises:
        ModelError: they do not belong together.
    """
    layers, total, norm, measured = [], 0.0, 0.0, _sensitivities(folder)
    kinds: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, original, weight in _pairs(run.model.path, folder):
        layer, squared, ratios, codes = _layer(name, original, weight)
        layers.append(replace(layer, sensitivity=measured.get(unit_of(layer.name))))
        total, norm = total + squared, norm + float(original.float().square().sum())
        table = codebook(weight.quant_type, weight.blocksize)
        fresh = (table.values / table.top, torch.zeros(len(table.values), dtype=torch.long), torch.zeros(BINS))
        _, use, histogram = kinds.setdefault(weight.quant_type, fresh)
        use += codes.bincount(minlength=len(use))
        histogram += (ratios / table.top).histc(BINS, -LIMIT, LIMIT)
    if not layers:
        raise ModelError("has no quantized weight", where=str(folder))
    values, use, histogram = max(kinds.values(), key=lambda kind: int(kind[1].sum()))
    found = WeightReport(
        run.model.path, str(folder), layers, total / norm, values.tolist(), (use / use.sum()).tolist(),
        histogram.long().tolist(),
    )  # fmt: skip
    return WeightReport(**{**vars(found), **_losses(run, folder, layers)})


def _sensitivities(folder: Path) -> dict[str, float]:
    record = folder / "halfbyte.json"
    found: dict[str, float] = read_model_config(record).get("sensitivities", {}) if record.is_file() else {}
    return found


def _pairs(path: str, folder: Path) -> Iterator[tuple[str, Tensor, QuantizedWeight]]:
    source = open_source(path)
    model, reader, written = skeleton(source), source.open_tensors(), SafetensorsFolder(folder)
    names = match_names(model, reader, path)
    for name in written.names():
        if not (states := state_names(written, name)):
            continue
        module = model.get_submodule(name.removesuffix(".weight"))
        original = read_unquantized(reader, names[name], model.get_parameter(name), path)
        tensors = {state.removeprefix(name + "."): written.read(state) for state in states}
        weight = QuantizedWeight.from_bnb_tensors(written.read(name), tensors, name=f"{folder}: {name}")
        yield name, original.T.contiguous() if isinstance(module, Conv1D) else original, weight


def _layer(name: str, original: Tensor, weight: QuantizedWeight) -> tuple[LayerReport, float, Tensor, Tensor]:
    """The layer's figures, its squared error, (weight - offset) / scale, and its codes."""
    size, flat = weight.blocksize, original.float().flatten()
    errors = (flat - weight.dequantize(torch.float32).flatten()).square()
    scales, offsets = weight.scales_and_offsets()
    each = scales.repeat_interleave(size)[: flat.numel()]
    moved = flat if offsets is None else flat - offsets.repeat_interleave(size)[: flat.numel()]
    ratios = torch.where(each != 0, moved / torch.where(each != 0, each, 1.0), 0.0)
    ends = codebook(weight.quant_type, weight.blocksize).values
    # Scales that were quantized themselves are a little off, and offsets: what lies beyond by so little is not cut.
    slack = 1.005 if offsets is None else 1.02
    whole = flat.numel() // size * size
    norms = flat[:whole].square().view(-1, size).sum(1)
    blocks = errors[:whole].view(-1, size).sum(1)[norms > 0] / norms[norms > 0]
    squared = float(errors.sum())
    layer = LayerReport(
        name=name.removesuffix(".weight"), shape=weight.shape, quant_type=weight.quant_type, blocksize=size,
        error=squared / max(float(flat.square().sum()), 1e-30),
        worst_block=float(blocks.max()) if blocks.numel() else 0.0,
        clipped=float(((ratios > float(ends.max()) * slack) | (ratios < float(ends.min()) * slack)).float().mean()),
        negative=float((scales < 0).float().mean()),
    )  # fmt: skip
    return layer, squared, ratios, unpack_codes(weight.codes, weight.bits, flat.numel()).long()


def _losses(run: RunConfig, folder: Path, layers: list[LayerReport]) -> dict[str, Any]:
    if not run.data.eval:
        return {"note": "no text was given: --eval-data FILE"}
    parts = ",".join(sorted({layer.name.rpartition(".")[2] for layer in layers}))
    found: dict[str, Any] = {"text": run.data.eval}
    use = [*settings_of(run), "quant.calibrate=", "quant.bits=0", "data.eval="]  # not how the base is made
    for key, changes in (("", [f"model.path={folder}"]), ("_16bit", [f"quant.skip_modules={parts}"])):
        settings = settings_of(load_config(None, [*use, *changes]))
        said, failed = run_command("eval", settings, "--data", run.data.eval)
        if failed:
            return {"note": f"not evaluated: {failed.line}"}
        found |= {f"loss{key}": said["loss"], f"perplexity{key}": said["perplexity"]}
    return found
