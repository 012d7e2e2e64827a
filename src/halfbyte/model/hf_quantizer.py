"""The quantizer behind `HalfbyteConfig`: puts Linear4bit into a transformers model while `from_pretrained` loads it.

transformers builds the model on the meta device, asks the quantizer to replace layers, then hands each tensor of the
checkpoint to one of the operations of `hf_load_ops`: `Quantize` for 16-bit weights, `Deserialize` for
bitsandbytes' keys.

`model.is_loaded_in_4bit` stays unset: to those who ask it means bitsandbytes, and TRL casts adapters to bf16 for it.

Scales wait in the quantizer until loading is over: transformers fills every non-persistent buffer of the model with
fresh memory after the weights have been loaded, and the scales of a Linear4bit are such buffers.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from halfbyte.config.formats import STATE_KEYS
from halfbyte.errors import HalfbyteError, ModelError, ResourceError
from halfbyte.model.experts import joined_weights, joins_experts, split_experts
from halfbyte.model.hf_load_ops import Deserialize, Quantize, SplitExperts
from halfbyte.model.inventory import EXPERTS, Inventory, expert_weights, inventory
from halfbyte.model.source import METHOD
from halfbyte.nn import Linear4bit
from halfbyte.nn.experts import join, layers_of
from halfbyte.quant import QuantizedWeight

logger = logging.getLogger("halfbyte")


class HalfbyteHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' side of halfbyte.

    Attributes:
        inventory: dtypes and bytes of the loaded model, and what of it is not in 4 bits and why.
        reasons: why a linear layer was left as it is, by its name.
    """

    requires_calibration = False
    serialized_names = {  # noqa: RUF012  (transformers' name and type)
        "weight": [
            "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            *(f"weight.{key}" for key in STATE_KEYS),
        ]
    }  # fmt: skip

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # A copy: what the loaded model turned out to be is noted in it, and the caller may load another model with it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.inventory: Inventory | None = None
        self.loaded: dict[str, QuantizedWeight] = {}
        self.refused: list[HalfbyteError] = []
        self.merged_targets: set[tuple[str, ...]] = set()
        self.splits_experts = False
        self.reasons: dict[str, str] = {}
        self._skip: list[str] = []

    # -- what transformers asks ---------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        _refuse_offload(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """Without a wish: the accelerator if there is one, as with bitsandbytes."""
        return {"": torch.cuda.current_device()} if device_map is None and torch.cuda.is_available() else device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[Deserialize]]:
        return {"deserialize": Deserialize}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts that have layers of their own are read one by one, or out of the weight of all."""
        if self.splits_experts:
            weight_conversions = [each for each in weight_conversions if not joins_experts(each)]
            for name, parts in joined_weights(model).items():
                weight_conversions.append(WeightConverter([name], parts, [SplitExperts()]))
        result: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return result

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed bytes and scales are read as they are stored; what is not quantized gets the dtype of the model."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Deserialize):
                operation.dtype = dtype
                return None
        result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return result

    # -- before, while and after the weights are read -----------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._skip, self.reasons = self._modules_to_skip(model)
        settings = self.quantization_config
        if not self.pre_quantized or settings.is_ours:  # bitsandbytes leaves experts in 16 bits
            left = [name for name, _ in model.named_modules() if not should_convert_module(name, self._skip)]
            self.splits_experts = split_experts(model, left)
        for name, module in list(model.named_modules()):
            # A subclass of nn.Linear computes something else, which Linear4bit would silently drop.
            if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
                continue
            if not should_convert_module(name, self._skip):
                self.reasons.setdefault(name, "named in llm_int8_skip_modules")
                continue
            out_features, in_features = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
            layer = Linear4bit(
                in_features, out_features, module.bias is not None,
                quant_type=settings.layers.get(name, settings.bnb_4bit_quant_type),
                blocksize=settings.blocksize, double_quant=settings.bnb_4bit_use_double_quant,
                compute_dtype=settings.bnb_4bit_compute_dtype, weight_dtype=module.weight.dtype, device="meta",
            )  # fmt: skip
            # Initialised: no random numbers into packed bytes; taken back for each layer whose weight is found.
            vars(layer).update(from_conv1d=isinstance(module, Conv1D), _is_hf_initialized=True)
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.refused:
            first, *others = self.refused
            more = "; ".join(f"{error.where} {error.what}" for error in others[:5])
            why = f"{first.why}; and {len(others)} more: {more}".removeprefix("; ") if others else first.why
            raise ModelError(first.what, where=first.where, why=why, fix=first.fix)
        _refuse_offload(getattr(model, "hf_device_map", None))
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                if name in self.loaded:
                    module.quantized_weight = self.loaded.pop(name).to(module.weight.device)
                else:
                    self._initialise(model, name, module)
        # What is saved has the layout of the model's layers: packed weights cannot be split back into a checkpoint's.
        model._weight_conversions = [
            entry
            for entry in getattr(model, "_weight_conversions", None) or []
            if not (isinstance(entry, WeightConverter) and _is_ours(entry, self.merged_targets))
        ]
        self.quantization_config.resolve(
            skip_modules=sorted(set(self._skip)), model_dtype=model.config.dtype, experts=self.splits_experts
        )
        self.inventory = inventory(model, self.reasons)
        logger.info("%s\n%s", type(model).__name__, self.inventory)
        if experts := expert_weights(model):
            logger.warning("%d tensors stay unquantized, %s first: %s", len(experts), experts[0], EXPERTS)
        return model

    def _modules_to_skip(self, model: Any) -> tuple[list[str], dict[str, str]]:
        """(patterns of module names to leave alone, reason by module name)."""
        wished = self.quantization_config.llm_int8_skip_modules
        kept = list(model._keep_in_fp32_modules or [])
        reasons: dict[str, str] = {}
        for name, module in model.named_modules():
            if not should_convert_module(name, kept):
                reasons[name] = "kept in float32 by its architecture"
            if module is model.get_output_embeddings():
                reasons[name] = "output head"
        for name, source in model.all_tied_weights_keys.items():
            reasons[name.removesuffix(".weight")] = f"tied to {source}"
        if self.pre_quantized:  # the file was written by this rule of transformers, and is read by it
            skip = self.get_modules_to_not_convert(model, wished, kept)
        else:
            names = [name for name, _ in model.named_modules()]
            idle = [wish for wish in wished or () if all(should_convert_module(name, [wish]) for name in names)]
            if idle:
                logger.warning("llm_int8_skip_modules names no layer: %s", ", ".join(idle))
            skip = self.get_modules_to_not_convert(model, wished, kept, add_default_skips=True)
            # transformers takes the last parameter for the head, and misses a head whose last parameter is its bias.
            last = next(name for name, _ in reversed(list(model.named_parameters()))).rpartition(".")[0]
            reasons.setdefault(last, "output head (the last module)")
            skip = [*skip, last]
        return skip, reasons

    def _initialise(self, model: Any, name: str, layer: Linear4bit) -> None:
        """A layer that the checkpoint does not have stays 16-bit: it is new, and so has to be trained."""
        device, dtype = layer.weight.device, layer.weight_dtype
        fresh = _plain_layer(layer, torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device))
        if fresh.bias is not None:
            fresh.bias = nn.Parameter(torch.empty_like(fresh.bias))
        model.set_submodule(name, fresh)
        model.initialize_weights()
        self.reasons[name] = "not in the checkpoint: newly initialised"
        self._skip.append(name)
        logger.warning("%s is not in the checkpoint: newly initialised, not quantized", name)

    # -- the way back -------------------------------------------------------------------------------------------

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace every Linear4bit by its plain layer with the decoded weight, inside PEFT's wrappers too."""
        for name, module in list(model.named_modules()):
            if not isinstance(module, Linear4bit):
                continue
            plain = _plain_layer(module, module.dequantize(dtype))
            wrapper = model.get_submodule(name.rpartition(".")[0])
            if name.endswith(".base_layer"):
                plain.requires_grad_(False)
                if isinstance(plain, Conv1D):
                    wrapper.fan_in_fan_out = True
            model.set_submodule(name, plain)
        for module in filter(layers_of, model.modules()):
            join(module)
            model.config._experts_implementation, model._weight_conversions = "eager", None
        return model


