"""What calibration, a start and matching it give back, on two data sets and three seeds: plain torch, for a GPU.

usage: fidelity_gpu.py [--data docstrings functions] [--seeds 3] [--steps 60] [--work DIR]

SmolLM2-135M as `halfbyte quantize` and `halfbyte train` treat it, in float32 and without any of their code but the
readers of model and data and NF4's tables: a second implementation of what docs/fidelity.md says. Before training,
held-out loss and KL divergence from the 16-bit model at the answers' tokens, and loss on text from outside; after it,
held-out loss by seed.

The stored figures are of the script that this one was cleaned up from, on one H100 in 4 minutes: its loop over columns
(`choose`) was one Triton kernel, its training steps CUDA graphs (7.6e-6 from eager ones). On a small case both give
the same codes and start to the bit; in this form it has not run in full. The rate and number of the matching steps
were chosen by KL divergence on the VALIDATION samples of the first set, which nothing else saw.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write_result
from texts import docstring_data, function_data, licence_file, prose_file
from torch import Tensor

from halfbyte.cli.demo import smollm2_path
from halfbyte.config import DataConfig
from halfbyte.data import load_data
from halfbyte.model.source import load_tokenizer, open_source
from halfbyte.quant.codebook import codebook, dynamic_boundaries, dynamic_map

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION, MLP = "self_attn.{}_proj", "mlp.{}_proj"
KINDS = [ATTENTION.format(n) for n in "qkvo"] + [MLP.format(n) for n in ("gate", "up", "down")]
RANK, SCALING, BLOCK, PANEL, TOKENS, VALIDATION = 16, 2.0, 64, 128, 16_384, 100
FACTORS = [sign * f for sign in (1, -1) for f in (0.66, 0.72, 0.78, 0.84, 0.90, 0.96, 1.02, 1.08)]
LEVELS = codebook("nf4", 64).values.sort().values.to(DEVICE)
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2
MAP, MAP_BOUNDS = dynamic_map().to(DEVICE), dynamic_boundaries().to(DEVICE)

Weights = dict[str, Tensor]
Adapter = dict[str, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r), the scaling in B."""
Sample = tuple[Tensor, Tensor]
"""Token ids, and which tokens are learned."""
Linear = Callable[[str, Tensor], Tensor]


# The model


class Llama:
    """SmolLM2's forward pass; what a linear layer does is the caller's."""

    def __init__(self) -> None:
        source = open_source(smollm2_path())
        reader, config = source.open_tensors(), source.config
        self.weights = {n.removeprefix("model.").removeprefix("layers.").removesuffix(".weight"): reader.read(n)
                        .float().to(DEVICE) for n in reader.names()}  # fmt: skip
        self.layers, self.head_dim = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
        self.eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
        turns = 1 / theta ** (torch.arange(0, self.head_dim, 2, device=DEVICE).float() / self.head_dim)
        angles = (torch.arange(2048, device=DEVICE).float()[:, None] * turns).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.linears = [f"{i}.{kind}" for i in range(self.layers) for kind in KINDS]

    def layer(self, i: int, x: Tensor, linear: Linear) -> Tensor:
        """(sequences, tokens, hidden) through decoder layer `i`."""

        def norm(name: str, x: Tensor) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], self.weights[f"{i}.{name}"], self.eps)

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * self.cos[: x.shape[2]] + torch.cat([-second, first], -1) * self.sin[: x.shape[2]]

        h = norm("input_layernorm", x)
        heads = [
            linear(f"{i}.{ATTENTION.format(n)}", h).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for n in "qkv"
        ]
        mixed = F.scaled_dot_product_attention(
            turned(heads[0]), turned(heads[1]), heads[2], is_causal=True, enable_gqa=True
        )
        x = x + linear(f"{i}.{ATTENTION.format('o')}", mixed.transpose(1, 2).flatten(2))
        h = norm("post_attention_layernorm", x)
        gate, up = (linear(f"{i}.{MLP.format(n)}", h) for n in ("gate", "up"))
        return x + linear(f"{i}.{MLP.format('down')}", F.silu(gate) * up)

    def log_probabilities(self, ids: Tensor, at: Tensor, linear: Linear) -> Tensor:
        """(chosen, vocabulary): the predictions made at the tokens `at`."""
        x = F.embedding(ids, self.weights["embed_tokens"])
        for i in range(self.layers):
            x = self.layer(i, x, linear)
        x = F.rms_norm(x[at], x.shape[-1:], self.weights["norm"], self.eps)
        return F.linear(x, self.weights["embed_tokens"]).log_softmax(1)


