"""A mixture's experts with layers of their own beside transformers' forward over 3-D weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, NemotronHConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from halfbyte.nn.experts import experts_forward, experts_of, is_covered, join, layers_of, split

TOKENS, HIDDEN, COUNT = 12, 16, 4
CASES: dict[str, tuple[type[nn.Module], Any, tuple[str, ...]]] = {
    "gated": (
        MixtralExperts, MixtralConfig(hidden_size=HIDDEN, intermediate_size=24, num_local_experts=COUNT),
        ("w1", "w3", "w2"),
    ),
    "without a gate": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=24, n_routed_experts=COUNT, moe_latent_size=None),
        ("up_proj", "down_proj"),
    ),
}  # fmt: skip


def pair(case: str) -> tuple[Any, Any]:
    """transformers' experts, and the same with layers of their own."""
    kind, config, names = CASES[case]
    torch.manual_seed(0)
    whole: Any = kind(config)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    apart = copy.deepcopy(whole)
    assert is_covered(apart)
    split(apart, names)
    first, down = (parameter.detach() for parameter in whole.parameters())
    for number, expert in enumerate(experts_of(apart)):
        parts = (*first[number].chunk(len(names) - 1), down[number])
        for name, values in zip(names, parts, strict=True):
            expert.get_submodule(name).weight = nn.Parameter(values.clone())
    return whole, apart


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and two of the first three experts for each token; none has the last."""
    torch.manual_seed(1)
    chosen = torch.stack([torch.randperm(COUNT - 1)[:2] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN, requires_grad=True), chosen, torch.rand(TOKENS, 2)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_transformers(case: str) -> None:
    whole, apart = pair(case)
    x, chosen, weights = routed()
    expected = whole(x, chosen, weights)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    found = experts_forward(apart, x, chosen, weights)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


def test_experts_without_tokens_do_not_compute_and_an_index_beyond_them_is_none() -> None:
    _, apart = pair("gated")
    x, chosen, weights = routed()
    called: list[int] = []
    for number, expert in enumerate(experts_of(apart)):
        expert.get_submodule("w1").register_forward_hook(lambda *_, number=number: called.append(number))
    before = experts_forward(apart, x, chosen, weights)
    assert called == [0, 1, 2]
    chosen[0, 1] = COUNT
    after = experts_forward(apart, x, chosen, weights)
    assert torch.equal(after[1:], before[1:])
    torch.testing.assert_close(after[0], experts_forward(apart, x[:1], chosen[:1, :1], weights[:1, :1])[0])


def test_a_token_gets_the_same_whoever_comes_along() -> None:
    """To rounding; and whatever the order, all tokens are in their places."""
    _, apart = pair("gated")
    x, chosen, weights = routed()
    together = experts_forward(apart, x, chosen, weights)
    order = torch.randperm(TOKENS)
    torch.testing.assert_close(experts_forward(apart, x[order], chosen[order], weights[order]), together[order])
    alone = torch.cat([experts_forward(apart, *(t[i : i + 1] for t in (x, chosen, weights))) for i in range(TOKENS)])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("case", CASES)
def test_joined_they_are_what_they_were(case: str) -> None:
    whole, apart = pair(case)
    assert layers_of(apart) == CASES[case][2]
    join(apart)
    assert not layers_of(apart)
    assert {n: p.shape for n, p in apart.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(torch.equal(*both) for both in zip(apart.parameters(), whole.parameters(), strict=True))
