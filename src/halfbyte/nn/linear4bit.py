"""Linear4bit: a frozen linear layer whose weight is held, saved and multiplied in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

import halfbyte.kernels  # noqa: F401  (registers the fast implementations of the operators)
from halfbyte.config.formats import bits_of
from halfbyte.errors import ConfigError
from halfbyte.quant import QuantizedWeight, quantize
from halfbyte.quant.blocks import NESTED_BLOCKSIZE, num_blocks, num_code_bytes, num_constants


class _PackedData(Tensor):
    """What `PackedCodes.data` gives: plain bytes, except that adding a float update to them is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _refuse(self, _: object) -> Tensor:
        raise ConfigError(
            "a 4-bit weight cannot take an adapter in",
            where="merge",
            why="rounding the sum to 4 bits again erases most of a small update",
            fix="Call dequantize() on the base model first (PEFT: model.get_base_model().dequantize()), then merge",
        )

    __iadd__ = __isub__ = _refuse

    def clone(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().clone(*args, **kwargs).as_subclass(_PackedData)


class PackedCodes(nn.Parameter):
    """The `weight` of a Linear4bit: (ceil(out*in/2), 1) uint8, never trained.

    PEFT's plain `lora.Linear` merges by ``base_layer.weight.data += delta``; this type is what makes that say why
    it cannot be done, in place of torch's complaint about dtypes.
    """

    def __new__(cls, codes: Tensor) -> Self:
        return super().__new__(cls, codes, requires_grad=False)

    @property
    def data(self) -> Tensor:
        return nn.Parameter.data.__get__(self).as_subclass(_PackedData)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCodes:
        copy: PackedCodes = memo.setdefault(id(self), PackedCodes(self.detach().clone()))
        return copy

    def __reduce_ex__(self, proto: Any) -> Any:
        return nn.Parameter(self.detach(), requires_grad=False).__reduce_ex__(proto)


_SLICE_ELEMENTS = 2**18
"""Of a weight that are decoded at a time."""


class Linear4bit(nn.Linear):
    """``y = x @ dequantize(weight)^T + bias`` with a frozen 4-bit weight; gradients reach `x` (and `bias`) only.

    A subclass of nn.Linear, so that PEFT's "all-linear" finds it. Saves and loads bitsandbytes' keys. `.half()`,
    `.to(dtype)` and the like move it but never cast it: its bytes mean nothing in another dtype.

    Args:
        compute_dtype: what the product runs in; None takes the input's dtype. The output has the input's dtype.
        weight_dtype: what `dequantize()` gives by default and what is written into saved files.
    """

    absmax: Tensor
    nested_absmax: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, quant_type: str = "nf4", blocksize: int = 64,
        double_quant: bool = True, compute_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.blocksize = quant_type, blocksize
        self.compute_dtype, self.weight_dtype = compute_dtype, weight_dtype
        self.nested_offset = 0.0
        self._row_squares: Tensor | None = None
        count = in_features * out_features
        constants = num_constants(count, blocksize, quant_type)
        self._set_codes(torch.zeros(num_code_bytes(count, bits_of(quant_type)), dtype=torch.uint8, device=device))
        scale_dtype = torch.uint8 if double_quant else torch.float32
        nested = torch.zeros(num_blocks(constants, NESTED_BLOCKSIZE), device=device) if double_quant else None
        # Not persistent: state dicts hold them under bitsandbytes' names, "weight.absmax" and so on.
        self.register_buffer("absmax", torch.zeros(constants, dtype=scale_dtype, device=device), persistent=False)
        self.register_buffer("nested_absmax", nested, persistent=False)
        fresh = torch.zeros(out_features, dtype=weight_dtype, device=device) if bias else None
        self.register_parameter("bias", None if fresh is None else nn.Parameter(fresh, requires_grad=False))

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> Self:
        """A layer around `weight` (out_features, in_features), sharing its tensors."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias is not None, quant_type=weight.quant_type, blocksize=weight.blocksize,
            double_quant=weight.double_quant, compute_dtype=compute_dtype, weight_dtype=weight.dtype, device="meta",
        )  # fmt: skip
        layer.quantized_weight = weight
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, *, quant_type: str = "nf4", blocksize: int = 64,
        double_quant: bool = True, scale: str = "auto", compute_dtype: torch.dtype | None = None,
    ) -> Self:  # fmt: skip
        """Quantize `weight` (out_features, in_features), as `halfbyte.quantize` does, and make a layer of it."""
        quantized = quantize(
            weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant, scale=scale
        )
        return cls.from_quantized(quantized, bias, compute_dtype=compute_dtype)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight, sharing this layer's tensors."""
        return QuantizedWeight(
            codes=self._codes, absmax=self.absmax, nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset, quant_type=self.quant_type, blocksize=self.blocksize,
            shape=(self.out_features, self.in_features), dtype=self.weight_dtype,
        )  # fmt: skip

    @quantized_weight.setter
    def quantized_weight(self, weight: QuantizedWeight) -> None:
        if weight.shape != (self.out_features, self.in_features):
            raise ConfigError(
                f"a weight of shape {weight.shape} does not fit a layer of {(self.out_features, self.in_features)}"
            )
        self._set_codes(weight.codes)
        self.absmax, self.nested_absmax = weight.absmax, weight.nested_absmax
        self.nested_offset, self.weight_dtype = weight.nested_offset, weight.dtype
        self.quant_type, self.blocksize = weight.quant_type, weight.blocksize
        self._row_squares = None

    @property
    def codes(self) -> Tensor:
        """The packed codes, flat: `weight` as operators take it."""
        return self._codes

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes, by the name at which PEFT knows another library's weight: DoRA calls `dequantize` then."""
        return self._codes

    @property
    def row_squares(self) -> Tensor:
        """The sum of squares of each row, (out_features,) float32: decoded once, a slice at a time."""
        if self._row_squares is None or self._row_squares.device != self.weight.device:
            slices = self.quantized_weight.row_slices(_SLICE_ELEMENTS)
            self._row_squares = torch.cat([part.dequantize(torch.float32).square_().sum(1) for part in slices])
        return self._row_squares

    def place_bytes(self, codes: Tensor, absmax: Tensor) -> None:
        """Other tensors for the same codes and scales: a weight that comes and goes (see `nn.streamed`)."""
        self._set_codes(codes)
        self.absmax = absmax

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, (out_features, in_features), in `dtype` (default: `weight_dtype`)."""
        return self.quantized_weight.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = torch.ops.halfbyte.linear_4bit(
            x.to(dtype), self._codes, self.absmax, self.nested_absmax, self.nested_offset, self.quant_type,
            self.blocksize, self.out_features, bias,
        )  # fmt: skip
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        scales = "8-bit" if self.nested_absmax is not None else "fp32"
        return f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}, {scales} scales"

    def _set_codes(self, codes: Tensor) -> None:
        # The product reads a plain tensor over the same bytes: compiled graphs refuse `PackedCodes.data`'s type.
        self._codes = codes.reshape(-1)
        self.weight = PackedCodes(self._codes.view(-1, 1))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_codes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (copy.deepcopy, pickle) holds its bytes once, as the original does."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_codes(self.weight.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        self._set_codes(self.weight.detach())
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.device.type != "meta":
            for key, tensor in self.quantized_weight.bnb_tensors().items():
                destination[f"{prefix}weight.{key}"] = tensor

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        start = f"{prefix}weight."
        packed = state_dict.get(f"{prefix}weight")
        tensors = {key.removeprefix(start): state_dict[key] for key in list(state_dict) if key.startswith(start)}
        if packed is not None and tensors:
            weight = QuantizedWeight.from_bnb_tensors(packed, tensors, name=f"{prefix}weight").to(self.weight.device)
            self.quantized_weight = weight
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(start)}
            state_dict[f"{prefix}weight"] = self.weight
        elif packed is not None:
            error_msgs.append(f"{prefix}weight is not a 4-bit weight: its quant_state is missing")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
