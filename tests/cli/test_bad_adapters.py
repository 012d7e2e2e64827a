"""Adapters and checkpoints with something wrong: docs/refusals.md says what is said of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.refusals import (
    Change,
    adapter_config,
    adapter_tensors,
    chat,
    check,
    data,
    promised,
    said,
    tensors,
)

from halfbyte.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _renamed(old: str, new: str) -> Change:
    return adapter_tensors(lambda s: [s.update({k.replace(old, new): s.pop(k)}) for k in list(s)])


def _grown(state: dict[str, torch.Tensor]) -> None:
    """600 for every rank of 2."""
    for name, tensor in list(state.items()):
        shape = (600, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], 600)
        state[name] = torch.zeros(shape)


ADAPTERS: dict[str, Change] = {
    "no such folder": lambda p: shutil.rmtree(p / "adapter"),
    "pickled": lambda p: (p / "adapter/adapter_model.safetensors").rename(p / "adapter/adapter_model.bin"),
    "a pickle under another name": lambda p: (p / "adapter/adapter_model.safetensors").write_bytes(b"\x80\x04\x95")
    and (p / "adapter/manifest.json").unlink(),
    "cut short": lambda p: (p / "adapter/adapter_model.safetensors").write_bytes(
        (p / "adapter/adapter_model.safetensors").read_bytes()[:-100]
    ),
    "a changed byte": lambda p: (p / "adapter/adapter_config.json").write_bytes(
        (p / "adapter/adapter_config.json").read_bytes().replace(b'"r": 2', b'"r": 3')
    ),
    "another rank in its config": adapter_config(r=3),
    "rank 0": adapter_config(r=0),
    "rank 600": lambda p: [
        adapter_tensors(_grown)(p), (p / "adapter/manifest.json").touch(), adapter_config(r=600)(p)
    ],
    "no alpha": adapter_config(lora_alpha=...),
    "DoRA without magnitudes": adapter_config(use_dora=True),
    "a whole module without its table": adapter_config(modules_to_save=["lm_head"]),
    "biases": adapter_config(bias="all"),
    "another kind": adapter_config(peft_type="IA3"),
    "A without B": adapter_tensors(lambda s: s.pop(next(k for k in s if "lora_B" in k))),
    "a NaN": adapter_tensors(lambda s: s.update({FIRST: s[FIRST] * torch.nan})),
    "100,001 tensors": adapter_tensors(lambda s: s.update({f"x{n}": torch.zeros(0) for n in range(100_001)})),
    "modules that the base lacks": _renamed("q_proj", "zz_proj"),
    "names without the prefix": _renamed("base_model.model.", ""),
    "sizes of another base": adapter_tensors(lambda s: s.update({FIRST: torch.zeros(2, 32)})),
    "trained on other weights": tensors(norm=torch.full((64,), 0.5, dtype=torch.bfloat16)),
    "trained with another tokenizer": lambda p: _add_token(p / "model"),
}  # fmt: skip
RESUMED: dict[str, tuple[Change, list[str]]] = {
    "another rank": (lambda p: None, ["--set", "lora.r=3"]),
    "another alpha": (lambda p: None, ["--set", "lora.lora_alpha=3"]),
    "other layers": (lambda p: None, ["--set", "lora.target_modules=q_proj"]),
    "another seed": (lambda p: None, ["--set", "train.seed=3"]),
    "another batch": (lambda p: None, ["--set", "train.micro_batch_size=2"]),
    "another format": (lambda p: None, ["--set", "quant.quant_type=fp4"]),
    "several at once": (lambda p: None, ["--set", "optim.lr=0.1", "--set", "optim.bits=8"]),
    "another base": (tensors(norm=torch.full((64,), 0.5, dtype=torch.bfloat16)), []),
    "another tokenizer": (lambda p: _add_token(p / "model"), []),
    "other data": (data(*[chat(("user", "a"), ("assistant", "b"))] * 9), []),
    "a newer halfbyte's": (lambda p: _manifest(p / "run/checkpoint-2", format=2), []),
    "damaged, and given by name": (
        lambda p: (p / "run/checkpoint-2/rng.safetensors").write_bytes(b""), ["--resume", "PLACE/run/checkpoint-2"],
    ),
    "a file less, and given by name": (
        lambda p: (p / "run/checkpoint-2/optimizer.safetensors").unlink(), ["--resume", "PLACE/run/checkpoint-2"],
    ),
    "no checkpoint": (lambda p: None, ["--resume", "PLACE/adapter"]),
}  # fmt: skip
GO_ON = [
    "train", "--model", "PLACE/model", "--data", "PLACE/data.jsonl", "--output", "PLACE/run", "--steps", "3",
    "--set", "lora.r=2", "--set", "data.max_seq_len=96", "--set", "train.save_every=1",
]  # fmt: skip


def _add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 320, "content": "§§", "special": False})
    path.write_text(json.dumps(value))


def _manifest(folder: Path, **changed: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _hashes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("command", ["eval", "merge", "generate"])
def test_adapters(case: str, command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ADAPTERS[case](place)
    arguments = [command, "--model", "PLACE/model", "--adapter", "PLACE/adapter"]
    arguments += {
        "eval": ["--data", "PLACE/data.jsonl"], "generate": ["--prompt", "a"],
        "merge": ["--data", "PLACE/data.jsonl", "--output", "PLACE/out", "--format", "16bit"],
    }[command]  # fmt: skip
    check("adapters", case, arguments, place, capsys)


@pytest.mark.parametrize("case", RESUMED)
def test_checkpoints(case: str, place: Path, good_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good_run, place / "run")
    change, more = RESUMED[case]
    change(place)
    before = _hashes(place / "run")
    check("checkpoints", case, [*GO_ON, *more], place, capsys)
    assert _hashes(place / "run") == before


def test_the_page_shows_these() -> None:
    assert list(promised("adapters")) == list(ADAPTERS)
    assert list(promised("checkpoints")) == list(RESUMED)


def test_the_good_files_are_good(place: Path, good_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the refusals are for what is wrong with them."""
    arguments = ["--model", f"{place}/model", "--adapter", f"{place}/adapter", "--data", f"{place}/data.jsonl"]
    assert main(["eval", *arguments]) == 0
    assert main(["merge", *arguments, "--format", "16bit", "--output", f"{place}/out"]) == 0
    shutil.copytree(good_run, place / "run")
    assert main([each.replace("PLACE", str(place)) for each in GO_ON]) == 0
    assert "resumed from" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_by_name(
    place: Path, good_run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(good_run, place / "run")
    (place / "run/checkpoint-2/rng.safetensors").write_bytes(b"")
    assert main([each.replace("PLACE", str(place)) for each in GO_ON]) == 0
    assert "checkpoint-2 is passed over" in caplog.text
    assert "after step 1" in capsys.readouterr().err


def test_a_finished_run_is_done(place: Path, good_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good_run, place / "run")
    weights = place / "run" / "adapter" / "adapter_model.safetensors"
    adapter = weights.read_bytes()
    arguments = [each.replace("PLACE", str(place)) for each in GO_ON]
    assert main([*arguments, "--steps", "2"]) == 0
    assert weights.read_bytes() == adapter
    assert main([*arguments, "--resume", "auto", "--output", f"{place}/new"]) == 0
    assert "fresh start: no checkpoint in" in capsys.readouterr().err


def test_an_adapter_is_bounded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (place / "adapter" / "adapter_model.safetensors").stat().st_size
    arguments = ["eval", "--model", f"{place}/model", "--adapter", f"{place}/adapter", "--data", f"{place}/data.jsonl"]
    assert main([*arguments, "--set", f"limits.adapter_bytes={size}"]) == 0
    code, line = said([*arguments, "--set", f"limits.adapter_bytes={size - 1}"], capsys)
    assert code == 3
    assert f"limits.adapter_bytes is {size - 1:,}" in line
