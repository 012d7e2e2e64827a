"""Models larger than the budget: what streaming costs, and optimizer steps of a 70B model in 22 GB or in 12.

    python benchmarks/bench_large.py stream          a model of three times the budget, beside the same one in memory
    python benchmarks/bench_large.py 70b [--limit 22GB --limit 12GB]

As root: every run is in a control group whose limit is its budget, so what does not fit is killed. Weights are random,
made on the spot in bitsandbytes' format and removed afterwards (--keep leaves them): about 6 GB of disk, or 40.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from cgroup import run_limited
from common import write_result
from random_model import config_of, model_folder
from texts import docstring_data

from halfbyte.dtypes import parse_bytes

WORK = Path("bench-work")
TOKENS = {"stream": 512, "70b": 128}
SETTINGS = ["train.resume=never", "train.gradient_checkpointing=true", "data.mask_prompt=false"]


def run(model: Path, limit: int | None, steps: int, tokens: int, *settings: str) -> dict[str, Any]:
    """One training run, with its losses and seconds by step.

    Exits if the kernel killed it.
    """
    train, _ = docstring_data(WORK)
    output = WORK / "large-run"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "halfbyte", "train", "--model", str(model), "--data", str(train), "--json",
        "--output", str(output), "--steps", str(steps), "--set", f"data.max_seq_len={tokens}",
    ]  # fmt: skip
    for setting in (*SETTINGS, *settings, *([f"memory.budget={limit}"] if limit else [])):
        command += ["--set", setting]
    done, killed = run_limited(limit or 2**62, command)
    if killed or done.returncode:
        sys.exit(f"exit code {done.returncode}, {killed} killed by the limit of {limit} bytes")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shown = {key: result[key] for key in ("peak_memory", "predicted_peak_memory", "seconds")}
    measured = [event for event in events if event["event"] == "step"]
    return {
        **shown, "limit": limit, "losses": [event["loss"] for event in measured],
        "step_seconds": [event["seconds"] for event in measured], "step_tokens": [e["tokens"] for e in measured],
    }  # fmt: skip


def stream(rounds: int) -> dict[str, Any]:
    """Resident and streamed runs in turn. The first step of each is warm-up."""
    model = model_folder(WORK / "llama-10b", "llama-10b")
    config = config_of("llama-10b")
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    base = stored - 2 * config.vocab_size * config.hidden_size  # the embedding, which is the head, is in bfloat16
    limit = base // 3
    runs: dict[str, list[dict[str, Any]]] = {"resident": [], "streamed": []}
    for _ in range(rounds):
        runs["resident"].append(run(model, None, 3, TOKENS["stream"], "lora.r=4"))
        runs["streamed"].append(run(model, limit, 3, TOKENS["stream"], "lora.r=4"))
    speeds = {
        name: statistics.median(
            tokens / seconds for each in found
            for tokens, seconds in zip(each["step_tokens"][1:], each["step_seconds"][1:], strict=True)
        )
        for name, found in runs.items()
    }  # fmt: skip
    losses = [each["losses"] for found in runs.values() for each in found]
    return {
        "base_bytes": base, "limit": limit, "tokens_per_s": speeds, "ratio": speeds["streamed"] / speeds["resident"],
        "same_losses": all(each == losses[0] for each in losses), "runs": runs,
    }  # fmt: skip


def seventy_billion(limits: list[int]) -> dict[str, Any]:
    """Two optimizer steps of a Llama-3-70B-shaped model within each limit."""
    model = model_folder(WORK / "llama-70b", "llama-70b")
    return {"runs": [run(model, limit, 2, TOKENS["70b"]) for limit in limits]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stream", "70b"])
    parser.add_argument("--limit", action="append", type=parse_bytes, help="of 70b; may be given again")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    if options.what == "stream":
        shape, result = "llama-10b", stream(options.rounds)
    else:
        shape, result = "llama-70b", seventy_billion(options.limit or [parse_bytes("22GB"), parse_bytes("12GB")])
    if not options.keep:
        shutil.rmtree(WORK / shape)
    write_result(Path("benchmarks/results") / f"large-{options.what}.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
