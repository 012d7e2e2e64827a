"""Mixtures of experts through every command: trained, resumed, streamed, merged. The numbers: test_twenty_steps.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig, RunConfig
from halfbyte.config.base import Scale
from halfbyte.errors import ConfigError
from halfbyte.model import load_model
from halfbyte.model.hf_config import prequantized_config
from halfbyte.model.inventory import LINEARS
from halfbyte.model.quantize import quantize_model
from halfbyte.nn import Linear4bit
from halfbyte.plan.base import read_base
from halfbyte.train import train

MakeRun = Callable[..., RunConfig]
MakeMixture = Callable[..., Path]
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def outcome(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses step by step, and the adapter."""
    result = train(config)
    lines = map(json.loads, (Path(config.train.output) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"], load_file(
        Path(result.adapter) / "adapter_model.safetensors"
    )


@pytest.fixture
def in_4_bits(make_mixture: MakeMixture, tmp_path: Path) -> Callable[..., Path]:
    def made(family: str, scale: Scale = "absmax") -> Path:  # which the bounds below were measured with
        quantize_model(str(make_mixture(family)), tmp_path / "base", QuantConfig(scale=scale))
        return tmp_path / "base"

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_in_4_bits_is_ours_and_holds_every_expert(
    family: str, make_mixture: MakeMixture, in_4_bits: Callable[..., Path]
) -> None:
    plain, folder = make_mixture(family), in_4_bits(family, "auto")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "halfbyte"
    assert {name for name in keys(folder) if ".weight." not in name} == keys(plain)
    experts = {name for name in keys(plain) if ".experts." in name}
    assert experts
    assert {f"{name}.absmax" for name in experts} <= keys(folder)
    one, other = (load_model(str(path), QuantConfig(), compute_dtype=torch.float32) for path in (plain, folder))
    assert one.base_sha256 == other.base_sha256
    routers = [m for n, m in other.model.named_modules() if n.endswith("mlp.gate") and not isinstance(m, Linear4bit)]
    assert routers
    assert not any(p.requires_grad for module in routers for p in module.parameters())
    ids, config = torch.arange(40)[None], prequantized_config(folder, compute_dtype="auto")
    again = hf.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, other.model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_things_live_changes_nothing(family: str, make_run: MakeRun, in_4_bits: Callable[..., Path]) -> None:
    """Streamed layers are computed again in the backward pass; with dropout, from the same random numbers."""
    settings: dict[str, Any] = {
        "model__path": str(in_4_bits(family)), "train__steps": 3, "train__gradient_accumulation_steps": 2,
        "lora__dropout": 0.1,
    }  # fmt: skip
    losses, adapter = outcome(make_run("resident", **settings))
    assert losses[-1] < losses[0]
    for number, way in enumerate((
        {"memory__weights": "stream"}, {"memory__weights": "stream", "train__gradient_checkpointing": True},
        {"memory__weights": "mmap", "memory__activations": "disk"}, {"train__gradient_checkpointing": True},
        {"optim__paged": True, "memory__optimizer_budget": "40kB"},
    )):  # fmt: skip
        found, other = outcome(make_run(str(number), **settings, **way))
        assert found == losses, way
        assert all(torch.equal(other[name], tensor) for name, tensor in adapter.items()), way


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_to_the_same_bytes(family: str, make_run: MakeRun, make_mixture: MakeMixture) -> None:
    settings = {"model__path": str(make_mixture(family)), "train__save_every": 2, "lora__dropout": 0.1}
    config = make_run(**settings)
    losses, adapter = outcome(config)
    for folder in ("adapter", "checkpoint-6"):
        shutil.rmtree(Path(config.train.output) / folder)
    assert train(config).steps_now == 2
    found, other = outcome(config)
    assert found == losses
    assert all(torch.equal(other[name], tensor) for name, tensor in adapter.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_takes_it(
    family: str, make_run: MakeRun, make_mixture: MakeMixture, in_4_bits: Callable[..., Path], tmp_path: Path,
    eval_file: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And what is merged transformers reads: in 16 bits under the names of the model's own files."""
    base = in_4_bits(family)
    config = make_run(model__path=str(base), train__steps=3)
    adapter, run = train(config).adapter, ["--model", str(base), "--json"]

    def said(*arguments: str) -> dict[str, Any]:
        assert main(list(arguments)) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    made = said("plan", *run, "--data", config.data.train)
    assert not any("experts" in note for note in made["notes"])
    wanted = said("eval", *run, "--adapter", adapter, "--data", str(eval_file))["loss"]
    said("generate", *run, "--adapter", adapter, "--prompt", "What follows 3?", "--max-new-tokens", "4")
    data = ["--set", f"data.train={config.data.train}", "--set", f"data.eval={eval_file}"]
    for form in ("16bit", "4bit"):
        merged = said("merge", *run, "--adapter", adapter, "--output", str(tmp_path / form), "--format", form, *data)
        assert merged["drift"]["kl"] < (1e-3 if form == "16bit" else 0.05)
    assert keys(tmp_path / "16bit") == keys(make_mixture(family))
    found = said("eval", "--model", str(tmp_path / "4bit"), "--data", str(eval_file), "--json")["loss"]
    assert abs(found - wanted) < 0.1
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "16bit")(ids).logits.float()
        exact = hb.merge(hb.load_config(model__path=str(base)), adapter, tmp_path / "again").drift
        ours = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")(ids).logits.float()
    assert exact.kl < 1e-3
    assert float((theirs - ours).norm() / theirs.norm()) < 0.3
    assert main(["merge", *run, "--adapter", adapter, "--output", str(tmp_path / "g"), "--format", "gguf"]) == 3
    assert "cannot be written as GGUF" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_every_byte_of_the_base(
    family: str, make_mixture: MakeMixture, in_4_bits: Callable[..., Path]
) -> None:
    for path in (make_mixture(family), in_4_bits(family, "auto")):
        base, groups = read_base(str(path), QuantConfig(), "float32"), dict[str, int]()
        loaded = load_model(str(path), QuantConfig(), compute_dtype=torch.float32)
        for row in loaded.inventory.rows:
            groups[row.group] = groups.get(row.group, 0) + row.bytes
        buffers = sum(buffer.nbytes for name, buffer in loaded.model.named_buffers() if name.endswith("inv_freq"))
        assert base.linears == groups[LINEARS]
        assert base.other == groups["norms and biases"] + groups["other"] - buffers
        assert base.expert_weights == sum(
            m.in_features * m.out_features for n, m in loaded.model.named_modules()
            if isinstance(m, Linear4bit) and ".experts." in n
        )  # fmt: skip


@pytest.mark.parametrize(("family", "names"), [("mixtral", ("q_proj", "w1")), ("olmoe", ("gate_proj",))])
def test_experts_get_no_adapter(
    family: str, names: tuple[str, ...], make_run: MakeRun, make_mixture: MakeMixture
) -> None:
    with pytest.raises(ConfigError, match=rf"{names[-1]} name experts' layers.*k_proj, o_proj, q_proj, v_proj"):
        train(make_run(model__path=str(make_mixture(family)), lora__target_modules=names))


def test_all_linear_leaves_experts_out(make_run: MakeRun, make_mixture: MakeMixture) -> None:
    _, adapter = outcome(make_run(model__path=str(make_mixture("qwen3_moe")), train__steps=2))
    assert {name.split(".")[6] for name in adapter} == {"q_proj", "k_proj", "v_proj", "o_proj"}
