"""Errors of a model that was quantized, against plain arithmetic on its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.cli.main import main
from halfbyte.compare.weights import BINS, weight_report
from halfbyte.config import load_config
from halfbyte.errors import ModelError
from halfbyte.model.quantize import quantize_model
from halfbyte.quant import quantize


@pytest.mark.parametrize("quant_type", ["int4", "int4-asym"])
def test_formats_of_several_widths(make_llama: Callable[..., Path], tmp_path: Path, quant_type: str) -> None:
    model = make_llama()
    run = load_config(model__path=str(model), quant__bits=5.0, quant__quant_type=quant_type, quant__scale="absmax")
    made = quantize_model(str(model), tmp_path / "mix", run.quant)
    report = weight_report(run, tmp_path / "mix")
    assert {layer.name: layer.quant_type for layer in report.layers} == made.formats
    assert report.values == pytest.approx([value / 7 for value in range(-8, 8)])
    assert sum(report.use) == pytest.approx(1)
    assert all(layer.error < (1e-4 if layer.quant_type == "int8" else 0.03) for layer in report.layers)
    assert all(layer.clipped < 1e-3 for layer in report.layers)


@pytest.mark.parametrize(("scale", "double_quant"), [("absmax", False), ("mse-signed", True)])
def test_figures_are_those_of_the_tensors(
    make_llama: Callable[..., Path], tmp_path: Path, scale: str, double_quant: bool
) -> None:
    model = make_llama()
    run = load_config(model__path=str(model), quant__scale=scale, quant__double_quant=double_quant)
    quantize_model(str(model), tmp_path / "four", run.quant)
    report = weight_report(run, tmp_path / "four")
    originals = load_file(model / "model.safetensors")
    assert {layer.name for layer in report.layers} == {
        name.removesuffix(".weight") for name in originals if "_proj" in name
    }
    for layer in report.layers:
        original = originals[f"{layer.name}.weight"].float()
        decoded = quantize(original, double_quant=double_quant, scale=scale).dequantize(torch.float32)
        squares = (original - decoded).square()
        assert layer.error == pytest.approx(float(squares.sum() / original.square().sum()), rel=1e-4)
        blocks = squares.view(-1, 64).sum(1) / original.view(-1, 64).square().sum(1)
        assert layer.worst_block == pytest.approx(float(blocks.max()), rel=1e-4)
    assert report.error == pytest.approx(sum(layer.error for layer in report.layers) / len(report.layers), rel=0.2)
    assert sum(report.use) == pytest.approx(1.0)
    assert len(report.histogram) == BINS
    if scale == "absmax":  # nothing lies beyond the largest magnitude
        assert all(layer.clipped == layer.negative == 0 for layer in report.layers)
    else:
        assert all(layer.clipped > 0 and 0.2 < layer.negative < 0.8 for layer in report.layers)


def test_a_base_of_mixed_bits_is_evaluated(
    make_llama: Callable[..., Path], eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the 16-bit model, which quant.bits is not for: its refusal once stood in the page in place of figures."""
    command = ["quantize", "--model", str(make_llama()), "--output", str(tmp_path / "four"), "--set", "quant.bits=4.5"]
    command += ["--report", str(tmp_path / "report.html"), "--eval-data", str(eval_file), "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["report"]
    assert said["perplexity"] != said["perplexity_16bit"] > 1
    assert not said["note"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_command_writes_page_and_json(
    kind: str, make_llama: Callable[..., Path], eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    command = ["quantize", "--model", str(make_llama()), "--output", str(tmp_path / "four"), "--report", str(page)]
    assert main([*command, "--quant-type", kind, "--eval-data", str(eval_file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["report"]
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["perplexity"] == said["perplexity"] > 1
    assert found["perplexity"] != found["perplexity_16bit"] > 1
    text = page.read_text()
    assert text.count("<svg") == 2
    assert f"<b>{found['perplexity']:.3f}</b> in {kind.upper()} (" in text
    assert "4 bits" not in text
    assert text.count("self_attn.q_proj") >= 2
    assert "<script" not in text


def test_models_that_do_not_belong_together(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    run = load_config(model__path=str(make_llama()))
    with pytest.raises(ModelError, match="has no quantized weight"):
        weight_report(run, make_llama())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-data", "x.jsonl"], "--eval-data: needs --report"),
        (["--report", "page.json"], "is not a .html file"),
        (["--report", "no/page.html"], "there is no folder"),
        (["--report", "page.html", "--eval-data", "no.jsonl"], "there is no file no.jsonl"),
    ],
)  # fmt: skip
def test_a_report_that_could_not_be_written_is_refused_first(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--model", "not-read", "--output", str(tmp_path / "four"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "four").exists()
