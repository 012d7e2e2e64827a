"""`halfbyte serve` and `chat` with a GPU. ``pytest -m gpu``; needs a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import ask, command, running

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]  # fmt: skip
EXACT = ("--set", "quant.compute_dtype=float32")


def test_answers_are_those_of_the_cpu(make_llama: Any, make_adapter: Any, tmp_path: Path) -> None:
    """Greedy, in float32: the base and two adapters, eight prompts at once."""
    model = make_llama(intermediate_size=128)
    adapters = [f"a{seed}={make_adapter(seed)}" for seed in (1, 2)]
    orders = [{"model": name, "prompt": [5 + number, 6, 7], "max_tokens": 12}
              for number, name in enumerate(["base", "a1", "a2", "base", "a2", "a1", "base", "a1"])]  # fmt: skip
    found = {}
    for device in ("cpu", "cuda"):
        options = [*EXACT, "--device", device, *(part for name in adapters for part in ("--adapter", name))]
        with (
            running(tmp_path / device, *command(model, *options)) as (_, url),
            ThreadPoolExecutor(len(orders)) as pool,
        ):
            answers = list(pool.map(lambda order, url=url: ask(url, **order), orders))
        assert all(answer.status_code == 200 for answer in answers), answers[0].text
        found[device] = [answer.json()["choices"][0]["text"] for answer in answers]
    assert found["cuda"] == found["cpu"]


def test_chat_answers(make_llama: Any) -> None:
    talk = subprocess.run(
        [sys.executable, "-m", "halfbyte", "chat", "--model", str(make_llama(intermediate_size=128)), "--device",
         "cuda", "--max-new-tokens", "8"],
        input="One?\n/quit\n", capture_output=True, text=True, env=os.environ, timeout=300,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr
    assert "Traceback" not in talk.stderr
    assert talk.stdout.strip()
