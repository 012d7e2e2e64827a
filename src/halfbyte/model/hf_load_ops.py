"""The operations that transformers' loader runs on each weight of a checkpoint for our quantizer.

What is raised in an operation, transformers turns into a line of its loading report and an unspecific RuntimeError.
So what has to be refused is noted in the quantizer, which raises it once everything has been read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.nn import Linear4bit
from halfbyte.nn.linear4bit import PackedCodes
from halfbyte.quant import QuantizedWeight, quantize

if TYPE_CHECKING:
    from halfbyte.model.hf_quantizer import HalfbyteHfQuantizer


class Quantize(ConversionOps):  # type: ignore[misc]
    """A weight (out, in), or (in, out) of a Conv1D, to packed codes (ceil(n/2), 1) uint8."""

    def __init__(self, hf_quantizer: HalfbyteHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """``{full name: tensor}`` with the weights of 4-bit layers replaced by their codes."""
        quantizer, settings = self.hf_quantizer, self.hf_quantizer.quantization_config
        result: dict[str, Tensor] = {}
        for name, found in input_dict.items():
            value = _tensor(found)
            layer = _layer_of(model, name)
            if layer is None or not name.endswith(".weight"):
                result[name] = value
                continue
            quantizer.merged_targets.add(tuple(kwargs.get("target_patterns", ())))
            try:
                weight = quantize(
                    value.T.contiguous() if layer.from_conv1d else value, quant_type=layer.quant_type,
                    blocksize=settings.blocksize, double_quant=settings.bnb_4bit_use_double_quant,
                    scale=settings.scale, name=name,
                )  # fmt: skip
                result[name] = _keep(quantizer, layer, name, weight)
            except HalfbyteError as error:
                quantizer.refused.append(error)
                result[name] = PackedCodes(torch.zeros_like(layer.weight, device="cpu"))
        return result


class SplitExperts(ConversionOps):  # type: ignore[misc]
    """A 3-D weight of all experts to one or two of each, where files hold them so."""

    def convert(
        self, input_dict: dict[str, Any], target_patterns: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """``{name: (out, in)}`` of the targets, expert by expert, from the one weight (experts, out, in)."""
        names, (whole,) = target_patterns or [], map(_tensor, input_dict.values())
        halves = [half for expert in whole for half in expert.chunk(len(names) // len(whole))]
        return dict(zip(names, halves, strict=True))


class Deserialize(ConversionOps):  # type: ignore[misc]
    """bitsandbytes' keys of one weight to packed codes; any other weight passes through."""

    def __init__(self, hf_quantizer: HalfbyteHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype: torch.dtype | None = None
        """What a weight that is not quantized is cast to."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Deserialize:
        return Deserialize(self.hf_quantizer)  # transformers copies the operation for each weight

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        """``{"weight": codes}`` from ``{"weight": ..., "weight.absmax": ..., ...}``."""
        tensors = {key.removeprefix("weight."): _tensor(found) for key, found in input_dict.items()}
        stored = tensors.pop("weight", None)
        layer = _layer_of(model, full_layer_name)
        if layer is None and stored is not None and not tensors:
            return {"weight": stored.to(self.dtype) if stored.is_floating_point() else stored}
        try:
            if layer is None:
                why = "its config.json lists this layer under llm_int8_skip_modules, or it is the output head"
                raise ModelError("is stored quantized, against its config", where=full_layer_name, why=why)
            if stored is None or not tensors:
                why = "its config.json does not list this layer under llm_int8_skip_modules"
                raise ModelError("is not stored quantized, against its config", where=full_layer_name, why=why)
            weight = QuantizedWeight.from_bnb_tensors(stored, tensors, name=full_layer_name)
            return {"weight": _keep(self.hf_quantizer, layer, full_layer_name, weight)}
        except HalfbyteError as error:
            self.hf_quantizer.refused.append(error)
            held = model.get_parameter(full_layer_name)
            return {"weight": nn.Parameter(torch.zeros_like(held, device="cpu"), held.requires_grad)}


def _tensor(found: Any) -> Tensor:
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor


def _layer_of(model: Any, tensor_name: str) -> Any:
    module = model.get_submodule(tensor_name.rpartition(".")[0])
    return module if isinstance(module, Linear4bit) else None


def _keep(quantizer: HalfbyteHfQuantizer, layer: Any, name: str, weight: QuantizedWeight) -> Tensor:
    """Put `weight` aside for `layer` and return its codes, (ceil(n/2), 1) uint8."""
    need = (layer.out_features, layer.in_features)
    if weight.shape != need:
        raise ModelError(f"has shape {weight.shape}", where=name, why=f"the model's layer needs {need}")
    quantizer.loaded[name.removesuffix(".weight")] = weight
    layer._is_hf_initialized = False
    return PackedCodes(weight.codes.view(-1, 1))
