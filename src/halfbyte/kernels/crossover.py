"""From how many rows of x on decoded panels through torch's BLAS beat the fused tiles: measured, once per machine.

Tiles won at every size on the machines seen so far (docs/speed.md); a matrix unit (AMX) or a BLAS tuned for another
CPU may win with many rows. The choice decides a product's last bits, so it must stay: it is kept in the user's cache
folder, by processor, instruction set and versions, and in every checkpoint; and it is measured on one thread, whatever
the number in use. Tiles round less and give the same bits on any number of threads, so panels have to win clearly.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.kernels import panel
from halfbyte.kernels.cpu import Library
from halfbyte.kernels.group import GroupView, Member
from halfbyte.kernels.registry import (
    LEAST_PANEL_ROWS,
    PANEL_ROWS_VARIABLE,
    cache_folder,
    cpu_choice,
    panel_rows_setting,
)
from halfbyte.quant import quantize

Rows = dict[str, int | None]
"""By dtype: from how many rows of x on panels serve; None: never."""
Ratios = dict[str, dict[str, float]]
"""By dtype and rows of x: how many times as long as panels tiles take, forward and backward together."""

SIZES = (1024, 256, LEAST_PANEL_ROWS)
"""Rows that are measured, from the most down while panels win: BLAS gains with rows."""
OUT, IN = 2048, 2048
ROUNDS = 3
MARGIN = 1.1
"""How many times as fast as tiles panels must be to serve."""


@dataclass(frozen=True)
class PanelRule:
    """The rule in use, and for each dtype what it says and why."""

    rows: Rows
    reasons: dict[str, str]

    def explain(self, dtype: torch.dtype) -> str:
        """A sentence on products of rows in `dtype`."""
        otherwise = "tiles at every size" if self.rows else "there are no tiles"
        return f"{_name(dtype)} products: {self.reasons.get(_name(dtype), otherwise)}"


_chosen: dict[str, PanelRule] = {}
"""By instruction set. A process keeps to one rule even where the file cannot be written."""


def panel_rule() -> PanelRule:
    """The rule for the instruction set in use; measured (a second) where it never was. Empty where there are no tiles.

    Raises:
        ConfigError: ``HALFBYTE_PANEL_ROWS`` cannot be read.
    """
    library = cpu_choice().library
    if library is None or not library.fused_linear:
        return PanelRule({}, {})
    isa = library.isa
    if isa not in _chosen:
        setting = panel_rows_setting()
        rule = _measured(library) if setting is None else _of_rows(setting, f"as {PANEL_ROWS_VARIABLE} says")
        _chosen.setdefault(isa, rule)
    return _chosen[isa]


def keep_to(rows: Rows) -> list[str]:
    """Go on by the rule of the checkpoint's run: another one would change the last bits of its products.

    Returns:
        What that changes here, a sentence each.
    """
    library, here = cpu_choice().library, panel_rule().rows
    if library is None or here == rows or not here or not rows:
        return []
    rule = _chosen[library.isa] = _of_rows(rows, "as the checkpoint's run")
    return [f"{name} products: {why}" for name, why in rule.reasons.items() if rows[name] != here.get(name)]


def panels_serve(x: Tensor, library: Library) -> bool:
    """Do products with x (m, n) run in decoded panels, though there are tiles for them?"""
    if x.shape[0] < LEAST_PANEL_ROWS:
        return False
    least = panel_rule().rows.get(_name(x.dtype))
    return least is not None and x.shape[0] >= least


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of_rows(rows: Rows, origin: str, ratios: Ratios | None = None) -> PanelRule:
    reasons = {}
    for name, least in rows.items():
        what = "tiles at every size" if least is None else f"decoded panels through torch from {least} rows on"
        if ratios is not None:
            most, ratio = max((int(size), ratio) for size, ratio in ratios[name].items())
            what += f", with {most} rows panels take {1 / ratio:.2f} times as long as tiles"
        reasons[name] = f"{what} ({origin})"
    return PanelRule(dict(rows), reasons)


def _measured(library: Library) -> PanelRule:
    """From the cache file, or measured now and written there; a file that cannot be read or written is no error."""
    key, file = _machine(library), cache_folder() / "crossover.json"
    known = _read(file)
    found, origin = known.get(key), "measured here before"
    if found is None:
        found, origin = measure(library), "measured here now"
        _write(file, known | {key: found})
    return _of_rows({name: least_rows(ratios) for name, ratios in found.items()}, origin, found)


def least_rows(ratios: dict[str, float]) -> int | None:
    """The least of the sizes from which on panels win clearly."""
    least = None
    for rows in sorted(map(int, ratios), reverse=True):
        if ratios[str(rows)] < MARGIN:
            break
        least = rows
    return least


def measure(library: Library) -> Ratios:
    """Tiles against panels on one thread, in turn: the least processor time of some rounds, without that of others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {_name(d): _ratios(d, library) for d in (torch.float32, torch.bfloat16) if panel.native(d, library)}
    finally:
        torch.set_num_threads(threads)


def _ratios(dtype: torch.dtype, library: Library) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    weight = quantize(torch.randn(OUT, IN, generator=generator)).op_args
    view = GroupView([Member(weight, OUT)], IN, dtype)
    ratios: dict[str, float] = {}
    for rows in SIZES:
        x, grad = (torch.randn(rows, n, generator=generator).to(dtype) for n in (IN, OUT))
        dx, y = torch.empty_like(x), torch.empty_like(grad)
        tiles = panels = math.inf
        for _ in range(ROUNDS):
            started = time.thread_time()
            view.linear(library, x, y, None)
            view.linear_backward(library, grad, None, None, dx)
            between = time.thread_time()
            panel.linear(x, weight, None, y, library)
            panel.linear_dx(grad, weight, dx, library)
            tiles, panels = min(tiles, between - started), min(panels, time.thread_time() - between)
        ratios[str(rows)] = round(tiles / panels, 3)
        if ratios[str(rows)] < MARGIN:
            break
    return ratios


def _machine(library: Library) -> str:
    """What the answer depends on."""
    try:
        package = version("halfbyte")
    except PackageNotFoundError:
        package = "unknown"
    return f"{_processor()}, {library.isa}, torch {torch.__version__}, halfbyte {package}"


def _processor() -> str:
    """Name and numbers as Linux says them; a virtual machine's name alone says little."""
    wanted = ("model name", "cpu family", "model", "stepping", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in lines)
    found = [value.strip() for name, _, value in pairs if name.strip() in wanted]
    return " ".join(found) or platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, Ratios]:
    """Every machine's ratios in `file`; empty where there are none that make sense."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        for ratios in known.values():
            for each in ratios.values():
                least_rows(each)
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return dict(known)


def _write(file: Path, known: dict[str, Ratios]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        pass  # measured again by the next process
