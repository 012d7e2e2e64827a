"""What four bits lose, and how much of it other scales, calibrated codes and a start for the adapter give back.

usage: bench_fidelity.py [--steps 60] [--batch 8] [--seeds 1] [--work DIR]

SmolLM2-135M and the demo's questions, held-out loss before training and after `--steps` steps of `--batch` samples, of
LoRA of rank 16 on every base; and each base's loss on prose that calibration did not see (`pydoc_data.topics`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from common import docstring_data, halfbyte, smollm2_folder, write_result

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
EXACT = ["--set", f"quant.skip_modules={LINEARS}", "--set", f"lora.target_modules={LINEARS}"]
BEGIN = ["--set", "lora.init=cloq"]
CALIBRATED = ["--set", "quant.calibrate={train}"]
BASES: dict[str, list[str]] = {
    "NF4": [],
    "NF4, mse scales": ["--set", "quant.scale=mse"],
    "NF4, mse-signed scales": ["--set", "quant.scale=mse-signed"],
    "NF4, calibrated": CALIBRATED,
    "NF4, calibrated, and a start": [*CALIBRATED, *BEGIN],
}
"""Settings of `halfbyte quantize`."""


def prose_file(folder: Path) -> Path:
    """40 texts of Python's reference."""
    path = folder / "prose.jsonl"
    texts = [topics[name][:2000] for name in sorted(topics)][:40]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def measure(options: argparse.Namespace, base: str, train: str, held_out: str, begin: list[str]) -> dict[str, Any]:
    """Losses on one base: before, after by seed, and on prose."""
    exact = ["--set", "quant.compute_dtype=float32"]
    adapter = ["--adapter", f"{base}/start"] if begin == BEGIN else []
    common = [*exact, *(EXACT[:2] if begin == EXACT else [])]
    prose = halfbyte("eval", "--model", base, "--data", str(prose_file(options.work)), *adapter, *common)["loss"]
    runs = [
        halfbyte(
            "train", "--model", base, "--data", train, "--eval-data", held_out, "--steps", str(options.steps),
            "--output", str(options.work / "run"), "--resume", "never", "--set", f"train.seed={seed}",
            "--set", "data.packing=false", "--set", f"train.micro_batch_size={options.batch}", *exact, *begin,
        )
        for seed in range(options.seeds)
    ]  # fmt: skip
    return {"before": runs[0]["eval_loss_before"], "after": [run["eval_loss"] for run in runs], "prose": prose}


def main() -> None:
    """Run, print, write results/fidelity.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    model = str(smollm2_folder(options.work / "model"))
    train, held_out = map(str, docstring_data(options.work))
    rows = {"16 bits": measure(options, model, train, held_out, EXACT)}
    for name, settings in BASES.items():
        base = str(options.work / "base")
        given = [text.format(train=train) for text in settings]
        made = halfbyte("quantize", "--model", model, "--output", base, *given)
        begin = BEGIN if BEGIN[1] in given else []
        rows[name] = {
            **measure(options, base, train, held_out, begin),
            **{key: made[key] for key in ("bits_per_weight", "seconds", "peak_memory")},
        }
        store(rows, options)  # after each, for they are minutes


def store(rows: dict[str, Any], options: argparse.Namespace) -> None:
    """With the share that each closes of the gap between NF4 and 16 bits."""
    for row in rows.values():
        row["mean_after"] = statistics.mean(row["after"])
        for key in ("before", "mean_after", "prose"):
            best, stock = rows["16 bits"][key], rows["NF4"][key]
            row[f"closed_{key}"] = (stock - row[key]) / (stock - best)
    print(json.dumps(rows, indent=1))
    result = {"steps": options.steps, "batch": options.batch, "seeds": options.seeds, "rows": rows}
    write_result(Path(__file__).parent / "results" / "fidelity.json", result)


if __name__ == "__main__":
    main()