def _plain_layer(layer: Linear4bit, weight: Tensor) -> nn.Linear | Conv1D:
    """An nn.Linear (a Conv1D, where one was replaced) around `weight` (out, in), with the bias of `layer`."""
    bias = layer.bias is not None
    plain: nn.Linear | Conv1D
    if getattr(layer, "from_conv1d", False):
        with torch.device("meta"):
            plain = Conv1D(layer.out_features, layer.in_features)
        plain.weight = nn.Parameter(weight.T.contiguous())
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
        plain.weight = nn.Parameter(weight)
    if layer.bias is not None:
        plain.bias = layer.bias
    plain.train(layer.training)
    return plain


def _is_ours(entry: Any, merged_targets: set[tuple[str, ...]]) -> bool:
    """Whether a conversion read bitsandbytes' keys or put several tensors of a checkpoint into one 4-bit weight."""
    reads_keys = any(isinstance(operation, Deserialize) for operation in entry.operations)
    return reads_keys or tuple(entry.target_patterns) in merged_targets


def _refuse_offload(device_map: Any) -> None:
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ResourceError(
            "part of the model would be kept on the CPU or the disk", where="device_map",
            why="4-bit layers do not move between devices while they run",
            fix="Give a device_map of accelerators only, or of the CPU only",
        )  # fmt: skip


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(HalfbyteHfQuantizer)
