"""How long calibration takes, and its memory: models of the Llama 3 family's shapes with random weights.

usage: bench_calibrate.py [--shape llama-1b] [--layers N] [--start] [--memory 24GB] [--work DIR]

With --layers fewer decoder layers than the shape has are written and calibrated: all take the same time, which is
stored with their number. Text (the demo's questions) and dtype are those that all layers would have: of a model of 1B
parameters and more 16,384 tokens, in bfloat16 where that is fast. Results are added to those stored before.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from common import halfbyte, write_result
from random_model import SHAPES, config_of, write_model
from texts import docstring_data

from halfbyte.model import choose_compute_dtype

SAMPLES = 232
"""Of 16,384 tokens."""
RESULT = Path(__file__).parent / "results" / "calibrate.json"


def main() -> None:
    """Run, print, write results/calibrate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--start", action="store_true", help="an adapter's start in closed form, too")
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    all_layers = SHAPES[options.shape]["num_hidden_layers"]
    layers = options.layers or all_layers
    model, base = options.work / f"{options.shape}-{layers}", options.work / "calibrated"
    if not model.exists():
        config = config_of(options.shape)
        config.num_hidden_layers = layers
        write_model(model, config, in_4_bits=False)
    train, dtype = options.work / "some.jsonl", choose_compute_dtype("auto")[0]
    train.write_text("".join(docstring_data(options.work)[0].read_text().splitlines(keepends=True)[:SAMPLES]))
    shutil.rmtree(base, ignore_errors=True)
    start = ["--set", "lora.init=cloq", "--set", "lora.match_steps=0"] if options.start else []
    made = halfbyte(
        "quantize", "--model", str(model), "--output", str(base), "--memory", options.memory,
        "--set", f"quant.calibrate={train}", *start,
        "--set", f"quant.compute_dtype={str(dtype).removeprefix('torch.')}",
    )  # fmt: skip
    row = {
        "shape": options.shape, "layers": layers, "of": all_layers, "start": options.start, "dtype": str(dtype),
        **{key: made[key] for key in ("tokens", "seconds", "peak_memory", "predicted_peak_memory")},
    }  # fmt: skip
    kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    name = f"{options.shape}, {layers} of {all_layers} layers" + (", with a start" if options.start else "")
    print(json.dumps(row))
    write_result(RESULT, {"rows": {**kept, name: row}})


if __name__ == "__main__":
    main()
