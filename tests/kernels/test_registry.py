"""Which kernel serves, and that it can be told otherwise; each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halfbyte.kernels import kernel_report
from halfbyte.kernels.registry import OPS, cpu_choice

ROUND_TRIP = """
import torch, halfbyte.kernels
weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
y = torch.ops.halfbyte.linear_4bit(weight, codes, absmax, None, 0.0, "nf4", 64, 64, None)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def needs_library() -> None:
    if cpu_choice().library is None:
        pytest.skip(f"no native library: {cpu_choice().reason}")


def test_report_covers_every_op() -> None:
    rows = kernel_report()
    assert [row.op for row in rows if row.device == "cpu"] == list(OPS)
    assert all(row.kernel and row.reason for row in rows)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "reference"])
def test_environment_chooses_the_isa(isa: str) -> None:
    choice = cpu_choice()
    if isa != "reference" and (choice.library is None or isa not in choice.library.supported()):
        pytest.skip(f"no {isa} here")
    code = ROUND_TRIP + "print([row.kernel + '/' + row.reason for row in halfbyte.kernels.kernel_report()])"
    result = run(code, HALFBYTE_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"HALFBYTE_ISA={isa}") == len(OPS)
    assert isa in result.stdout


def test_unknown_isa_is_an_error_with_the_choices_at_first_use() -> None:
    result = run("import halfbyte.kernels; print('imported')" + ROUND_TRIP, HALFBYTE_ISA="AVX2")
    assert result.stdout == "imported\n"
    assert "ConfigError" in result.stderr
    assert "baseline, avx2, avx512, reference" in result.stderr


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_missing_or_broken_library_falls_back(tmp_path: object, content: bytes | None) -> None:
    path = f"{tmp_path}/_halfbyte_cpu.so"
    if content is not None:
        with open(path, "wb") as file:
            file.write(content)
    code = f"""
import halfbyte.kernels.cpu as cpu
cpu.find_library = lambda: {path if content is not None else None!r}
{ROUND_TRIP}
print(halfbyte.kernels.count_nonfinite(weight), {{row.kernel for row in halfbyte.kernels.kernel_report()}})
print(halfbyte.kernels.kernel_report()[0].reason)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "0 {'torch reference'}" in result.stdout
    assert ("not built" if content is None else "cannot be used") in result.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime() -> None:
    """Two copies of libgomp would be two thread pools fighting for the same cores."""
    needs_library()
    code = (
        ROUND_TRIP
        + """
weight @ weight
maps = open("/proc/self/maps").read().splitlines()
print(*sorted({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}))
"""
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, result.stdout
