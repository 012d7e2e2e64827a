"""Adapters beside decoded panels: equal to the specification in float64, and called where the rule says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import halfbyte.kernels.crossover as crossover
from halfbyte.kernels import lora_panel
from halfbyte.kernels.group import Member
from halfbyte.kernels.registry import PANEL_ROWS_VARIABLE, cpu_choice
from halfbyte.quant import quantize

OUTS, INTO, RANK, SCALING = (96, 32), 128, 8, 0.5
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Of a result's norm. Measured at most 4e-7, and 3.4e-3: bfloat16 rounds what goes in and what comes out."""


def members_and_dense() -> tuple[list[Member], list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    members, dense = [], []
    for out in OUTS:
        weight = quantize(torch.randn(out, INTO) / INTO**0.5)
        a, b = torch.randn(RANK, INTO) / INTO**0.5, torch.randn(out, RANK) / RANK**0.5
        bias = torch.randn(out) if out == OUTS[0] else None
        members.append(Member(weight.op_args, out, bias, a, b, SCALING))
        wide = torch.zeros(out).double() if bias is None else bias.double()
        dense.append((weight.dequantize(torch.float32).double(), wide, a.double(), b.double()))
    return members, dense


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_panels_with_adapters_equal_the_oracle(dtype: torch.dtype, need_dx: bool) -> None:
    library = cpu_choice().library
    if library is None or not library.fused_linear:
        pytest.skip(f"no tiles that panels could take the place of: {cpu_choice().reason}")
    torch.manual_seed(0)
    members, dense = members_and_dense()
    x, g = torch.randn(70, INTO).to(dtype), torch.randn(70, sum(OUTS)).to(dtype)
    y, u = lora_panel.forward(x, members, library)
    dx, dA, dB = lora_panel.backward(g, x, u, members, library, need_dx=need_dx)
    assert (y.dtype, u.dtype, *{d.dtype for d in (*dA, *dB)}) == (dtype, torch.float32, torch.float32)
    gs, wide = g.double().split(list(OUTS), 1), x.double()
    pairs = [(y, torch.cat([wide @ (w + SCALING * b @ a).T + bias for w, bias, a, b in dense], 1))]
    pairs += [(u, torch.cat([wide @ a.T for _, _, a, _ in dense], 1))]
    pairs += [(mine, SCALING * b.T @ g_i.T @ wide) for mine, g_i, (*_, b) in zip(dA, gs, dense, strict=True)]
    pairs += [(mine, SCALING * g_i.T @ wide @ a.T) for mine, g_i, (_, _, a, _) in zip(dB, gs, dense, strict=True)]
    assert (dx is not None) == need_dx
    if dx is not None:
        assert dx.dtype == dtype
        pairs.append((dx, sum(g_i @ (w + SCALING * b @ a) for g_i, (w, _, a, b) in zip(gs, dense, strict=True))))
    for mine, expected in pairs:
        assert float((mine.double() - expected).norm() / expected.norm()) < BOUNDS[dtype]


def test_the_operator_takes_panels_where_the_rule_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_choice().library is None or not cpu_choice().library.fused_linear:
        pytest.skip(f"no tiles: {cpu_choice().reason}")
    monkeypatch.setattr(crossover, "_chosen", {})
    monkeypatch.setenv(PANEL_ROWS_VARIABLE, "float32=70")
    calls: list[int] = []
    for name in ("forward", "backward"):
        plain = getattr(lora_panel, name)
        monkeypatch.setattr(
            lora_panel, name, lambda *a, plain=plain, **k: (calls.append(len(a[0])), plain(*a, **k))[1]
        )
    torch.manual_seed(0)
    members, _ = members_and_dense()
    weights = [list(part) for part in zip(*(member.weight[:4] for member in members), strict=True)]
    group = (
        *weights, "nf4", 64, list(OUTS), [m.bias for m in members], [m.lora_A for m in members],
        [m.lora_B for m in members], [SCALING] * len(members),
    )  # fmt: skip
    for rows in (69, 70):
        x, g = torch.randn(rows, INTO), torch.randn(rows, sum(OUTS))
        _, u = torch.ops.halfbyte.lora_linear_4bit(x, *group)
        torch.ops.halfbyte.lora_linear_4bit_backward(g, x, u, *group, True)
    assert calls == [70, 70]
