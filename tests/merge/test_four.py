"""Merging into 4 bits: the update survives, and bitsandbytes reads what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte as hb
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig
from halfbyte.config.base import Scale
from halfbyte.errors import ConfigError
from halfbyte.merge.base import open_base
from halfbyte.merge.run import MergeResult
from halfbyte.model import load_model
from halfbyte.model.quantize import quantize_model
from halfbyte.quant import quantize_slices

MakeLlama = Callable[..., Path]
MakeAdapter = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(make_llama: MakeLlama) -> Path:
    """Of sizes that are multiples of 64: bitsandbytes' AVX-512 kernel decodes others wrongly (docs/numerics.md)."""
    return make_llama(intermediate_size=128)


@pytest.fixture(scope="module")
def merged(
    tmp_path_factory: pytest.TempPathFactory, model: Path, make_adapter: MakeAdapter, chat_file: Path,
    eval_file: Path,
) -> tuple[Path, MergeResult, Path]:  # fmt: skip
    """A 4-bit merge of an update of 1 to 2 % of the weights, which plain rounding erases."""
    adapter = make_adapter(model, size=0.01)
    output = tmp_path_factory.mktemp("four") / "model"
    config = hb.load_config(model__path=str(model), data__eval=str(eval_file), data__train=str(chat_file))
    return output, hb.merge(config, adapter, output, format="4bit", max_drift=1.0), adapter


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = (torch.arange(40) * 7 % 300).view(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits.float()
    return result


def test_most_of_the_update_is_kept_and_said_layer_by_layer(merged: tuple[Path, MergeResult, Path]) -> None:
    _, result, _ = merged
    assert result.form == "4bit nf4"
    assert len(result.survived) == 14
    assert {layer.name for layer in result.survived} >= {"model.layers.0.self_attn.q_proj.weight"}
    shares = torch.tensor([layer.outputs for layer in result.survived])
    assert 0.5 < shares.mean() < 1.3


def test_the_drift_is_the_last_line_and_the_table_is_short(
    merged: tuple[Path, MergeResult, Path], model: Path, tmp_path: Path, chat_file: Path, eval_file: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output, result, adapter = merged
    recorded = json.loads((output / "halfbyte.json").read_text())["survived"]
    assert [layer["name"] for layer in recorded] == [layer.name for layer in result.survived]
    monkeypatch.setattr("halfbyte.cli.merge.WORST", 3)
    command = ["merge", "--model", str(model), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    command += ["--format", "4bit", "--max-drift", "1", "--data", str(eval_file), "--set", f"data.train={chat_file}"]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr()
    worst = sorted(result.survived, key=lambda layer: -layer.error)
    assert [layer.name in said.err for layer in worst] == [True] * 3 + [False] * 11
    assert said.out.splitlines()[-1] == f"drift from base + adapter, in float32, on {result.drift.on}: {result.drift}"
    assert re.search(r"on all \d+ samples of ", said.out)


def test_transformers_with_bitsandbytes_reads_it(merged: tuple[Path, MergeResult, Path], model: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    output, _, _ = merged
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ours = load_model(str(output), QuantConfig(), compute_dtype=torch.float32).model
    for name, layer in theirs.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # there it would round its scales to bfloat16
            layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
            packed = hb.QuantizedWeight.from_bnb(layer.weight.data, layer.weight.quant_state)
            weight = ours.get_submodule(name).quantized_weight
            assert torch.equal(packed.dequantize(torch.float32), weight.dequantize(torch.float32)), name
    for parameter in theirs.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    assert (logits_of(theirs) - logits_of(ours)).abs().max() < 1e-3


@pytest.mark.parametrize("quant_type", ["int4", "int4-asym"])
def test_a_base_in_another_codebook_stays_in_it(
    tmp_path: Path, make_llama: MakeLlama, make_adapter: MakeAdapter, chat_file: Path, quant_type: str
) -> None:
    base = str(tmp_path / "base")
    made = quantize_model(str(make_llama()), base, QuantConfig(quant_type=quant_type, bits=5.0))
    config = hb.load_config(model__path=base, data__train=str(chat_file), data__eval=str(chat_file))
    adapter = make_adapter(Path(base), size=0.1)
    result = hb.merge(config, adapter, tmp_path / "out", format="4bit", base="quantized", max_drift=1.0)
    assert result.form == f"4bit {quant_type}"
    merged = load_model(str(tmp_path / "out"), QuantConfig(), compute_dtype=torch.float32)
    assert merged.quant["quant_type"] == quant_type
    assert set(made.formats.values()) == {quant_type, "int8"}
    for name, kind in made.formats.items():
        assert merged.model.get_submodule(name).quant_type == kind
    assert "from halfbyte import HalfbyteConfig" in (tmp_path / "out" / "README.md").read_text()


def test_it_wants_text(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: is not set.*Give --set data.train=FILE"):
        hb.merge(hb.load_config(model__path=str(tiny_llama)), tiny_adapter, tmp_path / "out", format="4bit")


@pytest.mark.parametrize("scale", ["auto", "absmax"])
def test_the_scales_are_of_the_base_s_kind(model: Path, tmp_path: Path, scale: Scale) -> None:
    """Weights on a grid of scales of either sign were 3e-3 off (relative squared) rounded to absmax, and 2e-5 to their
    own kind; a stored base says nothing of it but in its bytes."""
    folder = tmp_path / "base"
    quantize_model(str(model), folder, QuantConfig(scale=scale))
    base, asked = open_base(str(folder), QuantConfig()), QuantConfig(scale=scale).chosen_scale
    recipe = QuantConfig().with_recipe(base.recipe())
    assert recipe.chosen_scale == asked
    assert load_model(str(folder), QuantConfig(), compute_dtype=torch.float32).quant == base.recipe()
    name = min(base.targets)
    exact = base.quantized(name).dequantize(torch.float32)
    again = quantize_slices([exact], tuple(exact.shape), exact.dtype, recipe, name=name).dequantize()
    assert (again - exact).square().sum() < 2e-4 * exact.square().sum()
