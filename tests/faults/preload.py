"""Compiles faultio.c and runs driver.py under it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """faultio.so; skips where there is no C compiler or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler on Linux: operations cannot be intercepted")
    library = folder / "faultio.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(HERE / "faultio.c"), "-o"]
    subprocess.run([*command, str(library), "-ldl"], check=True)
    return library


def drive(library: Path, *arguments: str | Path, timeout: float = 250) -> str:
    """What driver.py prints."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "driver.py", *arguments], env=environment, timeout=timeout,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
