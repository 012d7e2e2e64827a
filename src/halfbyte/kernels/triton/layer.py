"""The elementwise parts of a decoder layer, each one pass over memory: norms, gated activation, rotary positions.

Float32 arithmetic and one rounding, as the operators' specifications have it (`kernels.norm`, `gated`, `rope`). A sum
over a row is one program's: it does not change from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton.decode import on_device_of, parts_of, power_of_two

ELEMENTS = 1024
"""Of a gated row that a program makes."""
SILU: tl.constexpr = tl.constexpr("silu")


@triton.jit
def norm_kernel(
    x, delta, weight, total, out, rstd, columns, eps, offset, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (rows, columns) = the norm of x, or of total = x + delta; rstd (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside, place = at < columns, row * columns + at
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value) / columns + eps))
    tl.store(rstd + row, scale)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + place, (value * scale * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad, x, weight, rstd, add, dx, columns, offset, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx (rows, columns), `add` added to it if given."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside, place = at < columns, row * columns + at
    scale = tl.load(rstd + row)
    unit = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    scaled = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * factor
    result = scale * (scaled - unit * (tl.sum(scaled * unit) / columns))
    if ADD:
        result += tl.load(add + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """The activation of `gate` and its derivative, float32."""
    if ACTIVATION == SILU:
        half = tl.sigmoid(gate)
        return gate * half, half * (1.0 + gate * (1.0 - half))
    else:  # GELU by its tanh formula: tanh(z) = 2 sigmoid(2 z) - 1
        bent = 2.0 * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) - 1.0
        slope = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        return 0.5 * gate * (1.0 + bent), 0.5 * (1.0 + bent) + 0.5 * gate * (1.0 - bent * bent) * slope


@triton.jit
def gated_kernel(gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out (rows, width) = act(gate) * up of gate_up (rows, 2 width)."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    active, _ = activate(gate, ACTIVATION)
    tl.store(out + row * width + at, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(grad, gate_up, d_gate_up, again, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """d_gate_up (rows, 2 width), and the forward's result again (rows, width)."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, first, second = at < width, row * 2 * width + at, row * 2 * width + width + at
    gate = tl.load(gate_up + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + second, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
    active, slope = activate(gate, ACTIVATION)
    tl.store(d_gate_up + first, (g * up * slope).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + second, (g * active).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(again + row * width + at, (active * up).to(again.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    qkv, cos, sin, heads, head_dim, stride, half, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """A row's heads in place: element i turns with element i + half; INVERSE is the transposed rotation."""
    row = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    first = qkv + row * stride + head * head_dim + at
    turn = row * 2 * half + at
    low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + turn, mask=at < half, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + turn + half, mask=at < half, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + turn, mask=at < half, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + turn + half, mask=at < half, other=0.0).to(tl.float32)
    if INVERSE:
        new_low, new_high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    else:
        new_low, new_high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    tl.store(first, new_low.to(qkv.dtype.element_ty), mask=inside)
    tl.store(first + half, new_high.to(qkv.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    """x (..., n) and perhaps delta -> their sum (x itself without delta), its norm, rstd (...)."""
    x, columns = x.contiguous(), x.shape[-1]
    total = x if delta is None else torch.empty_like(x)
    out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = power_of_two(columns)
    if x.numel():
        with on_device_of(x):
            norm_kernel[(rstd.numel(),)](
                x, x if delta is None else delta.contiguous(), weight.contiguous(), total, out, rstd, columns, eps,
                offset, ADD=delta is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return total, out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, add: Tensor | None
) -> Tensor:
    """dx, `add` added."""
    x, columns = x.contiguous(), x.shape[-1]
    dx, block = torch.empty_like(x), power_of_two(columns)
    if x.numel():
        with on_device_of(x):
            norm_backward_kernel[(rstd.numel(),)](
                grad.contiguous(), x, weight.contiguous(), rstd.contiguous(), x if add is None else add.contiguous(),
                dx, columns, offset, ADD=add is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return dx


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """(..., 2 I) -> (..., I)."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if out.numel():
        with on_device_of(out):
            gated_kernel[(out.numel() // width, parts_of(width, ELEMENTS))](
                gate_up, out, width, ACTIVATION=activation, BLOCK=ELEMENTS, num_warps=4
            )
    return out


def gated_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """-> d_gate_up (..., 2 I), and the forward's result again (..., I)."""
    grad, gate_up, width = grad.contiguous(), gate_up.contiguous(), grad.shape[-1]
    d_gate_up, again = torch.empty_like(gate_up), torch.empty_like(grad)
    if grad.numel():
        with on_device_of(grad):
            gated_backward_kernel[(grad.numel() // width, parts_of(width, ELEMENTS))](
                grad, gate_up, d_gate_up, again, width, ACTIVATION=activation, BLOCK=ELEMENTS, num_warps=4
            )
    return d_gate_up, again


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, *, inverse: bool) -> None:
    """In place, the first `heads` heads of rows whose elements lie side by side."""
    half = cos.shape[1] // 2
    if qkv.shape[0] and heads and half:
        with on_device_of(qkv):
            rope_kernel[(qkv.shape[0],)](
                qkv, cos.contiguous(), sin.contiguous(), heads, head_dim, qkv.stride(0), half, INVERSE=inverse,
                HEADS=power_of_two(heads), HALF=power_of_two(half), num_warps=4,
            )  # fmt: skip
