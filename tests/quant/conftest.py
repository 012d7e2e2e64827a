"""Runs a test on the native library and on the plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import halfbyte.kernels  # noqa: F401  (registers the operators)
from halfbyte.kernels.registry import ISA_VARIABLE, cpu_choice


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    if request.param == "reference":
        monkeypatch.setenv(ISA_VARIABLE, "reference")
    cpu_choice.cache_clear()
    if request.param == "native" and cpu_choice().library is None:
        pytest.skip(f"no native library: {cpu_choice().reason}")
    yield request.param
    cpu_choice.cache_clear()
