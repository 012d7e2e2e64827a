"""Random number generators as tensors: bit-exact, no pickle.

torch.cpu      uint8 (5056,)          torch.cuda.<i>   uint8, one per device
python.state   int64 (626,)           python.gauss     float64 (0 or 1,)
numpy.key      int64 (624,)           numpy.position   int64 (2,): pos, has_gauss    numpy.gauss   float64 (1,)
generator.<name>                      uint8: a torch.Generator of the caller's
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import FileError


def capture_rng(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Tensor]:
    """The state of torch's (CPU, and CUDA where in use), Python's and numpy's generators, and of `generators`."""
    version, numbers, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    table = state["state"]
    found = {
        "torch.cpu": torch.get_rng_state(),
        "python.state": torch.tensor([version, *numbers], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.key": torch.from_numpy(table["key"].astype(np.int64)),
        "numpy.position": torch.tensor([table["pos"], state["has_gauss"]], dtype=torch.int64),
        "numpy.gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"torch.cuda.{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return found | {f"generator.{name}": each.get_state() for name, each in (generators or {}).items()}


def restore_rng(state: Mapping[str, Tensor], generators: Mapping[str, torch.Generator] | None = None) -> None:
    """Set every generator to what `capture_rng` saw; devices that are not here are left out.

    Raises:
        FileError: `state` lacks a generator, or holds something else.
    """
    try:
        torch.set_rng_state(state["torch.cpu"])
        version, *numbers = state["python.state"].tolist()
        gauss = state["python.gauss"].tolist()
        random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
        position, has_gauss = state["numpy.position"].tolist()
        table = {"key": state["numpy.key"].numpy().astype(np.uint32), "pos": position}
        np.random.set_state(
            {"bit_generator": "MT19937", "state": table, "has_gauss": has_gauss, "gauss": state["numpy.gauss"].item()}
        )
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if f"torch.cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"torch.cuda.{index}"], index)
        for name, generator in (generators or {}).items():
            generator.set_state(state[f"generator.{name}"])
    except (KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise FileError("does not hold the random number generators", where="rng", why=str(problem)) from None
