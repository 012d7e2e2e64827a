"""Contenders that take turns: each in a process of its own, one run at a time, round after round.

So a noisy neighbour hits them alike, and none shares its memory, BLAS or threads with another.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from peers import peer_python

SLOW = 1.5
"""Seconds from which a run is done once, not `rounds` times."""
STACKS = {
    "halfbyte": ("halfbyte", False),
    "halfbyte avx2": ("halfbyte", False),
    "torch dense": ("dense", False),
    "OpenBLAS dense": ("openblas", False),
    "bitsandbytes": ("bitsandbytes", False),
    "bitsandbytes-cpu-fork": ("bitsandbytes", True),
    "torchao NF4": ("torchao", True),
}
"""Name -> contender.py's word for it, and whether it lives in the peers' environment."""


class Contender:
    """A process of contender.py."""

    def __init__(self, name: str, python: Path | str, environment: Mapping[str, str]) -> None:
        what = STACKS[name][0]
        script = Path(__file__).with_name("contender.py")
        isa = {"HALFBYTE_ISA": "avx2"} if name == "halfbyte avx2" else {}
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", str(script), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment, **isa},
        )  # fmt: skip

    def run(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """One run: {"seconds": ...}, or {"cannot": why}."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(case), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        result: dict[str, Any] = json.loads(line) if line else {"cannot": "the process ended"}
        return result

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Field:
    """The contenders of a benchmark, and why some cannot do what is asked."""

    def __init__(self, names: list[str], work: Path, environment: Mapping[str, str] | None = None) -> None:
        self.cannot: dict[str, str] = {}
        self._contenders = {}
        for name in names:
            python = peer_python(work) if STACKS[name][1] else Path(sys.executable)
            if python is None:
                self.cannot[name] = "benchmarks/peers.py has not been run"
            else:
                self._contenders[name] = Contender(name, python, environment or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for contender in self._contenders.values():
            contender.close()

    def medians(self, rounds: int, **case: Any) -> dict[str, float]:
        """Median seconds of `case` by contender; the first round is thrown away, but for those that are slow."""
        seconds: dict[str, list[float]] = {}
        slow: set[str] = set()
        for number in range(rounds + 1):
            for name, contender in self._contenders.items():
                if name in slow or (number and name not in seconds):
                    continue
                result = contender.run(case)
                if "cannot" in result:
                    if not result["cannot"].startswith("LookupError"):  # it was not meant to
                        self.cannot[f"{name}: {case['task']}"] = result["cannot"]
                    continue
                slow |= {name} if result["seconds"] > SLOW else set()
                if number == 1:
                    seconds[name] = []
                seconds.setdefault(name, []).append(result["seconds"])
        if "halfbyte" not in seconds:
            raise SystemExit(f"halfbyte cannot run {case}: {self.cannot}")
        return {name: statistics.median(values) for name, values in seconds.items()}
