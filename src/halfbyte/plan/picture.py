"""Memory over one micro-batch, term by term, against the budget: the plan's ledger as a picture."""

from __future__ import annotations

from pathlib import Path

from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError
from halfbyte.plan.base import read_base
from halfbyte.plan.ledger import Moment
from halfbyte.plan.machine import Machine
from halfbyte.plan.phases import compute_dtype, phases, worst_case
from halfbyte.plan.planner import Plan, apply_choices

ENDINGS = (".png", ".svg", ".pdf")
_COLOURS = {
    "runtime": "#8d99ae", "linears_4bit": "#1f5a91", "stream_ring": "#3f7fbf", "embeddings": "#4f8fc0",
    "head": "#7fb0d6", "norms_and_other": "#a9c9e4", "adapters": "#2a7f62", "optimizer_states": "#58a88a",
    "gradients": "#93cdb5", "workspace": "#b8b08d", "activations_saved": "#e2a03f",
    "activations_temporary": "#c8553d", "logits": "#8f2d56",
}  # fmt: skip
"""From below to above: what stays, then what comes and goes; terms without a colour of their own lie on top."""


def draw_plan(config: RunConfig, made: Plan, machine: Machine, path: Path) -> None:
    """Write the picture of `made`, the plan of `config`, to `path` (PNG, SVG, PDF by its ending).

    Raises:
        ConfigError: another ending.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError("no picture is written under this ending", where=str(path), fix=f"Give {', '.join(ENDINGS)}")
    chosen = apply_choices(config, made)
    base = read_base(config.model.path, config.quant, compute_dtype(config, machine))
    history = phases(chosen, base, machine, worst_case(chosen), history=True)["train"].history
    with_checkpoints = ", gradient checkpointing" if chosen.train.gradient_checkpointing else ""
    work = (
        f"{chosen.train.micro_batch_size} x {chosen.data.max_seq_len} tokens, rank {chosen.lora.r}{with_checkpoints}"
    )
    _draw(history, path, budget=made.budget, title=f"{Path(config.model.path).name}: one micro-batch of {work}")


def _draw(history: list[Moment], path: Path, *, budget: int | None, title: str) -> None:
    """`history`: a moment for every tensor that is taken in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    used = {name for moment in history for name, size in moment.terms.items() if size}
    names = [name for name in _COLOURS if name in used] + sorted(used - set(_COLOURS))
    x = range(len(history))
    heights = [[moment.terms.get(name, 0) / 1e9 for moment in history] for name in names]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.stackplot(
        x, heights, labels=[name.replace("_", " ") for name in names], step="post",
        colors=[_COLOURS.get(name, "#555555") for name in names],
    )  # fmt: skip
    peak = max(x, key=lambda at: history[at].total)
    axis.annotate(
        f"{history[peak].total / 1e9:.2f} GB: {history[peak].where}", (peak, history[peak].total / 1e9),
        textcoords="offset points", xytext=(-6, 6), ha="right", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}, zorder=5,
    )  # fmt: skip
    if budget is not None:
        axis.axhline(budget / 1e9, color="black", linestyle="--", linewidth=1.2, label="budget")
    top = max(history[peak].total, budget or 0) / 1e9
    axis.set(title=title, ylabel="GB", xlabel="tensors taken in, forward then backward", xlim=(0, len(history) - 1),
             ylim=(0, 1.12 * top))  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(path, dpi=110)
