"""What four bits lose, and how much of it other scales, calibrated codes and a start for the adapter give back.

usage: bench_fidelity.py [--data docstrings functions] [--seeds 3] [--steps 60] [--batch 8] [--jobs 1] [--work DIR]

SmolLM2-135M, by halfbyte's own commands. Two data sets: questions about Python's standard library, and its functions'
source by their names. On each base: held-out loss before training and after `--steps` steps of `--batch` samples of
LoRA of rank 16, by seed; and the loss, before training, of two texts from outside, Python's reference and four
licences. Products are in float32 on the decoded weights. `--jobs` runs at once, each with its share of the processors;
training computes on a GPU where there is one. A base is made once in WORK.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import halfbyte, provenance, smollm2_folder, write_result
from texts import docstring_data, function_data, licence_file, prose_file

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
EXACT = ["--set", f"quant.skip_modules={LINEARS}", "--set", f"lora.target_modules={LINEARS}"]
"""The base in 16 bits."""
BEGIN = ["--set", "lora.init=cloq"]
SETS = {"docstrings": docstring_data, "functions": function_data}


@dataclass(frozen=True)
class Base:
    """One that is trained on. `made`: the settings of `halfbyte quantize`; `used`: those of every command after it."""

    made: list[str] | None = None
    used: list[str] | None = None

    @property
    def depends_on_data(self) -> bool:
        return any("{train}" in setting for setting in self.made or ())


BASES = {
    "16 bits": Base(used=EXACT),
    "NF4": Base(["--set", "quant.scale=absmax"]),
    "NF4, mse-signed scales": Base(["--set", "quant.scale=mse-signed"]),
    "NF4, calibrated on generic text": Base(["--set", "quant.calibrate=generic"]),
    "NF4, calibrated": Base(["--set", "quant.calibrate={train}"]),
    "NF4, calibrated, closed form": Base(
        ["--set", "quant.calibrate={train}", *BEGIN, "--set", "lora.match_steps=0"], BEGIN
    ),
    "NF4, calibrated, matched": Base(["--set", "quant.calibrate={train}", *BEGIN], BEGIN),
}


def folder_of(options: argparse.Namespace, data: str, name: str, train: Path) -> tuple[Path, dict[str, Any]]:
    """Where the base is, made if it has to be, and what `halfbyte quantize --json` said of it."""
    base = BASES[name]
    if base.made is None:
        return options.work / "model", {}
    path = options.work / "-".join(name.replace(",", "").split() + [data] * base.depends_on_data)
    if not (path / "quantize.json").exists():
        settings = [text.format(train=train) for text in base.made]
        made = halfbyte("quantize", "--model", str(options.work / "model"), "--output", str(path), *settings)
        kept = {key: made[key] for key in ("bits_per_weight", "seconds", "peak_memory")}
        (path / "quantize.json").write_text(json.dumps(kept), encoding="utf-8")
    return path, json.loads((path / "quantize.json").read_text(encoding="utf-8"))


def row_of(options: argparse.Namespace, data: str, name: str) -> dict[str, Any]:
    """Losses on one base: before, after by seed, and outside."""
    base, (train, held_out) = BASES[name], SETS[data](options.work)
    folder, made = folder_of(options, data, name, train)
    common = ["--model", str(folder), "--set", "quant.compute_dtype=float32", *(base.used or ())]
    adapter = ["--adapter", str(folder / "start")] if base.used is BEGIN else []
    env = os.environ | {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // options.jobs, 1))}

    def trained(seed: int) -> dict[str, Any]:
        return halfbyte(
            "train", *common, "--data", str(train), "--eval-data", str(held_out), "--steps", str(options.steps),
            "--output", str(options.work / f"run-{data}-{name.replace(' ', '-')}-{seed}"), "--resume", "never",
            "--set", f"train.seed={seed}", "--set", "data.packing=false", "--set", "train.save_every=0",
            "--set", f"train.micro_batch_size={options.batch}", env=env,
        )  # fmt: skip

    def outside(text: Path) -> float:
        found = halfbyte("eval", *common, *adapter, "--data", str(text), env=env)["loss"]
        return float(found)

    with ThreadPoolExecutor(options.jobs) as pool:
        losses = pool.map(outside, (prose_file(options.work), licence_file(options.work)))
        runs = list(pool.map(trained, range(options.seeds)))
        return {
            "before": runs[0]["eval_loss_before"], "after": [run["eval_loss"] for run in runs],
            "outside": list(losses), **made,
        }  # fmt: skip


def main() -> None:
    """Run, print, add each row to those in results/fidelity.json: they are minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fidelity.json")
    options = parser.parse_args()
    smollm2_folder(options.work / "model")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    how = {"steps": options.steps, "batch": options.batch}
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else how
    sets: dict[str, dict[str, Any]] = before.get("sets", {}) if how.items() <= before.items() else {}
    for data in options.data:
        for name, row in zip(options.bases, map(partial(row_of, options, data), options.bases), strict=True):
            rows = sets.setdefault(data, {})
            rows[name] = {**row, "device": device, "commit": provenance()["commit"]}
            sets[data] = {base: rows[base] for base in BASES if base in rows}  # in the table's order
            print(data, name, row, flush=True)
            write_result(options.output, {"device": "by row", **how, "sets": sets})


if __name__ == "__main__":
    main()
