"""The dtype that the text's products run in, and why: said in every case."""

from __future__ import annotations

import pytest
import torch

from halfbyte.calibrate import run
from halfbyte.calibrate.run import LARGE, product_dtype


@pytest.mark.parametrize(
    ("setting", "parameters", "dtype"),
    [
        ("auto", LARGE - 1, torch.float32), ("auto", LARGE, torch.bfloat16), ("bfloat16", 1000, torch.bfloat16),
        ("float32", LARGE, torch.float32), ("float16", LARGE, torch.float32),
    ],
)  # fmt: skip
def test_the_dtype(setting: str, parameters: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    monkeypatch.setattr(run, "choose_compute_dtype", lambda setting: (chosen[setting], "as told"))
    found, why = product_dtype(setting, parameters)
    assert found == dtype
    assert why