def linear_of(weights: Weights, adapter: Adapter | None = None) -> Linear:
    """Of a base and, where there is one, its adapter."""

    def linear(name: str, x: Tensor) -> Tensor:
        y = F.linear(x, weights[name])
        return y if adapter is None else y + F.linear(F.linear(x, adapter[name][0]), adapter[name][1])

    return linear


# The data


def samples_of(path: Path) -> list[Sample]:
    """As training would see them."""
    data = load_data(str(path), load_tokenizer(smollm2_path()), DataConfig())
    return [(torch.from_numpy(s.input_ids).long(), torch.from_numpy(s.labels != -100)) for s in data]


def batch_of(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids, the tokens that predict what is learned, and the tokens that are text."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, learned = (pad([s[i] for s in samples], batch_first=True).to(DEVICE) for i in (0, 1))
    text = pad([torch.ones(len(s[0])).bool() for s in samples], batch_first=True).to(DEVICE)
    at = learned.roll(-1, 1)
    at[:, -1] = False
    return ids, at, text


# Quantizing


def nearest(x: Tensor) -> Tensor:
    """The level of the nearest code."""
    return LEVELS[torch.bucketize(x, BOUNDS)]


def inverse(scales: Tensor) -> Tensor:
    """1 where a scale is 0."""
    return scales.where(scales != 0, 1.0).reciprocal()


def double_quantized(scales: Tensor) -> Tensor:
    """What (out, blocks) scales are decoded to after 8 bits."""
    flat = scales.flatten()
    padded = F.pad(flat - flat.mean(), (0, -len(flat) % 256)).view(-1, 256)
    peak = padded.abs().amax(1, keepdim=True)
    values = MAP[torch.bucketize(padded / peak.clamp(min=1e-38), MAP_BOUNDS)] * peak
    return values.flatten()[: len(flat)].view(scales.shape) + flat.mean()


def stock(weight: Tensor) -> Tensor:
    """NF4 with double quantization as bitsandbytes makes it."""
    blocks = weight.view(-1, BLOCK)
    peak = blocks.abs().amax(1, keepdim=True)
    return (nearest(blocks * inverse(peak)) * double_quantized(peak)).view(weight.shape)


def weighted_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """(out, in / 64): of either sign, of least error weighted by column."""
    w = weight.view(-1, BLOCK)
    h = importance.clamp(min=1e-3 * float(importance.mean())).view(-1, BLOCK).repeat(len(weight), 1)
    peak, best, scales = w.abs().amax(1, keepdim=True), torch.full_like(w[:, 0], -1.0), torch.zeros_like(w[:, 0])
    for factor in FACTORS:
        values = nearest(w * inverse(factor * peak))
        along, norm = (w * h * values).sum(1), (values * values * h).sum(1).clamp(min=1e-38)
        scales = torch.where(along * along / norm > best, along / norm, scales)
        best = torch.maximum(best, along * along / norm)
    return scales.view(len(weight), -1)


class Moments:
    """Of a group of layers' inputs: x^T x, and t^T x with the 16-bit model's inputs t."""

    def __init__(self, own: Tensor, cross: Tensor) -> None:
        self.own, self.cross, self.damped = own, cross, own.clone()
        diagonal = self.damped.diagonal()
        diagonal[diagonal <= 0] = 1.0
        diagonal.add_(0.01 * diagonal.mean())
        self.factor = torch.linalg.cholesky(self.damped.double())
        self.order = diagonal.argsort(descending=True)
        self.ordered = self.damped[self.order][:, self.order]
        lower = torch.linalg.cholesky(self.ordered.double())
        self.upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()

    def wanted(self, weight: Tensor) -> Tensor:
        """What makes of x what `weight` makes of t."""
        shift = (weight @ (self.cross - self.own)).double()
        return weight + torch.cholesky_solve(shift.T, self.factor).T.float()

    def error(self, wrong: Tensor) -> float:
        """Of the outputs."""
        return float((wrong @ self.damped * wrong).sum())


def choose(state: Tensor, values: Tensor | None, scales: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """src/halfbyte/quant/choose.py, with what the codes mean for the codes."""
    state, chosen, changes = state.clone(), torch.empty_like(state), torch.empty_like(state)
    for i in range(len(state)):
        step = 1 / matrix[i, i]
        wish = state[i] if values is None else values[i] + state[i] * step
        chosen[i] = nearest(wish * inverse(scales[i])) * scales[i]
        changes[i] = (wish - chosen[i]) * step if values is None else chosen[i] - values[i]
        state[i + 1 :] -= matrix[i, i + 1 :, None] * changes[i]
    return chosen, changes


def rounded(wanted: Tensor, steps: Tensor, moments: Moments, begin: Tensor | None = None) -> Tensor:
    """Error feedback, unless there is something to begin at, and two sweeps."""
    goal, s = wanted.T[moments.order], steps.T[moments.order]
    panels = [slice(start, start + PANEL) for start in range(0, len(goal), PANEL)]
    if begin is None:
        state, values = goal.clone(), torch.empty_like(goal)
        for p in panels:
            values[p], errors = choose(state[p], None, s[p], moments.upper[p, p])
            state[p.stop :] -= moments.upper[p, p.stop :].T @ errors
    else:
        values = begin.T[moments.order]
    for _ in range(2):
        pull = moments.ordered @ (goal - values)
        for p in panels:
            values[p], changes = choose(pull[p], values[p], s[p], moments.ordered[p, p])
            pull[p.stop :] -= moments.ordered[p.stop :, p] @ changes
    result = torch.empty_like(values)
    result[moments.order] = values
    return result.T


def fitted(wanted: Tensor, values: Tensor, moments: Moments) -> Tensor:
    """(out, in / 64): for codes that mean `values`, a row's scales of least error of the outputs."""
    out, columns = wanted.shape
    parts = [slice(start, start + BLOCK) for start in range(0, columns, BLOCK)]
    h, blocks = moments.damped, (out, len(parts), BLOCK)
    squares = torch.stack([(values[:, p] @ h[p] * values).view(blocks).sum(2) for p in parts], 1)
    diagonal = squares.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-4 * diagonal.mean(1, keepdim=True))
    return torch.linalg.solve(squares, (wanted @ h * values).view(blocks).sum(2))


def quantized(wanted: Tensor, moments: Moments) -> Tensor:
    """The calibrated weight, decoded."""
    steps = double_quantized(weighted_scales(wanted, moments.own.diagonal())).repeat_interleave(BLOCK, 1)
    first = rounded(wanted, steps, moments)
    scales = double_quantized(fitted(wanted, first * inverse(steps), moments)).repeat_interleave(BLOCK, 1)
    second = rounded(wanted, scales, moments, nearest(first * inverse(steps)) * scales)
    return second if moments.error(wanted - second) < moments.error(wanted - first) else first


def start_of(missing: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """The A and B that give back most of it."""
    factor = moments.factor.float()
    torch.manual_seed(0)
    left, sizes, right = torch.svd_lowrank(missing @ factor, q=RANK + 16, niter=4)
    a = torch.linalg.solve_triangular(factor.T, right[:, :RANK], upper=True).T
    norms = a.norm(dim=1) * 3**0.5
    return a / norms[:, None], left[:, :RANK] * (sizes[:RANK] * norms)


@torch.no_grad()
def calibrated(model: Llama, samples: list[Sample]) -> tuple[Weights, Adapter]:
    """Base and start, layer by layer."""
    taken, count = list[Sample](), 0
    for sample in samples:
        if count < TOKENS:
            taken.append(sample)
            count += len(sample[0])
    ids, _, text = batch_of(taken)
    base, start = Weights(), Adapter()
    theirs = ours = F.embedding(ids, model.weights["embed_tokens"])
    for i in range(model.layers):
        inputs, known = Weights(), list[tuple[Tensor, Moments]]()

        def plain(name: str, x: Tensor, inputs: Weights = inputs) -> Tensor:
            inputs[name] = x
            return F.linear(x, model.weights[name])

        def written(name: str, x: Tensor, inputs: Weights = inputs, known: list[Any] = known) -> Tensor:
            if not known or known[-1][0] is not x:
                t, own = inputs[name][text], x[text]
                sizes = own.square().mean(1, keepdim=True).clamp(min=1e-12)
                capped = own * (sizes.median() / sizes).clamp(max=1.0)
                known.append((x, Moments(capped.T @ own, t.T @ capped)))
            moments = known[-1][1]
            wanted = moments.wanted(model.weights[name])
            a, b = start_of(wanted - quantized(wanted, moments), moments)
            base[name] = quantized(wanted - b @ a, moments)
            a, b = start[name] = start_of(wanted - base[name], moments)
            return F.linear(x, base[name] + b @ a)

        theirs, ours = model.layer(i, theirs, plain), model.layer(i, ours, written)
    return base, start


# Training and measuring


def fresh(model: Llama, seed: int) -> Adapter:
    """PEFT's start: A uniform, B zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: ((torch.rand(RANK, w.shape[1], generator=generator) * 2 - 1).to(DEVICE) / math.sqrt(w.shape[1]),
               torch.zeros(len(w), RANK, device=DEVICE))
        for name in model.linears if (w := model.weights[name]) is not None
    }  # fmt: skip


def trained(
    model: Llama,
    base: Weights,
    begin: Adapter,
    samples: list[Sample],
    *,
    steps: int,
    seed: int,
    matching: bool = False,
) -> Adapter:  # fmt: skip
    """After `steps` of 8 samples: at 2e-4 towards the labels, or at up to 1e-4 towards the 16-bit predictions."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    while len(order) < 8 * steps:
        order += torch.randperm(len(samples), generator=generator).tolist()
    own = {name: (a.clone().requires_grad_(), (b / SCALING).requires_grad_()) for name, (a, b) in begin.items()}
    leaves = [leaf for pair in own.values() for leaf in pair]
    optimizer = torch.optim.AdamW(leaves, lr=2e-4, weight_decay=0.0)
    for step in range(steps):
        ids, at, _ = batch_of([samples[i] for i in order[8 * step : 8 * step + 8]])
        found = model.log_probabilities(ids, at, linear_of(base, {n: (a, SCALING * b) for n, (a, b) in own.items()}))
        if matching:
            with torch.no_grad():
                goal = model.log_probabilities(ids, at, linear_of(model.weights))
            loss = (goal.exp() * (goal - found)).sum(1).mean()
            optimizer.param_groups[0]["lr"] = 1e-4 * (1 - step / steps) * min((step + 1) / 6, 1.0)
        else:
            loss = F.nll_loss(found, ids.roll(-1, 1)[at])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(leaves, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return {name: (a.detach(), SCALING * b.detach()) for name, (a, b) in own.items()}


@torch.no_grad()
def measured(model: Llama, samples: list[Sample], linear: Linear) -> tuple[float, float]:
    """Loss, and KL divergence from the 16-bit model, by learned token."""
    loss = kl = count = 0.0
    for start in range(0, len(samples), 16):
        ids, at, _ = batch_of(samples[start : start + 16])
        found, goal = (model.log_probabilities(ids, at, one) for one in (linear, linear_of(model.weights)))
        loss += float(F.nll_loss(found, ids.roll(-1, 1)[at], reduction="sum"))
        kl += float((goal.exp() * (goal - found)).sum())
        count += len(goal)
    return loss / count, kl / count


def rows_of(model: Llama, data: str, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every variant's figures on one data set."""
    files = docstring_data(options.work) if data == "docstrings" else function_data(options.work)
    train, held_out = map(samples_of, files)
    if data == "docstrings":
        train = train[:-VALIDATION]
    outside = [samples_of(prose_file(options.work)), samples_of(licence_file(options.work))]
    base, start = calibrated(model, train)
    matched = trained(model, base, start, train, steps=120, seed=77, matching=True)
    stock_base = {name: stock(model.weights[name]) for name in model.linears}
    variants: dict[str, tuple[Weights, Adapter | None]] = {
        "16 bits": (model.weights, None), "NF4": (stock_base, None),
        "calibrated, closed form": (base, start), "calibrated, matched": (base, matched),
    }  # fmt: skip
    for name, (weights, begin) in variants.items():
        linear = linear_of(weights, begin)
        before, kl = measured(model, held_out, linear)
        after = [
            measured(model, held_out, linear_of(weights, trained(
                model, weights, begin or fresh(model, seed), train, steps=options.steps, seed=seed)))[0]
            for seed in range(options.seeds)
        ]  # fmt: skip
        others = [measured(model, samples, linear)[0] for samples in outside]
        yield name, {"before": before, "kl": kl, "after": after, "outside": others}


def main() -> None:
    """Run, print, write results/fidelity-gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=["docstrings", "functions"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    model, sets = Llama(), dict[str, dict[str, Any]]()
    for data in options.data:
        sets[data] = {}
        for name, row in rows_of(model, data, options):
            sets[data][name] = row
            print(data, name, row, flush=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result = {"device": device, "steps": options.steps, "sets": sets}
    write_result(Path(__file__).parent / "results" / "fidelity-gpu.json", result)


if __name__ == "__main__":
    main()
