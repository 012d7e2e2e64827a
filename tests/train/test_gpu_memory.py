"""A run's share of a GPU, and where it computes, without one: torch's words are put in its mouth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.cli.main import main
from halfbyte.config import RunConfig, load_config
from halfbyte.errors import ConfigError, ResourceError
from halfbyte.plan import Machine
from halfbyte.train import gpu
from halfbyte.train.observer import Observer

DEVICE = torch.device("cuda", 0)
GB = 10**9


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU of 8 GB, 1 GB of it in the context and 2 GB in the allocator; the fractions that it is capped to."""
    fractions: list[float] = []
    for name, value in (
        ("is_available", lambda: True), ("current_device", lambda: 0), ("get_device_name", lambda device: "a card"),
        ("get_device_capability", lambda device: (9, 0)), ("mem_get_info", lambda device: (5 * GB, 8 * GB)),
        ("memory_reserved", lambda device: 2 * GB), ("memory_allocated", lambda device: GB),
        ("max_memory_allocated", lambda device: 2 * GB), ("max_memory_reserved", lambda device: 3 * GB),
        ("reset_peak_memory_stats", lambda device: None),
        ("set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return fractions


@pytest.mark.usefixtures("card")
def test_what_is_there() -> None:
    config, machine, device = gpu.where_to_compute(RunConfig(), Machine(), Observer())
    assert (config.model.device, device) == ("cuda", DEVICE)
    assert machine.gpu is not None
    assert (machine.gpu.memory, machine.gpu.compute_dtype) == (8 * GB, "bfloat16")
    assert gpu.in_use(device) == 2 * GB
    assert gpu.peaks(device) == (3 * GB, 4 * GB)
    config, machine, device = gpu.where_to_compute(load_config(model__device="cpu"), machine, Observer())
    assert (device.type, machine.gpu) == ("cpu", None)


@pytest.mark.usefixtures("card")
def test_what_is_not_possible_there() -> None:
    with pytest.raises(ConfigError, match="not possible on a GPU"):
        gpu.where_to_compute(load_config(memory__weights="mmap"), Machine(), Observer())


def test_host_memory_behind_a_gpu() -> None:
    assert gpu.host_share(load_config(memory__host_budget="8GB"), DEVICE) == 2 * GB
    assert gpu.host_share(RunConfig(), DEVICE) > 0
    assert gpu.host_share(load_config(memory__host_budget="8GB"), torch.device("cpu")) == 0


def test_the_cap(card: list[float]) -> None:
    with gpu.capped(DEVICE, 4 * GB):
        assert card == [pytest.approx((3 * GB - gpu.GROWTH) / (8 * GB))]
    assert card[1:] == [1.0]
    with gpu.capped(DEVICE, None):
        assert card[2:] == [1.0]


def test_out_of_memory_is_one_line(card: list[float]) -> None:
    what = r"2\.3 GB were in use and more was needed; 4\.0 GB are allowed"
    with pytest.raises(ResourceError, match=what) as caught, gpu.capped(DEVICE, 4 * GB):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert card[-1] == 1.0


def test_on_the_cpu_nothing_is_capped() -> None:
    with gpu.capped(torch.device("cpu"), 1):
        assert gpu.in_use(torch.device("cpu")) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device(
    tiny_llama: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    options = ["--model", str(tiny_llama), "--device", "cuda"]
    for command in (
        ["train", "--data", str(chat_file), "--output", str(tmp_path / "run"), "--steps", "1"],
        ["generate", "--prompt", "Hello"], ["eval", "--data", str(chat_file)],
    ):  # fmt: skip
        assert main([*command, *options]) == 4
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("halfbyte: ")]
        assert "no CUDA device" in line
        assert "--device cpu" in line
