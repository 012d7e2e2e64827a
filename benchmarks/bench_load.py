"""Loading a 16-bit model into 4 bits in memory, and a folder that is in 4 bits already: seconds and peak memory.

    python benchmarks/bench_load.py [--work DIR] [--rounds 3]

halfbyte and transformers + bitsandbytes take turns, each load in a process of its own, on the 2 GB model of random
weights that bench_quantize.py makes (run that first). "read" is how long this machine takes to read the 16-bit files
through the page cache: the floor. Seconds are of the load alone, imports left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import last_json, write_result


def read(folder: str) -> None:
    """Every byte of the folder's tensors, once."""
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(16 << 20)
            while file.readinto(buffer):
                pass


def halfbyte(folder: str) -> None:
    """Our loader."""
    import torch

    from halfbyte import load_model
    from halfbyte.config import QuantConfig

    load_model(folder, QuantConfig(), compute_dtype=torch.float32)


def bitsandbytes(folder: str) -> None:
    """The usual one."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


STACKS = {"read": read, "halfbyte": halfbyte, "bitsandbytes": bitsandbytes}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stack, folder = options.child
        if stack != "read":  # imports are not what is measured
            import bitsandbytes as _bnb  # noqa: F401
            import transformers as _hf  # noqa: F401

            import halfbyte.model as _model  # noqa: F401
        started = time.perf_counter()
        STACKS[stack](folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_memory": peak}))
        return
    folders = {"16 bit": options.work / "random-2gb", "4 bit": options.work / "random-2gb-4bit"}
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds + 1):
        for kind, folder in folders.items():
            for stack in STACKS:
                command = [sys.executable, "-W", "ignore", __file__, "--child", stack, str(folder)]
                runs.setdefault(f"{stack}, {kind}", []).append(last_json(command))
    figures = {
        name: {key: statistics.median(r[key] for r in results[1:]) for key in ("seconds", "peak_memory")}
        for name, results in runs.items()
    }  # fmt: skip
    for name, row in figures.items():
        print(f"{name:24} {row['seconds']:6.2f} s  peak {row['peak_memory'] / 1e9:.2f} GB")
    write_result(Path(__file__).parent / "results" / "load.json", {"rounds": options.rounds, "loads": figures})


if __name__ == "__main__":
    main()
