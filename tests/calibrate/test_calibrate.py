"""A model calibrated on text: closer in its outputs, in bitsandbytes' format, with an adapter to begin at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte as hb
from halfbyte.calibrate import CalibrateResult, calibrate_model
from halfbyte.checkpoint import load_adapter
from halfbyte.cli.main import main
from halfbyte.config import DataConfig, QuantConfig
from halfbyte.data import load_data
from halfbyte.errors import ConfigError, ResourceError
from halfbyte.model import load_model, load_tokenizer
from halfbyte.model.adapt import attach_saved

MakeLlama = Callable[..., Path]
Made = tuple[Path, CalibrateResult]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(make_llama: MakeLlama) -> Path:
    """Of sizes that are multiples of 64: bitsandbytes' AVX-512 kernel decodes others wrongly (docs/numerics.md)."""
    return make_llama(intermediate_size=128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path, chat_file: Path) -> Made:
    output = tmp_path_factory.mktemp("calibrated") / "model"
    config = hb.load_config(
        model__path=str(model), quant__calibrate=str(chat_file), lora__init="cloq", lora__r=4, lora__lora_alpha=8.0
    )
    return output, calibrate_model(config, output)


def logits_of(model: torch.nn.Module, folder: Path, text: Path) -> torch.Tensor:
    rows = load_data(str(text), load_tokenizer(str(folder)), DataConfig())
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.from_numpy(row.input_ids)[None].long()).logits[0] for row in rows])


def test_every_layer_is_closer_in_its_outputs(made: Made) -> None:
    folder, result = made
    assert len(result.layers) == result.quantized == 14
    assert all(layer.outputs < layer.nearest for layer in result.layers)
    assert result.bits_per_weight == pytest.approx(4.13, abs=0.02)
    record = json.loads((folder / "halfbyte.json").read_text())
    assert record["calibrated"]["scale"] == "mse-signed"
    assert record["calibrated"]["tokens"] == result.tokens > 500
    assert json.loads((folder / "config.json").read_text())["halfbyte_calibrated"] == record["calibrated"]


def test_bitsandbytes_decodes_the_same_bits(made: Made) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32)
    ours = load_model(str(made[0]), QuantConfig(), compute_dtype=torch.float32).model
    negative = 0
    for name, layer in theirs.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = ours.get_submodule(name).quantized_weight
            with torch.compiler.set_stance("force_eager"):
                decoded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(decoded, weight.dequantize(decoded.dtype)), name
            negative += int((weight.absmax < 128).sum())  # 8-bit scales: below the middle of the map
    assert negative > 0


def test_the_start_makes_up_for_a_part(made: Made, model: Path, eval_file: Path) -> None:
    """On other samples than those calibrated on; measured 0.6."""
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), model, eval_file)
    base = load_model(str(made[0]), QuantConfig(), compute_dtype=torch.float32)
    start = load_adapter(made[0] / "start")
    assert start.info["base_sha256"] == base.base_sha256
    alone = (logits_of(base.model, model, eval_file) - wanted).norm()
    assert (logits_of(attach_saved(base.model, start), model, eval_file) - wanted).norm() < 0.8 * alone


def test_training_begins_there(made: Made, chat_file: Path, eval_file: Path, tmp_path: Path) -> None:
    def run(**more: object) -> float:
        settings = {"model__path": str(made[0]), "data__train": str(chat_file), "data__eval": str(eval_file),
                    "train__output": str(tmp_path / str(len(more))), "train__steps": 1, "lora__r": 4}  # fmt: skip
        before = hb.train(hb.load_config(**settings | more)).eval_loss_before
        assert before is not None
        return before

    stock, begun = run(), run(lora__init="cloq", lora__lora_alpha=2.0)  # another scaling, the same update
    assert stock != begun
    with pytest.raises(ConfigError, match=r"lora\.r: is 8: .*start has rank 4"):
        run(lora__init="cloq", lora__r=8, train__seed=1)
    folder = load_adapter(made[0] / "start").folder
    main(["eval", "--model", str(made[0]), "--adapter", str(folder), "--data", str(eval_file), "--json"])


def test_refusals(model: Path, chat_file: Path, tmp_path: Path, made: Made) -> None:
    small = hb.load_config(model__path=str(model), quant__calibrate=str(chat_file), memory__budget="1MB")
    with pytest.raises(ResourceError, match=r"memory\.budget: 1\.0 MB are not enough.*Give --memory \d+MB"):
        calibrate_model(small, tmp_path / "small")
    with pytest.raises(ConfigError, match=r"quant\.calibrate: is chosen once.*Run: halfbyte quantize"):
        load_model(str(model), QuantConfig(calibrate=str(chat_file)), compute_dtype=torch.float32)
    again = hb.load_config(model__path=str(made[0]), quant__calibrate=str(chat_file))
    with pytest.raises(ConfigError, match="is already quantized"):
        calibrate_model(again, tmp_path / "again")


def test_without_a_text_of_ones_own(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generic` is Python's own text: the same twice, recorded by its name, and no file of it is left."""
    arguments = ["quantize", "--model", str(model), "--set", "quant.calibrate=generic", "--json"]
    records = []
    for name in ("one", "two"):
        assert main([*arguments, "--output", str(tmp_path / name)]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert all(layer["outputs"] < layer["nearest"] for layer in found["layers"])
        records.append(json.loads((tmp_path / name / "halfbyte.json").read_text())["calibrated"])
    assert records[0] == records[1]
    assert records[0]["data"] == "generic"
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
