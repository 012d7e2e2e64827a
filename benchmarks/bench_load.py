"""Loading a 16-bit model into 4 bits in memory, and a folder that is in 4 bits already, to the first token's logits:
seconds and peak memory.

usage: bench_load.py [--work DIR] [--rounds 3]

halfbyte and transformers + bitsandbytes on 2 GB of random bf16 weights, beside reading the files and nothing else (the
floor). Each load in a process of its own (disk_stack.py), in turn; once with the files in the page cache and once from
the disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import disk_turns, random_2gb_folder, write_result

from halfbyte.config import QuantConfig
from halfbyte.model.quantize import quantize_model

STACKS = ("plain", "bitsandbytes", "halfbyte")


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "load.json")
    options = parser.parse_args()
    whole = random_2gb_folder(options.work / "random-2gb")
    stored = options.work / "random-2gb-4bit"
    if not stored.exists():
        quantize_model(str(whole), stored, QuantConfig(scale="absmax"))
    figures = {
        f"{kind}, {'from the disk' if cold else 'from the page cache'}": disk_turns(
            "load",
            STACKS if not cold else ("plain", "halfbyte"),
            options.rounds,
            folder,
            options.work / "empty",
            cold=cold,
        )
        for kind, folder in (("16 bit", whole), ("4 bit", stored))
        for cold in (False, True)
    }
    for setting, stacks in figures.items():
        for stack, row in stacks.items():
            print(f"{setting:28} {stack:13} {row['seconds']:6.2f} s  peak {row['peak_memory'] / 1e9:.2f} GB")
    write_result(options.output, {"rounds": options.rounds, "loads": figures})


if __name__ == "__main__":
    main()
