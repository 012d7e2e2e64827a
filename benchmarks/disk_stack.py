"""One stack loads a model folder or quantizes it to disk, in a process of its own. Prints one JSON line.

usage: disk_stack.py load|quantize plain|halfbyte|bitsandbytes FOLDER [OUTPUT]

plain: what the job costs the machine at least: every byte of the input read once into one buffer; for quantize, as
many bytes written as halfbyte writes, and synced. A load ends with the logits of one token: a stack may map files and
read them then. Seconds are of the job alone, imports left out.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUFFER = 4 * 2**20


def plain(folder: Path, output: Path | None) -> Callable[[], object]:
    """Read; and write a third of it (what 4 bits make of 16, the embedding left as it is), synced."""

    def run() -> None:
        buffer, count = memoryview(bytearray(BUFFER)), 0
        target = (output / "plain").open("wb", buffering=0) if output else None
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    count += 1
                    if target and count % 3 == 0:
                        target.write(buffer[:size])
        if target:
            os.fsync(target.fileno())
            target.close()

    return run


def halfbyte(folder: Path, output: Path | None) -> Callable[[], object]:
    """Ours."""
    import torch

    from halfbyte import load_model
    from halfbyte.config import QuantConfig
    from halfbyte.model.quantize import quantize_model

    if output:
        return lambda: quantize_model(str(folder), output / "halfbyte", QuantConfig(scale="absmax"))  # as the others
    return lambda: _one_token(load_model(str(folder), QuantConfig(scale="absmax"), compute_dtype=torch.float32).model)


def bitsandbytes(folder: Path, output: Path | None) -> Callable[[], object]:
    """The usual one; what it saves is not synced."""
    import bitsandbytes as _bnb  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
        if output:
            model.save_pretrained(output / "bitsandbytes")
        else:
            _one_token(model)

    return run


def _one_token(model: Any) -> None:
    import torch

    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]))


def peak_memory() -> int:
    """Bytes at most; not ru_maxrss on Linux, which begins with the size of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Run once."""
    task, stack, folder, *rest = sys.argv[1:]
    output = Path(rest[0]) if task == "quantize" else None
    stacks: dict[str, Any] = {"plain": plain, "halfbyte": halfbyte, "bitsandbytes": bitsandbytes}
    run = stacks[stack](Path(folder), output)
    started = time.perf_counter()
    run()
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_memory": peak_memory()}))


if __name__ == "__main__":
    main()
