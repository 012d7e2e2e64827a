"""What torchrun says through the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli.ranks import one_voice, ranks_of, share_threads
from halfbyte.errors import ConfigError
from halfbyte.train.ranks import Ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_ranks_of() -> None:
    assert ranks_of({}) == Ranks()
    assert ranks_of(TORCHRUN) == Ranks(rank=3, world=4, local_rank=1, local_world=2)
    kept = TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert ranks_of(kept).attempt == 2
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        ranks_of({"WORLD_SIZE": "2"})


def test_threads_are_shared() -> None:
    """torchrun's 1 means nothing was said; another number was."""
    cores = len(os.sched_getaffinity(0))
    for given, expected in (("1", str(max(cores // 2, 1))), ("3", "3")):
        environment = TORCHRUN | {"OMP_NUM_THREADS": given}
        share_threads(environment)
        assert environment["OMP_NUM_THREADS"] == expected
    alone = {"OMP_NUM_THREADS": "1"}
    share_threads(alone)
    assert alone == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("rank", "said"), [("0", False), ("1", True)])
def test_the_first_of_a_machine_speaks(rank: str, said: bool) -> None:
    with pytest.raises(ConfigError) as caught, one_voice({"LOCAL_RANK": rank}, ConfigError):
        raise ConfigError("is not set")
    assert caught.value.said is said


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_cannot_be_sharded_is_refused_before_ranks_meet(
    tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Under torchrun: one line of ours, from one rank, and torchrun's account names our exit code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "halfbyte", "train", "--model",
        str(tiny_llama), "--data", str(chat_file), "--output", str(tmp_path / "run"), "--set", "train.sharding=full",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("halfbyte: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("halfbyte: train.sharding: 'full' shares the stored bytes of a base")
    assert re.search(r"exitcode *: 2\b", done.stderr)
    assert done.stderr.rindex("halfbyte: train.sharding") > done.stderr.index("Root Cause")
    assert "1970" not in done.stderr
    assert "Gloo" not in done.stderr
    assert "process group" not in done.stderr
    assert not (tmp_path / "run").exists()
