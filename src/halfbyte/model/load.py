"""A base model into memory in 4 bits: read a tensor, quantize it, drop it. Peak = the result plus one slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.config import QuantConfig
from halfbyte.config.schema import check_chosen, check_stored
from halfbyte.dtypes import format_bytes
from halfbyte.errors import ModelError
from halfbyte.model.base_hash import BaseHash
from halfbyte.model.experts import split_experts
from halfbyte.model.int8 import Int8Weight, int8_names, read_int8, use_int8
from halfbyte.model.inventory import Inventory, inventory
from halfbyte.model.names import OTHER_HEADS, match_names
from halfbyte.model.placement import RESIDENT, Placement, is_streamed, stream_layers, stream_rows
from halfbyte.model.read import check_shape, read_quantized, read_unquantized, state_names, weight_of
from halfbyte.model.source import Source, TensorReader, first_line, open_source, recipe_of
from halfbyte.model.targets import modules_to_quantize
from halfbyte.model.tokens import NONE, Tokens, fill_grown, read_grown, tables_to_grow
from halfbyte.nn import FrozenLinear, Linear4bit
from halfbyte.nn.int8_embedding import Int8Embedding
from halfbyte.quant import QuantizedWeight
from halfbyte.store import LayerStore

if TYPE_CHECKING:
    from halfbyte.store.sharded import ShardedStore  # which loads FSDP2

CPU = torch.device("cpu")
Progress = Callable[[int, int, str], None]
"""Called with (tensors done, tensors in all, name)."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model, ready for adapters.

    Attributes:
        model: a transformers model whose linear layers are Linear4bit.
        source: where it came from.
        compute_dtype: of activations and matrix products.
        base_sha256: hash over the names and bytes of all its tensors, 4-bit weights as they are in memory.
        quant: {"quant_type": ..., "blocksize": ..., "double_quant": ...} of the weights in memory, and "scale" if it
            is not absmax.
        inventory: dtypes and bytes by group, and what was left unquantized and why.
        store: what lends the layers their bytes that are streamed or sharded, if any are.
    """

    model: PreTrainedModel
    source: Source
    compute_dtype: torch.dtype
    base_sha256: str
    quant: dict[str, Any]
    inventory: Inventory
    store: LayerStore | ShardedStore | None = None

    @property
    def origin(self) -> str:
        """One sentence: how the 4-bit weights came about."""
        bits, kind = "8-bit" if self.quant["double_quant"] else "float32", self.quant.get("scale", "absmax")
        recipe = f"{self.quant['quant_type']}, blocks of {self.quant['blocksize']}, {bits} scales ({kind})"
        if self.source.stored_quantization is None:
            return f"base: quantized while loading to {recipe}"
        return f"base: already quantized ({recipe}) and taken as it is, what [quant] says of them is not applied"

    @property
    def stream_text(self) -> str:
        """One sentence: what is streamed, and how; empty if nothing is."""
        if not isinstance(self.store, LayerStore):
            return ""
        read, held = (format_bytes(size) for size in (self.store.stored_bytes, self.store.nbytes))
        layers = len(self.store.layers)
        return f"base: {layers} layers are read as they compute, {read} through {held} of buffers; {self.store.how}"


def load_model(
    path: str, quant: QuantConfig, *, compute_dtype: torch.dtype, placement: Placement = RESIDENT,
    device: torch.device = CPU, on_progress: Progress | None = None, tokens: Tokens = NONE,
) -> LoadedModel:  # fmt: skip
    """Load the causal language model called `path`, quantizing every linear layer but the head on the way.

    A folder that already holds bitsandbytes' 4-bit weights is taken as it is. Matrices that stay unquantized
    (embeddings, head) keep the dtype of the file, or become int8 (`quant`); vectors are held in `compute_dtype`.

    Args:
        placement: where the 4-bit bytes live; all of them are read once, here, to check and to hash them.
        device: where the model computes. A tensor is read and quantized on the CPU, so to the same bytes, and moved
            before the next one is read.
        tokens: that embeddings and head have rows for, whatever the files have.

    Raises:
        ModelError: files are missing, damaged, or do not fit the config; a weight has NaN or Inf.
        ConfigError: weights that are not stored in 4 bits cannot be left on disk.
    """
    source, recipe, shown = open_source(path), quant.recipe, ""
    _check_stored(source, placement, quant)
    reader, model = source.open_tensors(mapped=placement.weights == "mmap"), skeleton(source)
    targets = _targets(model, reader, names := match_names(model, reader, path), quant, source)
    streamed = placement.streamed(name.rpartition(".")[0] for name in names if name.rpartition(".")[0] in targets)
    row_table = placement.row_table(model, names)
    int8, held = int8_names(model, quant) - {row_table}, list[Int8Weight]()
    grow = dict.fromkeys(tables_to_grow(model, tokens) - {row_table}, tokens.rows)
    with BaseHash() as base:
        for done, (name, stored_name) in enumerate(names.items()):
            if on_progress:
                on_progress(done, len(names), name)
            module_name, _, leaf = name.rpartition(".")
            if module_name in targets and leaf == "weight":
                weight = read_quantized(reader, stored_name, model.get_submodule(module_name), quant, path)
                base.add(name, weight.codes, weight.absmax, weight.nested_absmax)
                if shown in ("", "int8"):  # whose scales show little of their kind
                    recipe, shown = recipe_of(source, quant, weight), weight.quant_type
                if is_streamed(module_name, streamed):
                    weight = replace(weight, codes=weight.codes.new_empty(0), absmax=weight.absmax.new_empty(0))
                _place_linear4bit(model, module_name, weight.to(device), compute_dtype)
            elif name in int8:
                held.append(read_int8(model, name, reader, stored_name, path, base, grow.get(name, 0)))
            else:
                tensor = _unquantized(model, name, reader, stored_name, path, base, grow.get(name, 0))
                if name != row_table:
                    dtype = compute_dtype if tensor.is_floating_point() and tensor.dim() < 2 else tensor.dtype
                    _place(model, name, tensor.to(device, dtype))
    if row_table:
        stream_rows(model, reader, names[row_table], compute_dtype, tokens.rows, int8=quant.embeddings == "int8")
    model.tie_weights()
    use_int8(model, held, compute_dtype)
    _finish(model, compute_dtype, device)
    fill_grown(model, tokens)
    store = stream_layers(model, reader, streamed, names, placement) if streamed else None
    if on_progress:
        on_progress(len(names), len(names), "")
    return LoadedModel(
        model=model, source=source, compute_dtype=compute_dtype, base_sha256=base.hexdigest(),
        quant=recipe, inventory=inventory(model), store=store,
    )  # fmt: skip


def _unquantized(
    model: nn.Module, name: str, reader: TensorReader, stored: str, path: str, base: BaseHash, least: int
) -> Tensor:
    """Parameter `name`, hashed and as it is stored: the base is the same in every compute dtype."""
    if least:
        return read_grown(reader, stored, model.get_parameter(name), least, path, base, name)
    tensor = read_unquantized(reader, stored, model.get_parameter(name), path)
    base.add(name, tensor)
    return tensor


def _targets(
    model: PreTrainedModel, reader: TensorReader, names: dict[str, str], quant: QuantConfig, source: Source
) -> set[str]:
    """The modules in 4 bits; of a base that is stored so, what its maker left in 16 bits stays so."""
    if source.stored_quantization is None:
        return set(modules_to_quantize(model, quant.skip_modules))
    return {name.removesuffix(".weight") for name, stored in names.items() if state_names(reader, stored)}


def _check_stored(source: Source, placement: Placement, quant: QuantConfig) -> None:
    check_stored(placement.weights, source.label, in_4_bits=source.stored_quantization is not None)
    check_chosen(quant, source.label, in_4_bits=source.stored_quantization is not None)


def skeleton(source: Source) -> PreTrainedModel:
    """The model of `source`, experts with layers of their own; parameters on the meta device, buffers real."""
    with init_empty_weights(include_buffers=False):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(source.config, trust_remote_code=False)
        except Exception as error:  # whatever a constructor makes of numbers that do not fit each other
            why, fix = f"there is no {error}" if isinstance(error, KeyError) else first_line(error), ""
            if "AutoModelForCausalLM" in why:
                why, fix = f"transformers has none of the type {source.config.model_type}", OTHER_HEADS
            raise ModelError("no causal language model", where=source.label, why=why, fix=fix) from error
    split_experts(model)
    return model


def _place_linear4bit(model: nn.Module, name: str, weight: QuantizedWeight, compute_dtype: torch.dtype) -> None:
    old = model.get_submodule(name)
    check_shape(weight.shape, weight_of(old).T if isinstance(old, Conv1D) else weight_of(old), f"{name}.weight")
    layer = Linear4bit.from_quantized(weight, compute_dtype=compute_dtype)
    layer.bias = cast(nn.Parameter, old.bias)  # still empty, or already read
    model.set_submodule(name, layer)


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))


def _finish(model: PreTrainedModel, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Make activations `compute_dtype` wherever weights are not, and freeze; on `device`."""
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(f"{len(left)} tensors were not loaded, first {left[0]!r}")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and {module.weight.dtype, compute_dtype} != {torch.float32}:
            # Also of one 16-bit dtype: torch's bfloat16 product copies a whole head for a row of logits.
            model.set_submodule(name, FrozenLinear(weight_of(module), module.bias))
        elif type(module) is Int8Embedding:
            continue
        elif isinstance(module, nn.Embedding) and module.weight.dtype != compute_dtype:
            module.register_forward_hook(partial(_cast_output, compute_dtype))
        elif type(module) is Conv1D and module.weight.dtype != compute_dtype:
            weight = nn.Parameter(weight_of(module).T.contiguous(), requires_grad=False)
            model.set_submodule(name, FrozenLinear(weight, module.bias))
        elif not isinstance(module, nn.Linear | nn.Embedding):  # convolutions and the like have no mixed product
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(compute_dtype)
    model.config.dtype = compute_dtype
    model.requires_grad_(False)
    model.eval()
    if device.type != "cpu":
        model.to(device)  # what is not there yet: buffers, tables in int8


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
