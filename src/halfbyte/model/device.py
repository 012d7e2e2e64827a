"""Where a model computes."""

from __future__ import annotations

import torch

from halfbyte.errors import ResourceError


def choose_device(setting: str) -> tuple[torch.device, str]:
    """The device for ``model.device`` and the reason for it, as a sentence to print.

    Raises:
        ResourceError: "cuda", and torch sees no CUDA device.
    """
    if setting == "cpu":
        return torch.device("cpu"), "as set in model.device"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        why = "as set in model.device" if setting == "cuda" else "torch sees a CUDA device"
        return device, f"{why}; {torch.cuda.get_device_name(device)}"
    if setting == "cuda":
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        fix = "Give --device cpu, or install a torch and a driver for your GPU (halfbyte doctor says what is there)"
        raise ResourceError("no CUDA device", where="model.device", why=why, fix=fix)
    return torch.device("cpu"), "torch sees no CUDA device"
