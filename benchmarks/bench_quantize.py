"""Speed and peak memory of quantizing a 2 GB bf16 model of random weights from disk to disk.

usage: bench_quantize.py [--work DIR] [--rounds 3]

Beside it: reading as much and writing as much with nothing in between (the floor; the goal is 1.5 times of it), and
transformers + bitsandbytes. Each in a process of its own (disk_stack.py), in turn; once with the input in the page
cache and once from the disk. The promise: peak resident memory below the size of the output plus 300 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import disk_turns, random_2gb_folder, write_result


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantize.json")
    options = parser.parse_args()
    folder, written = random_2gb_folder(options.work / "random-2gb"), options.work / "quantized"
    figures = {
        "from the page cache": disk_turns(
            "quantize", ("plain", "bitsandbytes", "halfbyte"), options.rounds, folder, written, cold=False
        ),
        "from the disk": disk_turns("quantize", ("plain", "halfbyte"), options.rounds, folder, written, cold=True),
    }
    bytes_in, bytes_out = (
        sum(path.stat().st_size for path in where.glob("*.safetensors")) for where in (folder, written / "halfbyte")
    )
    for setting, stacks in figures.items():
        for stack, row in stacks.items():
            print(
                f"{setting:20} {stack:13} {row['seconds']:6.2f} s, {row['seconds'] / stacks['plain']['seconds']:5.2f} "
                f"times plain reading and writing, {bytes_in / row['seconds'] / 1e9:.2f} GB/s, "
                f"peak {row['peak_memory'] / 1e6:.0f} MB"
            )
    peak = max(stacks["halfbyte"]["peak_memory"] for stacks in figures.values())
    print(f"{bytes_in:,} -> {bytes_out:,} bytes; {(peak - bytes_out) / 1e6:+.0f} MB against the output")
    write_result(options.output, {
        "rounds": options.rounds, "bytes_in": bytes_in, "bytes_out": bytes_out, "over_output": peak - bytes_out,
        "figures": figures,
    })  # fmt: skip


if __name__ == "__main__":
    main()
