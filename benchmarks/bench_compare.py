"""The trade-off of QLoRA tutorials, measured: `halfbyte compare` on SmolLM2-135M and the demo's questions.

usage: bench_compare.py [--variants A,B] [--seeds 3] [--steps 60] [--minutes 60] [--work DIR]

Writes results/compare.json (what docs/compare.md shows); the page is WORK/comparison/report.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import halfbyte, smollm2_folder, write_result
from texts import docstring_data


def main() -> None:
    """Run and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="16bit,nf4,nf4-start,fp4,int4,full")
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--steps", default="60")
    parser.add_argument("--minutes", default="120")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    train, held_out = map(str, docstring_data(options.work))
    settings = ("data.packing=false", "train.micro_batch_size=8", "lora.r=16")
    result = halfbyte(
        "compare", "--model", str(smollm2_folder(options.work / "model")), "--data", train, "--eval-data", held_out,
        "--output", str(options.work / "comparison"), "--variants", options.variants, "--seeds", options.seeds,
        "--steps", options.steps, "--minutes", options.minutes,
        *(argument for setting in settings for argument in ("--set", setting)),
    )  # fmt: skip
    write_result(Path(__file__).parent / "results" / "compare.json", {**result, "steps": options.steps, "batch": 8})


if __name__ == "__main__":
    main()
