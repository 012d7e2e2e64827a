"""How far predictions move with a part of a model quantized alone: as a whole model of it says, and what follows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import halfbyte as hb
from halfbyte.calibrate import calibrate_model
from halfbyte.calibrate.sensitivity import divergences
from halfbyte.cli.main import main
from halfbyte.errors import ResourceError
from halfbyte.model.lent import LentModel
from halfbyte.model.source import open_source
from halfbyte.quant.mix import Unit, unit_of

MakeLlama = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def linears(model: torch.nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    kinds = ("Linear", "Conv1D")
    return [name for name, part in model.named_modules() if type(part).__name__ in kinds and part is not head]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Other names, weights stored as (in, out), learned positions, a tied head."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=256, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_as_a_whole_model_with_one_part_changed(family: str, make_llama: MakeLlama, gpt2: Path) -> None:
    """The divergence of each part, to a thousandth."""
    folder = gpt2 if family == "gpt2" else make_llama(num_hidden_layers=3)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (length,), generator=generator) for length in (40, 17, 33)]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, counts = pad(rows, batch_first=True), pad([torch.ones(len(row)).bool() for row in rows], batch_first=True)
    together = dict[str, list[str]]()
    for name in linears(whole):
        together.setdefault(unit_of(name), []).append(name)
    units = [Unit(tuple(names), (), ()) for names in together.values()]
    source = open_source(str(folder))
    stored = source.open_tensors()
    prefix = "transformer." if family == "gpt2" else ""

    def read(name: str) -> Tensor:
        return stored.read(name if name in stored.names() else name.removeprefix(prefix))

    def coarse(name: str) -> Tensor:
        return read(name).float().mul(8).round().div(8)

    found = divergences(LentModel(source), ids, counts, read, units, coarse)
    assert found.keys() == set(range(len(units)))
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits[counts].log_softmax(1)
        for number, unit in enumerate(units):
            before = {name: whole.get_parameter(f"{name}.weight").clone() for name in unit.layers}
            for name in unit.layers:
                whole.get_parameter(f"{name}.weight").copy_(coarse(f"{name}.weight"))
            moved = whole(input_ids=ids).logits[counts].log_softmax(1)
            expected = float((wanted.exp() * (wanted - moved)).sum(1).mean())
            assert found[number] == pytest.approx(expected, rel=1e-3)
            assert expected > 1e-5
            for name, value in before.items():
                whole.get_parameter(f"{name}.weight").copy_(value)


@pytest.fixture(scope="module")
def lopsided(make_llama: MakeLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last layer adds next to nothing: its weights have the same relative errors all the same."""
    plain, folder = make_llama(num_hidden_layers=2, intermediate_size=128), tmp_path_factory.mktemp("lopsided")
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.1.{name}.weight").mul_(2**-7)
    model.save_pretrained(folder)
    for file in (file for file in plain.iterdir() if "token" in file.name or "template" in file.name):
        shutil.copy(file, folder)
    return folder


def test_what_predictions_depend_on_is_raised(
    lopsided: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", "--model", str(lopsided), "--set", "quant.bits=6.3", "--json"]
    page, raised = tmp_path / "report.html", []
    for name, more in (
        ("weights", []),
        ("measured", ["--set", f"quant.calibrate={chat_file}", "--report", str(page)]),
    ):
        assert main([*arguments, "--output", str(tmp_path / name), *more]) == 0
        captured = capsys.readouterr()
        made = json.loads(captured.out.splitlines()[-1])
        assert 5.7 < made["bits_per_weight"] <= 6.3
        raised.append({layer for layer, kind in made["formats"].items() if kind == "int8"})
    first = {layer for layer in made["formats"] if ".layers.0." in layer}
    assert len(first) == 7
    assert [first <= layers for layers in raised] == [False, True]
    parts = made["sensitivities"]
    assert parts == json.loads((tmp_path / "measured/halfbyte.json").read_text())["sensitivities"]
    assert parts.keys() == {unit_of(layer) for layer in made["formats"]}
    assert len(parts) == 8
    shown = json.loads(page.with_suffix(".json").read_text())["layers"]
    assert {layer["name"]: layer["sensitivity"] for layer in shown} == {n: parts[unit_of(n)] for n in made["formats"]}
    assert "KL alone in nf4" in page.read_text()
    most = max(parts, key=lambda name: float(parts[name]))
    said = re.sub(r"\s+", " ", captured.err)
    assert re.search(rf"bits: measured on \d+ tokens of .*each of 8 parts.*KL by token: {re.escape(most)}", said)


def test_parts_that_no_text_passes_go_by_the_weights(
    make_mixture: Callable[[str], Path], chat_file: Path, tmp_path: Path
) -> None:
    model, said = str(make_mixture("mixtral")), list[str]()
    made = calibrate_model(
        hb.load_config(model__path=model, quant__bits=5.0, quant__calibrate=str(chat_file)), tmp_path / "model",
        say=said.append,
    )  # fmt: skip
    assert not made.sensitivities
    assert any("bits: by the error of the weights" in line and "experts" in line for line in said)
    assert {"nf4", "int8"} == {*made.formats.values()}


def test_too_little_memory_is_refused(lopsided: Path, chat_file: Path, tmp_path: Path) -> None:
    small = {"quant__bits": 5.0, "quant__calibrate": str(chat_file), "memory__budget": "1MB"}
    with pytest.raises(ResourceError, match=r"are not enough.*128 tokens of text take.*Give --memory \d+MB"):
        calibrate_model(hb.load_config(model__path=str(lopsided), **small), tmp_path / "model")
