"""The run as a picture: loss and held-out loss, learning rate, speed and memory over the steps."""

from __future__ import annotations

from pathlib import Path

from halfbyte.train.metrics import Metrics


def draw_curves(metrics: Metrics, path: Path, title: str) -> None:
    """Write a PNG of the run's curves to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = metrics.steps
    x = [m.step for m in steps]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 3, height_ratios=[2, 1])
    loss = figure.add_subplot(grid[0, :])
    loss.plot(x, [m.loss for m in steps], color="#9db8d2", linewidth=1, label="training, each step")
    loss.plot(x, _smoothed([m.loss for m in steps]), color="#1f5a91", linewidth=2, label="training, smoothed")
    if metrics.evals:
        points = dict(metrics.evals)
        loss.plot(list(points), list(points.values()), "o-", color="#c8553d", label="held-out")
        for step, value in (min(points.items()), max(points.items())):
            loss.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(4, 7), color="#c8553d")
    loss.set(ylabel="loss per supervised token", xlabel="step")
    loss.legend(frameon=False)
    panels = [
        ("learning rate", [m.lr for m in steps]),
        ("supervised tokens / s", [m.supervised_tokens / m.seconds for m in steps]),
        ("memory, GB", [m.memory / 1e9 for m in steps]),
    ]
    for column, (name, values) in enumerate(panels):
        axis = figure.add_subplot(grid[1, column])
        axis.plot(x, values, color="#1f5a91", linewidth=1)
        axis.set(title=name, xlabel="step", ylim=(0, max(values) * 1.15))
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without bias towards the first value."""
    result, average, norm = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(average / norm)
    return result
