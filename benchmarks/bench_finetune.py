"""The whole job beside the usual stack: same data, order, rank, steps; held-out loss, speed and memory.

usage: bench_finetune.py [--steps 60] [--batch 8] [--rounds 1] [--work DIR]

Both adapters are also measured by `halfbyte eval`, on the same tokens: the peer counts the newline after the end
token as supervised, halfbyte does not, so the losses the two print of themselves are not over the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from common import halfbyte, last_json, smollm2_folder, write_result
from texts import docstring_data

HERE = Path(__file__).parent


def main() -> None:
    """Run, print a table, write results/finetune.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="interleaved repetitions; medians are reported")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    model = str(smollm2_folder(options.work / "model"))
    train, held_out = map(str, docstring_data(options.work))
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for compute in ("float32", "auto"):
            output = options.work / f"halfbyte-{compute}"
            result = halfbyte(
                "train", "--model", model, "--data", train, "--eval-data", held_out, "--output", str(output),
                "--steps", str(options.steps), "--resume", "never", "--set", f"quant.compute_dtype={compute}",
                "--set", "data.packing=false", "--set", "quant.scale=absmax",
                "--set", f"train.micro_batch_size={options.batch}",
            )  # fmt: skip
            runs.setdefault(f"halfbyte, compute {compute}", []).append({**result, "path": str(output / "adapter")})
        peer = last_json([
            sys.executable, str(HERE / "peer_stack.py"), model, train, held_out, str(options.steps),
            str(options.batch), str(options.work / "peer"),
        ])  # fmt: skip
        runs.setdefault("PEFT + bitsandbytes, fp32", []).append({**peer, "path": str(options.work / "peer")})
    rows = {}
    for name, results in runs.items():
        same = halfbyte("eval", "--model", model, "--adapter", results[-1]["path"], "--data", held_out,
                        "--set", "quant.compute_dtype=float32")  # fmt: skip
        rows[name] = {
            "held_out_loss_same_tokens": same["loss"],
            "held_out_loss_as_it_says": results[-1]["eval_loss"],
            **{key: statistics.median(r[key] for r in results)
               for key in ("tokens_per_s", "supervised_tokens_per_s", "peak_memory")},
        }  # fmt: skip
    print(f"{'':<28}{'held-out loss':>14}{'own count':>11}{'tokens/s':>10}{'learned/s':>11}{'peak GB':>9}")
    for name, row in rows.items():
        print(
            f"{name:<28}{row['held_out_loss_same_tokens']:>14.4f}{row['held_out_loss_as_it_says']:>11.4f}"
            f"{row['tokens_per_s']:>10.0f}{row['supervised_tokens_per_s']:>11.0f}{row['peak_memory'] / 1e9:>9.2f}"
        )
    write_result(HERE / "results" / "finetune.json", {"steps": options.steps, "batch": options.batch, "rows": rows})


main()
