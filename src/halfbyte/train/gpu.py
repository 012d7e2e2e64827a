"""A run's share of a GPU's memory: what is there, the hard cap, and what was taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from halfbyte.config import RunConfig
from halfbyte.dtypes import format_bytes, parse_bytes
from halfbyte.errors import ConfigError, ResourceError
from halfbyte.model.device import choose_device
from halfbyte.model.memory import free_memory, peak_memory, resident_memory
from halfbyte.plan import Machine
from halfbyte.plan.gpu import Gpu
from halfbyte.train.observer import Observer

MOST_CONTEXT = 1_500_000_000
"""Bytes in use on a GPU beside torch's tensors: what is beyond this is other processes'."""


HOST_SHARE = 4
"""A quarter of the host's memory for streamed layers, one for activations; the rest is for Python and others."""
GROWTH = 300_000_000
"""Bytes that CUDA's context grows by in a run: kernels are loaded when they are first used."""


def where_to_compute(
    config: RunConfig, machine: Machine, observer: Observer
) -> tuple[RunConfig, Machine, torch.device]:
    """The run with its device decided, and the machine with that device's memory as it is now.

    Raises:
        ResourceError: there is no such device.
        ConfigError: a setting is not possible on it.
    """
    device, why = choose_device(config.model.device)
    observer.note(f"device {device.type}: {why}")
    config = replace(config, model=replace(config.model, device="cpu" if device.type == "cpu" else "cuda"))
    if device.type == "cpu":
        return config, replace(machine, gpu=None), device
    if config.memory.weights == "mmap":
        raise ConfigError(
            "'mmap' is not possible on a GPU, which computes in its own memory", where="memory.weights",
            fix="Set memory.weights to resident or stream, or give --device cpu",
        )  # fmt: skip
    return config, replace(machine, gpu=gpu_of(device)), device


def host_share(config: RunConfig, device: torch.device) -> int:
    """Bytes of pinned host memory for streamed layers, and as many for activations; 0 on the CPU. What has no room
    there is on disk."""
    if device.type == "cpu":
        return 0
    allowed = config.memory.host_budget
    return (parse_bytes(allowed) if allowed else free_memory()) // HOST_SHARE


def gpu_of(device: torch.device) -> Gpu:
    """The CUDA device as a plan takes it; its memory is what is free, and what this process has of it."""
    free, _ = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device) + context_bytes(device)
    major, _ = torch.cuda.get_device_capability(device)
    return Gpu(name=torch.cuda.get_device_name(device), memory=free + ours, capability=major)


def context_bytes(device: torch.device) -> int:
    """What this process takes of a GPU beside torch's allocator: CUDA's context, kernels and libraries."""
    free, total = torch.cuda.mem_get_info(device)
    return min(max(total - free - torch.cuda.memory_reserved(device), 0), MOST_CONTEXT)


def cuda_bytes(device: torch.device) -> int:
    """Of a GPU beside torch's allocator, now and for the rest of a run."""
    return context_bytes(device) + GROWTH


def in_use(device: torch.device) -> int:
    """Bytes of the memory that `device` computes in that this process has now."""
    return torch.cuda.memory_allocated(device) + context_bytes(device) if device.type == "cuda" else resident_memory()


def set_cap(device: torch.device, budget: int | None) -> None:
    """Have this process take no more than `budget` bytes of the GPU: torch's allocator refuses. None: all there is."""
    _, total = torch.cuda.mem_get_info(device)
    allowed = total if budget is None else min(max(budget - cuda_bytes(device), 1), total)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)


def give_back(device: torch.device) -> None:
    """Have torch's allocator return what it does not use: pieces left by other sizes than those to come."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def capped(device: torch.device, budget: int | None) -> Iterator[None]:
    """Inside the block this process takes no more than `budget` bytes of the GPU: torch's allocator refuses.

    Its peaks are counted anew. Nothing happens on a CPU.

    Raises:
        ResourceError: in place of torch's own error when memory runs out.
    """
    if device.type != "cuda":
        yield
        return
    context = cuda_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    set_cap(device, budget)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(device, budget, context) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def out_of_memory(device: torch.device, budget: int | None, context: int) -> ResourceError:
    """What torch's allocator means, in a line."""
    held = torch.cuda.memory_allocated(device)
    limit = f"{format_bytes(budget)} are allowed" if budget is not None else "the GPU has no more"
    return ResourceError(
        f"{format_bytes(held + context)} were in use and more was needed; {limit}", where="the GPU's memory",
        why="the run was stopped; checkpoints are whole",
        fix="Give --memory more, or lower data.max_seq_len, train.micro_batch_size or lora.r",
    )  # fmt: skip


def peaks(device: torch.device) -> tuple[int, int]:
    """(used, taken from the system) of the memory that `device` computes in, bytes at most: on the CPU resident since
    the process began, on a GPU since `capped` began, CUDA's context included. Torch's allocator takes more than it
    uses and returns it when it has to."""
    if device.type != "cuda":
        return peak_memory(), peak_memory()
    context = context_bytes(device)
    return torch.cuda.max_memory_allocated(device) + context, torch.cuda.max_memory_reserved(device) + context
