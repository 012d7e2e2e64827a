"""Each test that asks for `isa` runs once on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.kernels import cpu
from halfbyte.kernels.registry import cpu_choice


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library = cpu_choice().library
    if library is None:
        pytest.skip(f"no native library: {cpu_choice().reason}")
    if request.param not in library.supported():
        pytest.skip(f"this CPU has no {request.param}")
    before = library.isa
    library.force(request.param)
    yield request.param
    library.force(before)
