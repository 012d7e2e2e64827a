"""Which kernel serves and why, that the environment can say otherwise, and that nothing else can stop a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.kernels import count_nonfinite, cpu, kernel_report
from halfbyte.kernels.registry import ISA_VARIABLE, LAYER_OPS, OPS, cpu_choice


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The choice of the library is made anew, in this test and after it."""
    library = cpu_choice().library
    before = library.isa if library is not None else ""
    cpu_choice.cache_clear()
    yield
    cpu_choice.cache_clear()
    if library is not None:
        library.force(before)


def round_trip() -> torch.Tensor:
    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    codes, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
    return torch.ops.halfbyte.linear_4bit(weight, codes, absmax, None, 0.0, "nf4", 64, 64, None)


def test_report_covers_every_op() -> None:
    rows = kernel_report()
    assert [row.op for row in rows if row.device == "cpu"] == [*OPS, *LAYER_OPS]
    assert all(row.kernel and row.reason for row in rows)


@pytest.mark.parametrize("isa", [*cpu.ISAS, "reference"])
@pytest.mark.usefixtures("fresh_choice")
def test_environment_chooses_the_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu_choice().library
    if isa != "reference" and (library is None or isa not in library.supported()):
        pytest.skip(f"no {isa} in this build or on this CPU")
    cpu_choice.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, isa)
    rows = [row for row in kernel_report() if row.device == "cpu"]
    assert all(f"{ISA_VARIABLE}={isa}" in row.reason for row in rows)
    assert all(isa in row.kernel for row in rows if row.op in OPS)
    assert round_trip().shape == (64, 64)


@pytest.mark.usefixtures("fresh_choice")
def test_unknown_isa_is_an_error_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "AVX2")
    with pytest.raises(ConfigError, match="Choose one of baseline, avx2, avx512, avx512_bf16, neon, reference"):
        round_trip()


@pytest.mark.usefixtures("fresh_choice")
def test_isa_this_cpu_lacks_is_an_error_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_choice().library is None:
        pytest.skip(f"no native library: {cpu_choice().reason}")
    cpu_choice.cache_clear()
    monkeypatch.setattr(cpu.Library, "force", lambda self, isa: False)
    monkeypatch.setenv(ISA_VARIABLE, "avx512")
    with pytest.raises(ConfigError, match="this CPU or build has no avx512"):
        round_trip()


@pytest.mark.parametrize("fault", ["missing", "broken", "other ABI"])
@pytest.mark.usefixtures("fresh_choice")
def test_library_that_cannot_serve_falls_back(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "other ABI":
        if cpu.find_library() is None:
            pytest.skip("no native library: it was not built")
        monkeypatch.setattr(cpu, "ABI_VERSION", -1)
    else:
        path = tmp_path / "_halfbyte_cpu.so"
        path.write_bytes(b"not a library")
        monkeypatch.setattr(cpu, "find_library", lambda: None if fault == "missing" else str(path))
    assert {row.kernel for row in kernel_report() if row.device == "cpu"} == {"torch reference"}
    assert ("not built" if fault == "missing" else "cannot be used") in kernel_report()[0].reason
    assert count_nonfinite(round_trip()) == 0


def test_in_a_process_of_its_own() -> None:
    """Importing loads nothing; the variable is obeyed; and there is one OpenMP runtime, not two pools on one CPU."""
    if cpu_choice().library is None:
        pytest.skip(f"no native library: {cpu_choice().reason}")
    code = """
import torch, halfbyte.kernels
from halfbyte.kernels.registry import cpu_choice
print(cpu_choice.cache_info().currsize)
weight = torch.randn(512, 512)
codes, absmax = torch.ops.halfbyte.quantize_4bit(weight @ weight, "nf4", 64)
print(cpu_choice().reason)
try:
    maps = open("/proc/self/maps").read().splitlines()
    print(len({line.split()[-1] for line in maps if any(name in line for name in ("libgomp", "libomp", "libiomp"))}))
except FileNotFoundError:  # not Linux
    print(1)
"""
    env = {**os.environ, ISA_VARIABLE: "baseline"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", f"{ISA_VARIABLE}=baseline", "1"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(ISA_VARIABLE in os.environ, reason=f"{ISA_VARIABLE} is set")
def test_where_there_is_a_compiler_there_is_a_library() -> None:
    """An install whose build fails goes on without one, and the tests of the instruction sets would all be skipped."""
    assert cpu_choice().library is not None, cpu_choice().reason
