"""What is refused before torch is imported, in the words in which a run refuses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.config import load_config
from halfbyte.errors import ConfigError, DataError, FileError, HalfbyteError, ModelError
from halfbyte.model.targets import linear_names
from halfbyte.plan import Machine, check_run, plan
from halfbyte.plan.architecture import FUSED, architecture
from halfbyte.plan.base import expected_linears, read_base

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
GOOD = ("q_proj", "self_attn.v_proj", "model.layers.1.mlp.down_proj", "layers.0.mlp.up_proj")


@pytest.fixture
def settings(tiny_llama: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model__path": str(tiny_llama), "data__train": str(chat_file), "train__output": str(tmp_path / "run")}


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model__path": ""}, ConfigError, "model.path: is not set. Give --model"),
        ({"train__output": ""}, ConfigError, "train.output: is not set. Give --output"),
        ({"model__path": "/nope"}, ModelError, "/nope: no such model. Give a folder"),
        (
            {"data__train": "/nope.jsonl"},
            DataError,
            "/nope.jsonl: no such file. Give a file of JSON lines as data.train",
        ),
        ({"data__eval": "/proc"}, DataError, "/proc: is a folder.* data.eval"),
        ({"train__resume": "/nope"}, FileError, "/nope: no such checkpoint. Give its folder"),
        (
            {"lora__target_modules": ("q_proj", "qq")},
            ConfigError,
            "qq name no layer .* This model has down_proj, gate",
        ),
        ({"lora__target_modules": ("lm_head",)}, ConfigError, "lm_head name no layer that can have an adapter"),
        ({"quant__skip_modules": ("qq",)}, ConfigError, "quant.skip_modules: 'qq' names no linear layer"),
        (
            {"quant__bits": 4.5},
            ConfigError,
            "quant.bits: is chosen once, .*quantize .*quant.bits=4.5, and use",
        ),
        ({"quant__calibrate": "generic"}, ConfigError, "quant.calibrate: is chosen once, .*quant.calibrate=FILE"),
        ({"lora__init": "loftq"}, ConfigError, "lora.init: needs a start.*start. Run: halfbyte quantize"),
        ({"memory__weights": "mmap"}, ConfigError, "not stored quantized.*left on disk .mmap.*halfbyte quantize"),
        ({"train__sharding": "full"}, ConfigError, "train.sharding: 'full' shares the stored.*Run: halfbyte quantize"),
        (
            {"train__sharding": "full", "memory__weights": "stream"},
            ConfigError,
            "memory.weights: 'stream' and train.sharding=full are not possible together",
        ),
    ],
)
def test_what_is_refused(
    settings: dict[str, Any], change: dict[str, Any], kind: type[HalfbyteError], said: str
) -> None:
    check_run(load_config(**settings))
    with pytest.raises(kind, match=said):
        check_run(load_config(**settings | change))


def test_a_foreign_output_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/mine.txt").touch()
    with pytest.raises(ConfigError, match="holds files that halfbyte did not write"):
        check_run(load_config(**settings))


def test_no_torch_is_needed_to_refuse(settings: dict[str, Any]) -> None:
    """In one process: every such run fails with its exit code, and torch is still not there."""
    model, data, output = settings.values()
    given = ["train", "--model", model, "--output", output]
    runs = [
        (2, given), (3, [*given, "--data", "/nope.jsonl"]), (2, [*given, "--data", data, "--memory", "9XB"]),
        (2, [*given, "--data", data, "--set", "lora.target_modules=qq"]),
        (2, [*given, "--data", data, "--set", "lora.init=pissa"]),
        (2, [*given, "--data", data, "--set", "quant.bits=4.5"]),
        (2, [*given, "--data", data, "--set", "train.sharding=full"]),
        (3, ["train", "--model", "/nope", "--data", data, "--output", output]),
        (2, ["plan", "--model", model, "--set", "lora.target_modules=qq"]),
    ]  # fmt: skip
    script = (
        "import json, sys\nfrom halfbyte.cli.main import main\n"
        "codes = [main(arguments) for _, arguments in json.loads(sys.argv[1])]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\nprint(json.dumps(codes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(runs)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [code for code, _ in runs]


@pytest.mark.parametrize("files", [True, False])
def test_a_plan_refuses_what_training_refuses(tiny_llama: Path, tmp_path: Path, files: bool) -> None:
    """Of a model with files, and of one that is a config alone."""
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    path = str(tiny_llama if files else tmp_path)
    machine = Machine(threads=1, bf16_units=False, runtime=400_000_000)
    plan(load_config(model__path=path, lora__target_modules=GOOD), machine=machine)
    with pytest.raises(ConfigError, match=r"lora\.target_modules: layers\.2\.mlp\.up_proj, qq name no layer"):
        plan(
            load_config(model__path=path, lora__target_modules=(*GOOD, "layers.2.mlp.up_proj", "qq")), machine=machine
        )


def test_of_an_unknown_family_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "unheard_of"}))
    config = load_config(model__path=str(tmp_path), lora__target_modules=("wqkv",))
    assert read_base(config.model.path, config.quant, "float32").linear_names == frozenset()
    plan(config, machine=Machine(threads=1, bf16_units=False, runtime=400_000_000))


def test_of_a_family_without_fused_layers_last_parts_count(tmp_path: Path) -> None:
    """GPT-2's file says h.0.attn.c_attn, transformers transformer.h.0.attn.c_attn."""
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9,
                                                      "model_type": "gpt2"}))  # fmt: skip
    tensors = {"h.0.attn.c_attn.weight": torch.zeros(8, 24), "wte.weight": torch.zeros(9, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    machine = Machine(threads=1, bf16_units=False, runtime=400_000_000)
    for good in ("c_attn", "transformer.h.0.attn.c_attn"):
        plan(load_config(model__path=str(tmp_path), lora__target_modules=(good,)), machine=machine)
    with pytest.raises(ConfigError, match=r"q_proj name no layer .* This model has c_attn"):
        plan(load_config(model__path=str(tmp_path), lora__target_modules=("h.0.q_proj",)), machine=machine)


@pytest.mark.parametrize("family", FUSED)
def test_the_names_are_those_of_transformers(family: str) -> None:
    """Of the families whose layers are taken to be known from a config alone."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    assert expected_linears(architecture(SMALL | {"model_type": family}, "")) == {*linear_names(model)} - {"lm_head"}
