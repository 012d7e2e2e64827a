"""Real runs, killed with SIGKILL at random moments, come to the same bytes as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "faults" / "kills.py"
SAVE_EVERY = 3


@pytest.mark.parametrize(("kills", "seed"), [(10, 0), pytest.param(300, 1, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_killed_runs_equal_the_undisturbed(
    kills: int,
    seed: int,
    tmp_path: Path,
    tiny_llama: Path,
    chat_file: Path,
    record_property: Callable[[str, object], None],
) -> None:
    settings = {
        "model__path": str(tiny_llama), "data__train": str(chat_file), "train__output": str(tmp_path / "runs"),
        "quant__compute_dtype": "float32", "lora__r": 4, "lora__dropout": 0.1, "optim__lr": 5e-3, "train__steps": 12,
        "data__max_seq_len": 160, "train__save_every": SAVE_EVERY, "train__keep": 2,
    }  # fmt: skip
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, SCRIPT, file, str(kills), str(seed)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, figure in found.items():
        record_property(name, figure)
    assert found["kills"] >= kills
    assert found["most_steps_repeated"] <= SAVE_EVERY
