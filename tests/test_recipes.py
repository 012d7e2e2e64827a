"""The recipes in configs/: each plans for the model and the memory it names, and runs as it stands on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from halfbyte.cli.main import main
from halfbyte.config import load_config
from halfbyte.plan import Machine, plan
from halfbyte.plan.gpu import Gpu

CONFIGS = Path(__file__).parent.parent / "configs"
LLAMA = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
SHAPES: dict[str, dict[str, Any]] = {
    "laptop-cpu": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "gpu-8gb": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "gpu-24gb-70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
SHAPES["long-context"] = SHAPES["gpu-8gb"]
"""The config.json of the model that each names."""


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == SHAPES.keys()
    assert {path.name for path in CONFIGS.glob("*.py")} == {"preference.py", "classification.py"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_it_names_fits_the_memory_it_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    config = load_config(CONFIGS / f"{name}.toml", model__path=str(tmp_path))
    gpu = Gpu(name="one of the size", memory=24 * 10**9, capability=8) if config.model.device == "cuda" else None
    made = plan(config, machine=Machine(threads=4, bf16_units=True, gpu=gpu))
    assert made.fits, (made.peak_memory, made.budget, made.smallest_memory)
    assert made.changes == (), "the recipe says itself what makes it fit"
    if gpu is None:
        assert plan(config, machine=Machine(threads=4)).fits, "in float32, with what the plan changes then"
    if name == "gpu-24gb-70b":
        assert made.choices["resident_layers"] > 10


@pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
@pytest.mark.parametrize("name", SHAPES)
def test_it_runs_as_it_stands_on_a_tiny_model(
    name: str, tiny_llama: Path, chat_file: Path, eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama
    if load_config(CONFIGS / f"{name}.toml").memory.weights == "stream":
        model = tmp_path / "4bit"
        assert main(["quantize", "--model", str(tiny_llama), "--output", str(model)]) == 0
    code = main([
        "train", "--config", str(CONFIGS / f"{name}.toml"), "--model", str(model), "--data", str(chat_file),
        "--eval-data", str(eval_file), "--output", str(tmp_path / "run"), "--steps", "2", "--device", "cpu",
        "--set", "data.max_seq_len=64", "--json",
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert result["steps"] == 2
    assert Path(result["adapter"], "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["preference", "classification"])
def test_a_script_runs_as_it_stands_on_a_tiny_model(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "preference": [{"prompt": f"What follows {i}? ", "chosen": str(i + 1), "rejected": str(i)} for i in range(10)],
        "classification": [{"text": f"The number {i}", "label": ("even", "odd")[i % 2]} for i in range(20)],
    }[name]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = CONFIGS / f"{name}.py"
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_llama), "--data", str(data), "--output", str(output), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        learned = [file.get_tensor(key) for key in file.keys() if "lora_B" in key]  # noqa: SIM118
    assert learned
    assert all(bool(tensor.any()) for tensor in learned)
    said = {
        "preference": "reference: the base with the adapter off", "classification": "of 2 held-out samples right",
    }  # fmt: skip
    assert said[name] in capsys.readouterr().out
