"""Processes that map the same 4-bit file hold its bytes once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from halfbyte.config import QuantConfig
from halfbyte.model.quantize import quantize_model

SCRIPT = """
import sys
import torch
from halfbyte.config import QuantConfig
from halfbyte.model.load import load_model
from halfbyte.model.placement import Placement

loaded = load_model(sys.argv[1], QuantConfig(), compute_dtype=torch.float32, placement=Placement(weights="mmap"))
loaded.model(input_ids=torch.arange(8).unsqueeze(0))  # touches every weight
print("ready", flush=True)
sys.stdin.read()
"""


def mapped(pid: int, name: str) -> dict[str, int]:
    """Bytes of the process's mappings of a file of that name, by the kernel's words: Rss, Shared_Clean, ..."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(name)
        elif inside and line.endswith(" kB"):
            key, size = line.removesuffix(" kB").split(":")
            sums[key] = sums.get(key, 0) + 1024 * int(size)
    return sums


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux, which tells what is shared")
def test_two_processes_share_one_copy(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    plain = make_llama(num_hidden_layers=4, hidden_size=256, intermediate_size=512)
    quantize_model(str(plain), tmp_path / "model", QuantConfig())
    with ExitStack() as stack:
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(tmp_path / "model")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            found = mapped(process.pid, "model.safetensors")
            assert found["Rss"] > 0.4 * 4 * (4 * 256 * 256 + 3 * 256 * 512) / 2, found  # of the layers' codes
            assert found["Private_Dirty"] == found["Private_Clean"] == 0, found
