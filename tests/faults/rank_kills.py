"""Trains on two ranks and kills one, again and again: python rank_kills.py SETTINGS.json KILLS SEED; a JSON line.

torchrun starts the ranks anew after every kill (--max-restarts), and they go on from the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from kills import ANY, EARLY, SAVING, newest, reached, results, saving

from halfbyte.config import RunConfig, load_config

WORLD = 2


def start(settings: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    """torchrun with two ranks."""
    values = [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.', 1)}={value}")]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}",
             "--max-restarts=1000", "-m", "halfbyte", "train", *values],
            stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def ranks_of(agent: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes by rank; empty while they are being started."""
    found = {}
    try:
        for child in psutil.Process(agent.pid).children():
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    except psutil.Error:
        return {}
    return found if len(found) == WORLD else {}


def wait_for(agent: subprocess.Popen[bytes], what: Any) -> bool:
    """Until `what()` holds; False: the run has ended first."""
    while not what():
        if agent.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kill_one(agent: subprocess.Popen[bytes], config: RunConfig, chance: random.Random) -> tuple[str, int] | None:
    """Wait for some moment and kill one rank; (the moment, the rank), or None: the run had finished."""
    if not wait_for(agent, lambda: ranks_of(agent)):
        return None
    output, kind, victim = (
        Path(config.train.output),
        chance.choice((SAVING, SAVING, EARLY, ANY)),
        chance.randrange(WORLD),
    )
    ranks = ranks_of(agent)
    if kind == EARLY:
        time.sleep(chance.uniform(0, 4))  # while it imports, reads, quantizes
    else:
        before = reached(config)
        if not wait_for(agent, lambda: reached(config) != before):  # it trains
            return None
        time.sleep(chance.uniform(0, 1.5))
        if kind == SAVING and not wait_for(agent, lambda: saving(output)):
            return None
    if agent.poll() is not None or victim not in ranks:
        return None
    ranks[victim].kill()
    wait_for(agent, lambda: (now := ranks_of(agent)) and now[victim].pid != ranks[victim].pid)
    return kind, victim


def main() -> None:
    """See the module."""
    settings, kills, seed = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    where = Path(settings["train__output"])
    where.mkdir(parents=True, exist_ok=True)
    whole, hurt = (settings | {"train__output": str(where / name)} for name in ("whole", "killed"))
    started = time.perf_counter()
    assert start(whole, where / "log").wait() == 0, (where / "log").read_text()[-2000:]
    seconds = time.perf_counter() - started
    expected, config, chance = results(load_config(**whole)), load_config(**hurt), random.Random(seed)
    moments: dict[str, int] = {}
    victims = [0] * WORLD
    runs, most_repeated = 0, 0
    while sum(victims) < kills:
        runs += 1
        shutil.rmtree(hurt["train__output"], ignore_errors=True)
        agent = start(hurt, where / "log")
        while sum(victims) < kills and (killed := kill_one(agent, config, chance)):
            kind, victim = killed
            moments[kind] = moments.get(kind, 0) + 1
            victims[victim] += 1
            most_repeated = max(most_repeated, reached(config) - newest(config))
        assert agent.wait() == 0, (where / "log").read_text()[-2000:]
        got = results(config)
        differ = [name for name in expected if expected[name] != got[name]]
        assert not differ, f"run {runs}: {differ} differ after {sum(victims)} kills"
        strays = [path.name for path in Path(config.train.output).iterdir() if path.name.startswith(".")]
        assert not strays, f"run {runs}: {strays} are left"
    sys.stdout.write(json.dumps({
        "kills": sum(victims), "of_rank": victims, "runs": runs, "moments": moments,
        "most_steps_repeated": most_repeated, "undisturbed_seconds": round(seconds, 1),
    }) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
