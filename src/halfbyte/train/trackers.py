"""A run's figures for the tools that people watch many runs with: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from halfbyte.config import LogConfig, RunConfig, to_dict
from halfbyte.errors import ResourceError
from halfbyte.plan import Plan
from halfbyte.train.observer import Observer, StepMetrics

HELD_OUT = "held_out/loss"


@contextmanager
def trackers(log: LogConfig, output: Path) -> Iterator[list[Observer]]:
    """What `log` asks for, ready to be told; finished at the end of the ``with`` block.

    Their packages are imported here, before a plan is made: it counts what they take of memory.

    Raises:
        ResourceError: a package is not installed.
    """
    with ExitStack() as stack:
        found: list[Observer] = []
        if log.tensorboard:
            _need("tensorboard")
            found.append(stack.enter_context(TensorBoard(output / "tensorboard")))
        if log.wandb != "none":
            _need("wandb")
            found.append(stack.enter_context(Wandb(log.wandb)))
        yield found


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ResourceError(
            f"the package {package} is not installed", where=f"log.{package}",
            fix=f"Run: pip install halfbyte[{package}], or leave the setting out",
        )  # fmt: skip


def _figures(m: StepMetrics) -> dict[str, float]:
    return {
        "train/loss": m.loss, "train/lr": m.lr, "train/grad_norm": m.grad_norm,
        "speed/tokens_per_s": m.tokens / m.seconds, "speed/supervised_tokens_per_s": m.supervised_tokens / m.seconds,
        "memory/bytes": m.memory,
    }  # fmt: skip


class TensorBoard(Observer):
    """Event files in `folder`. A run that goes on takes the place of what an earlier one wrote of the same steps."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def on_step(self, metrics: StepMetrics) -> None:
        self._write(metrics.step, _figures(metrics))

    def on_eval(self, step: int, loss: float) -> None:
        self._write(step, {HELD_OUT: loss})

    def _write(self, step: int, figures: dict[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)


class Wandb(Observer):
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, else "halfbyte".

    Args:
        mode: offline writes into train.output/wandb alone (`wandb sync` sends it); online sends.
    """

    def __init__(self, mode: str) -> None:
        import wandb

        self._wandb, self._mode = wandb, mode
        self._run: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)

    def on_plan(self, config: RunConfig, plan: Plan) -> None:
        if self._run is not None:
            return
        settings = self._wandb.Settings(silent=True, console="off", save_code=False, disable_git=True)
        if settings.project is None:
            settings.project = "halfbyte"
        self._run = self._wandb.init(
            dir=config.train.output, mode=self._mode, name=Path(config.train.output).absolute().name,
            config={**to_dict(config), "planned_peak_memory": plan.peak_memory}, settings=settings,
        )  # fmt: skip

    def on_step(self, metrics: StepMetrics) -> None:
        self._run.log(_figures(metrics), step=metrics.step)

    def on_eval(self, step: int, loss: float) -> None:
        self._run.log({HELD_OUT: loss}, step=step)
