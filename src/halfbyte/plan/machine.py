"""What the plan must know of the machine: processor features, threads, what Python and the libraries take, speeds."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte.plan.gpu import Gpu, find_gpu

RUNTIME = 470_000_000
"""Resident bytes of Python, torch, transformers and PEFT in a training process, beside every tensor counted elsewhere.
Measured on Linux x86-64 (torch 2.13 for CPUs, transformers 5.23, PEFT 0.21, Python 3.11) as `train` does in its own
process: resident memory when the data is read, before the base is loaded, and what grows later (train/planning.py)."""
BITSANDBYTES = 120_000_000
"""More where bitsandbytes is installed: PEFT imports it."""
TOKENIZER = 6.0
"""Resident bytes for each byte of tokenizer.json."""
_MEASURED = ("panel_rows", "runtime", "gflops")
"""What a file of measurements may say of a `Machine`; a newer halfbyte's may say more."""
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "halfbyte")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a run is planned for.

    Attributes:
        threads: of matrix products.
        bf16_units: the CPU multiplies bfloat16 natively.
        panel_rows: by dtype, from how many rows on products decode panels of a weight (kernels/crossover.py); none
            where tiles always serve, or nothing was measured.
        runtime: resident bytes beside tensors, measured in a process of these versions; None: the constants above.
        gflops: measured floating-point operations of a training step, 1e9/s, by compute dtype; on a GPU by its name
            before that.
        gpu: the CUDA device, if there is one.
        ranks: processes of the run that share this machine's memory; each has a GPU of its own.
        world: processes of the run on all machines.
    """

    threads: int = 1
    bf16_units: bool = False
    panel_rows: dict[str, int | None] = field(default_factory=dict)
    runtime: int | None = None
    gflops: dict[str, float] = field(default_factory=dict)
    gpu: Gpu | None = None
    ranks: int = 1
    world: int = 1

    @property
    def compute_dtype(self) -> str:
        """What quant.compute_dtype = "auto" becomes (model/compute_dtype.py)."""
        return "bfloat16" if self.bf16_units else "float32"


def this_machine(calibration: Path | None = None, threads: int | None = None) -> Machine:
    """This machine, with what an earlier command measured on it and left in the file `calibration`."""
    count = threads or len(os.sched_getaffinity(0))
    machine = Machine(threads=count, bf16_units=_has_bf16_units(), gpu=find_gpu())
    measured = _read(calibration).get(calibration_key(), {}) if calibration else {}
    return replace(machine, **{key: value for key, value in measured.items() if key in _MEASURED})


def physical_memory() -> int | None:
    """Bytes of RAM; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def calibration_key() -> str:
    """The versions that measurements hold for."""
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in _PACKAGES)])


@cache  # finding out a version takes 3 ms
def default_runtime() -> int:
    """Where nothing was measured."""
    return RUNTIME + (BITSANDBYTES if _version("bitsandbytes") else 0)


def write_calibration(
    path: Path, *, runtime: int | None = None, gflops: dict[str, float] | None = None,
    panel_rows: dict[str, int | None] | None = None,
) -> None:  # fmt: skip
    """Keep measurements for later plans; what is None stays as it was."""
    known = _read(path)
    entry = known.setdefault(calibration_key(), {})
    if runtime is not None:
        entry["runtime"] = runtime
    if panel_rows is not None:
        entry["panel_rows"] = panel_rows
    entry.setdefault("gflops", {}).update(gflops or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short: nothing was measured
        return {}
    return known if isinstance(known, dict) else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _has_bf16_units() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("\n\n")[0]
    except OSError:
        return False
    words = next((line for line in flags.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in words
