"""The speed of a training step, for plans before the first run."""

from __future__ import annotations

import pytest

from halfbyte.plan import Machine
from halfbyte.train import calibration


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_it_is_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a slow emulation and what no processor of today reaches."""
    monkeypatch.setattr(calibration, "TOKENS", 32)
    found = calibration.step_gflops(Machine(), ("float32",))
    assert list(found) == ["float32"]
    assert 0.1 < found["float32"] < 1e5
