"""Trains again and again and kills itself at it: python kills.py SETTINGS.json KILLS SEED; a JSON line at the end.

Every run is a process of its own, forked from this one, which has imported all and started no thread: killing one
costs what it trained, not three seconds of imports. Imported modules and their global state are as at a fresh start.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from halfbyte.config import RunConfig, load_config
from halfbyte.train import train

SAVING, EARLY, ANY = "while it saves", "early", "anywhere"


def start(config: RunConfig) -> int:
    """The process number of a run."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    try:
        train(config)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def finished(config: RunConfig) -> float:
    """Train without a disturbance; seconds."""
    started = time.perf_counter()
    _, status = os.waitpid(start(config), 0)
    assert status == 0, f"an undisturbed run ended with {status}"
    return time.perf_counter() - started


def results(config: RunConfig) -> dict[str, Any]:
    """Everything that must be equal: losses to the bit, bytes of adapter, optimizer and random numbers."""
    output = Path(config.train.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"].hex()) for line in lines if line["event"] == "step"]
    assert [step for step, _ in losses] == list(range(1, config.train.steps + 1)), "a step stands twice, or not at all"
    last = output / f"checkpoint-{config.train.steps}"
    files = [output / "adapter" / "adapter_model.safetensors"]
    files += [last / name for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors")]
    return {"losses": losses, **{f"{path.parent.name}/{path.name}": path.read_bytes().hex() for path in files}}


def saving(output: Path) -> bool:
    """A folder is being written."""
    return any(output.glob(".tmp-*")) or any(output.glob(".old-*"))


def kill_at_random(config: RunConfig, length: float, chance: random.Random, kinds: dict[str, int]) -> bool:
    """Start a run and kill it at some moment; False: it had finished."""
    output, kind = Path(config.train.output), chance.choice((SAVING, SAVING, EARLY, ANY))
    child = start(config)
    if kind == SAVING:
        number = chance.randrange(1 + config.train.steps // config.train.save_every)
        end = time.perf_counter() + length
        was = False
        while time.perf_counter() < end and number >= 0:
            now = saving(output)
            number -= now and not was
            was = now
        time.sleep(chance.uniform(0, 0.012))
    else:
        time.sleep(chance.uniform(0, length * (0.3 if kind == EARLY else 1.0)))
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        assert status == 0, f"a run ended with {status}"
        return False
    os.killpg(child, signal.SIGKILL) if os.getpgid(child) == child else os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kinds[kind] = kinds.get(kind, 0) + 1
    return True


def reached(config: RunConfig) -> int:
    """The last step whose loss is written down."""
    try:
        lines = (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if '"step"' in line and line.endswith("}")), default=0)
    except FileNotFoundError:
        return 0


def newest(config: RunConfig) -> int:
    """The step of the newest checkpoint that has its name."""
    return max((int(p.name[11:]) for p in Path(config.train.output).glob("checkpoint-*")), default=0)


def main() -> None:
    """See the module."""
    settings, kills, seed = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    where = Path(settings["train__output"])
    where.mkdir(parents=True, exist_ok=True)
    whole = load_config(**settings | {"train__output": str(where / "whole")})
    config = load_config(**settings | {"train__output": str(where / "killed")})
    finished(whole)
    length = min(finished(load_config(**settings | {"train__output": str(where / f"time-{i}")})) for i in range(2))
    expected, chance = results(whole), random.Random(seed)
    kinds: dict[str, int] = {}
    runs, killed, repeated, without_progress, most_in_a_run = 0, 0, 0, 0, 0
    while killed < kills:
        shutil.rmtree(config.train.output, ignore_errors=True)
        runs, here, before = runs + 1, 0, -1
        while kill_at_random(config, length, chance, kinds):
            killed, here = killed + 1, here + 1
            repeated = max(repeated, reached(config) - newest(config))
            without_progress += newest(config) == before
            before = newest(config)
        finished(config)  # a finished run stays as it is
        got = results(config)
        differ = [name for name in expected if expected[name] != got[name]]
        assert not differ, f"run {runs}: {differ} differ after {here} kills"
        strays = [path.name for path in Path(config.train.output).iterdir() if path.name.startswith(".")]
        assert not strays, f"run {runs}: {strays} are left"
        most_in_a_run = max(most_in_a_run, here)
    sys.stdout.write(json.dumps({
        "kills": killed, "runs": runs, "moments": kinds, "most_steps_repeated": repeated,
        "kills_without_progress": without_progress, "most_kills_of_a_run": most_in_a_run, "run_seconds": length,
    }) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
