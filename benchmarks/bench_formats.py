"""What each format of a base loses: bits, squared error, perplexity with and without calibration, speed of a product.

usage: bench_formats.py [--formats nf4,int4,...,4.5] [--uncalibrated | --products] [--work DIR]

SmolLM2-135M and the demo's questions: perplexity of 120 held-out answers and of prose that calibration did not see;
the error of its weights and of normal ones; a layer's product with 1 and 256 rows of x. Results are added to those
stored before. --products times the products of all stored formats anew, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from bench_fidelity import EXACT
from common import halfbyte, smollm2_folder, write_result
from texts import docstring_data, prose_file

import halfbyte as hb
from halfbyte.compare.weights import weight_report
from halfbyte.config import load_config
from halfbyte.config.formats import QUANT_TYPES, bits_of

RESULT = Path(__file__).parent / "results" / "formats.json"
EVAL = ["--set", "quant.compute_dtype=float32"]
ROWS = (1, 256)


def perplexities(base: str, texts: dict[str, str], *more: str) -> dict[str, float]:
    """Of each text."""
    return {
        name: math.exp(halfbyte("eval", "--model", base, "--data", text, *EVAL, *more)["loss"])
        for name, text in texts.items()
    }


def normal_error(quant_type: str, *, scale: str) -> float:
    """Squared error over squares, of normal weights."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    wrong = hb.quantize(weight, quant_type=quant_type, scale=scale).dequantize() - weight
    return float(wrong.square().sum() / weight.square().sum())


def product_seconds(quant_type: str, rows: int, least: int = 9) -> float:
    """The least of some, of a 4096 x 4096 weight, x in float32."""
    torch.manual_seed(0)
    layer = hb.Linear4bit.from_weight(torch.randn(4096, 4096) * 0.02, quant_type=quant_type)
    x, found = torch.randn(rows, 4096), []
    for _ in range(least):
        started = time.perf_counter()
        layer(x)
        found.append(time.perf_counter() - started)
    return min(found)


def measure(name: str, model: str, train: str, texts: dict[str, str], work: Path) -> dict[str, Any]:
    """The row of a format, or of a budget of bits; without calibration where `train` is empty."""
    row, base, settings = dict[str, Any](), work / "base", ["--set", f"quant.bits={name}"]
    if name in QUANT_TYPES:
        settings = ["--quant-type", name]
        row["seconds"] = {str(rows): product_seconds(name, rows) for rows in ROWS}
        row["normal_error"] = {scale: normal_error(name, scale=scale) for scale in ("absmax", "mse-signed")}
    plain = ["--set", "quant.scale=absmax"] if name in QUANT_TYPES and bits_of(name) >= 4 else []
    for key, more in [("plain", plain), ("calibrated", ["--set", f"quant.calibrate={train}"])][: 2 if train else 1]:
        shutil.rmtree(base, ignore_errors=True)  # of the format before
        made = halfbyte("quantize", "--model", model, "--output", str(base), *settings, *more)
        row["bits"] = made["bits_per_weight"]
        error = weight_report(load_config(None, [f"model.path={model}"]), base).error
        row[key] = {"error": error, "quantize_seconds": made["seconds"], **perplexities(str(base), texts)}
    return row


def time_products() -> None:
    """All formats in turn, so that they meet the same machine."""
    rows = json.loads(RESULT.read_text())["rows"]
    for name in filter(rows.__contains__, QUANT_TYPES):
        rows[name]["seconds"] = {str(count): product_seconds(name, count) for count in ROWS}
    write_result(RESULT, {"rows": rows})


def main() -> None:
    """Run, print, write results/formats.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(QUANT_TYPES))
    parser.add_argument("--uncalibrated", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    if options.products:
        return time_products()
    model = str(smollm2_folder(options.work / "model"))
    train, held_out = map(str, docstring_data(options.work))
    texts = {"answers": held_out, "prose": str(prose_file(options.work))}
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    if "16 bits" not in rows:
        rows["16 bits"] = {"bits": 16, "plain": perplexities(model, texts, *EXACT[:2])}
    for name in options.formats.split(","):
        found = measure(name, model, "" if options.uncalibrated else train, texts, options.work)
        rows[name] = {**rows.get(name, {}), **found}
        print(name, json.dumps(rows[name]), flush=True)
        write_result(RESULT, {"rows": rows})  # after each, for they are minutes


if __name__ == "__main__":
    main()
