"""PiSSA and LoftQ on the 4-bit base: errors as by torch's SVD, read by PEFT, trained from where they begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfbyte as hb
from halfbyte.calibrate import StartResult, calibrate_model, quantize_with_start
from halfbyte.calibrate.start import principal
from halfbyte.checkpoint import load_adapter
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig, RunConfig
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

R, ALPHA = 4, 16.0
INITS = ("pissa", "loftq")


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Path:
    return make_llama(dtype=torch.float32, intermediate_size=128)


def config_of(model: Path, init: str, **more: object) -> RunConfig:
    return hb.load_config(model__path=str(model), lora__init=init, lora__r=R, lora__lora_alpha=ALPHA, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, tuple[Path, StartResult]]:
    folder = tmp_path_factory.mktemp("starts")
    return {init: (folder / init, quantize_with_start(config_of(model, init), folder / init)) for init in INITS}


def weights_of(base: Path, *, start: bool) -> dict[str, torch.Tensor]:
    """Of the linear layers, decoded, with the start's ``scaling B A``."""
    loaded = load_model(str(base), QuantConfig(), compute_dtype=torch.float32).model
    found = {
        f"{n}.weight": m.quantized_weight.dequantize(torch.float32)
        for n, m in loaded.named_modules()
        if isinstance(m, hb.Linear4bit)
    }
    state = load_adapter(base / "start").state if start else {}
    for name in found if start else ():
        a, b = (state[f"base_model.model.{name.replace('.weight', '')}.lora_{which}.weight"] for which in "AB")
        found[name] = found[name] + ALPHA / R * b @ a
    return found


def least_error(missing: torch.Tensor) -> float:
    """Squared, of the best matrix of rank R."""
    return float(torch.linalg.svdvals(missing)[R:].square().sum())


def test_largest_directions_are_those_of_an_svd() -> None:
    """Noise is the hardest case, its singular values being nearly alike; measured 1.0006."""
    noise = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    a, b = principal(noise, R, 2.0)
    assert float((noise - b @ a).square().sum()) < 1.005 * least_error(noise)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0) / 2.0, rtol=1e-4)
    a, b = principal(noise[:3], R, 2.0)
    assert torch.allclose(b @ a, noise[:3], atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_errors_fall_as_an_svd_says(made: dict[str, tuple[Path, StartResult]], model: Path, init: str) -> None:
    """Of W - Q - s B A by layer, beside W - Q of the nearest codes."""
    folder, result = made[init]
    stored = load_file(model / "model.safetensors")
    whole, base = weights_of(folder, start=True), weights_of(folder, start=False)
    assert len(result.layers) == result.quantized == 14
    for layer in result.layers:
        wanted, size = stored[layer.name].float(), float(stored[layer.name].square().sum())
        error = float((wanted - whole[layer.name]).square().sum()) / size
        assert error == pytest.approx(layer.weights, rel=1e-3)
        assert layer.weights < 0.95 * layer.nearest
        if init == "loftq":  # nothing of rank R is better beside this base
            assert error < 1.01 * least_error(wanted - base[layer.name]) / size
    record = json.loads((folder / "halfbyte.json").read_text())
    assert (
        record["start"] == json.loads((folder / "config.json").read_text())["halfbyte_start"] == {"init": init, "r": R}
    )


def test_one_round_of_loftq_leaves_the_base_as_it_is_without(model: Path, tmp_path: Path) -> None:
    config = config_of(model, "loftq", lora__loftq_rounds=1)
    one = quantize_with_start(config, tmp_path / "one")
    hb_plain = load_model(str(model), QuantConfig(), compute_dtype=torch.float32)
    assert load_adapter(tmp_path / "one" / "start").info["base_sha256"] == hb_plain.base_sha256
    more = quantize_with_start(replace(config, lora=replace(config.lora, loftq_rounds=5)), tmp_path / "more")
    assert sum(layer.weights for layer in more.layers) < sum(layer.weights for layer in one.layers)


@pytest.mark.parametrize("init", INITS)
def test_peft_reads_it(made: dict[str, tuple[Path, StartResult]], model: Path, init: str) -> None:
    folder = made[init][0]
    ids = torch.arange(3, 40)[None]
    base = load_model(str(folder), QuantConfig(), compute_dtype=torch.float32)
    start = load_adapter(folder / "start")
    assert start.info["base_sha256"] == base.base_sha256
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs.load_state_dict(weights_of(folder, start=False), strict=False)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "start")
    with torch.no_grad():
        ours = attach_saved(base.model, start)(input_ids=ids).logits
        assert torch.allclose(theirs(input_ids=ids).logits, ours, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_training_begins_there_whatever_the_scaling(
    made: dict[str, tuple[Path, StartResult]], chat_file: Path, eval_file: Path, tmp_path: Path, init: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def before(**more: object) -> float:
        settings = {"model__path": str(made[init][0]), "data__train": str(chat_file), "data__eval": str(eval_file),
                    "train__output": str(tmp_path / str(len(more))), "train__steps": 1, "lora__r": R}  # fmt: skip
        result = hb.train(hb.load_config(**settings | {"lora__init": init} | more))
        assert result.eval_loss_before is not None
        return result.eval_loss_before

    folder, loss = made[init][0], before(lora__lora_alpha=2.0)
    assert (
        main(["eval", "--model", str(folder), "--adapter", str(folder / "start"), "--data", str(eval_file), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == pytest.approx(loss, abs=1e-5)
    assert loss == pytest.approx(before(lora__use_rslora=True, train__seed=1), abs=1e-5)
    other = next(name for name in INITS if name != init)
    with pytest.raises(ConfigError, match=rf"lora\.init: is {other}, "):
        before(lora__init=other, train__seed=1, train__resume="never")


def test_refusals(made: dict[str, tuple[Path, StartResult]], model: Path, chat_file: Path, tmp_path: Path) -> None:
    folder = made["pissa"][0]
    run = {"data__train": str(chat_file), "train__output": str(tmp_path / "run"), "train__steps": 1, "lora__r": R}
    with pytest.raises(ConfigError, match=r"lora\.init: is random, the base was written for pissa"):
        hb.train(hb.load_config(model__path=str(folder), **run))
    with pytest.raises(
        ConfigError, match=r"needs a start.*Run: halfbyte quantize .*--set lora\.init=loftq, and use DIR"
    ):
        hb.train(hb.load_config(model__path=str(model), lora__init="loftq", **run))
    with pytest.raises(ConfigError, match=r"lora\.init: 'pissa' takes no text"):
        calibrate_model(config_of(model, "pissa", quant__calibrate=str(chat_file)), tmp_path / "both")
    with pytest.raises(ConfigError, match=r"lora\.init: needs a text.*Set quant\.calibrate"):
        quantize_with_start(config_of(model, "cloq"), tmp_path / "none")
    with pytest.raises(AdapterError, match=r"began at pissa, .*Merge with --base quantized"):
        hb.merge(hb.load_config(model__path=str(folder)), folder / "start", tmp_path / "merged", base="original")
