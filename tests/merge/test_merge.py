"""Merging into 16 bits: the result is base + adapter, whoever loads it, and what cannot be right is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte as hb
from halfbyte.checkpoint import load_adapter
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig
from halfbyte.errors import AdapterError, ConfigError, NumericsError
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved

MakeLlama = Callable[..., Path]
MakeAdapter = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def run(model: Path, data: Path | str = "") -> hb.RunConfig:
    return hb.load_config(model__path=str(model), data__eval=str(data))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_adapter: Path, eval_file: Path) -> Path:
    output = tmp_path_factory.mktemp("merged") / "model"
    hb.merge(run(tiny_llama, eval_file), tiny_adapter, output)
    return output


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = (torch.arange(40) * 7 % 300).view(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits.float()
    return result


def test_every_weight_is_the_decoded_one_plus_the_update_rounded_once(
    merged: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    adapter = load_adapter(tiny_adapter)
    base = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model
    files = SafetensorsFolder(merged)
    for name, tensor in SafetensorsFolder(tiny_llama).tensors.items():
        got, module = files.read(name), base.get_submodule(name.rpartition(".")[0])
        assert got.dtype == tensor.dtype
        if not isinstance(module, hb.Linear4bit):
            assert torch.equal(got, SafetensorsFolder(tiny_llama).read(name)), name
            continue
        a, b = (adapter.state[f"base_model.model.{name[:-7]}.lora_{x}.weight"].double() for x in "AB")
        wanted = module.quantized_weight.dequantize(torch.float32).double() + 2.0 * b @ a
        # half a unit of bfloat16's last place, and what float32 adds differently
        assert ((got.double() - wanted).abs() <= wanted.abs() * 2**-8 * 1.001 + 1e-7).all(), name


def test_transformers_alone_loads_it_and_says_what_base_and_adapter_say(
    merged: Path, tiny_llama: Path, tiny_adapter: Path
) -> None:
    """Measured: 0.030 where logits reach 7, which is bfloat16 weights; the adapter itself changes them by 4.6."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    base = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model
    plain = logits_of(base)
    trained = logits_of(attach_saved(base, load_adapter(tiny_adapter)))
    assert (logits_of(model) - trained).abs().max() < 0.08
    assert (plain - trained).abs().max() > 1
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (
        AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    )


def test_it_says_what_was_merged_on_what(merged: Path, tiny_llama: Path, tiny_adapter: Path) -> None:
    info = load_adapter(tiny_adapter).info
    said = json.loads((merged / "halfbyte.json").read_text())["merged"]
    assert said["base_sha256"] == info["base_sha256"]
    assert said == json.loads((merged / "config.json").read_text())["halfbyte_merged"]
    card = (merged / "README.md").read_text()
    for text in (said["adapters"][0]["adapter_sha256"], said["base_sha256"], str(tiny_llama), "KL"):
        assert text in card


def test_a_base_that_is_stored_in_4_bits_gives_the_same_folder(
    merged: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    hb.quantize_model(str(tiny_llama), tmp_path / "base4", QuantConfig())
    hb.merge(run(tmp_path / "base4"), tiny_adapter, tmp_path / "out")
    ours, theirs = SafetensorsFolder(tmp_path / "out"), SafetensorsFolder(merged)
    assert set(ours.names()) == set(theirs.names())
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())


def test_the_command_line(
    tiny_llama: Path, tiny_adapter: Path, eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_llama), "--adapter", str(tiny_adapter), "--data", str(eval_file), "--json"]
    assert main(["merge", *options, "--output", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"drift", "base", "peak_memory"} <= set(result)
    assert {"max_logit", "kl", "greedy_agreement"} <= set(result["drift"])
    assert result["base"] == "quantized"
    assert main(["merge", *options, "--output", str(tmp_path / "no"), "--max-drift", "0"]) == 5
    assert "raise --max-drift" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main(["merge", *options]) == 2


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_not(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["merge", "--model", str(tiny_llama), "--adapter", str(tiny_adapter), "--output", str(tmp_path / "out")]
    assert main([*options, "--memory", "50MB"]) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"memory\.budget: .* are not enough for this merge: .* Give --memory (\d+)MB\.$", line)
    assert found is not None, line
    assert not (tmp_path / "out").exists()
    assert main([*options, "--memory", f"{int(found[1]) + 50}MB"]) == 0  # what is resident grows a little


def test_a_merged_model_is_no_base(
    merged: Path, tiny_adapter: Path, make_adapter: MakeAdapter, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="is merged into this model already"):
        hb.merge(run(merged), tiny_adapter, tmp_path / "out")
    other = make_adapter(tiny_llama, seed=1, record=False)
    with pytest.raises(AdapterError, match=r"with .* merged into it"):
        hb.merge(run(merged), other, tmp_path / "out")
    hb.merge(run(merged), make_adapter(merged, seed=2), tmp_path / "trained-on-it")


def test_an_adapter_for_another_base_is_refused(make_llama: MakeLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    other = make_llama(rms_norm_eps=1e-4, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=r"was trained on .* base_sha256"):
        hb.merge(run(other), tiny_adapter, tmp_path / "out")
    with pytest.raises(AdapterError, match=r"22 tensors do not fit this model.*has shape"):
        hb.merge(run(make_llama(hidden_size=128)), tiny_adapter, tmp_path / "out")
    with pytest.raises(AdapterError, match="14 tensors do not fit this model"):
        hb.merge(run(make_llama(num_hidden_layers=1)), tiny_adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: object) -> Path:
    """A copy of `adapter` with its tensors and config changed, as plain PEFT would have left it."""
    shutil.copytree(adapter, folder)
    (folder / "manifest.json").unlink()
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda s: s.pop(Q_PROJ.format("A")), {}, "has lora_B alone"),
        (lambda s: [s.pop(Q_PROJ.format(x)) for x in "AB"], {}, "is missing"),
        (lambda s: s[Q_PROJ.format("A")].fill_(torch.nan), {}, "is not finite"),
        (lambda s: s.update({Q_PROJ.format("A"): torch.zeros(4, 63)}), {}, r"has shape \(4, 63\)"),
        (lambda s: None, {"r": 8}, "has rank 4 in lora_A"),
        (lambda s: None, {"use_dora": True}, "has no magnitude, use_dora is true"),
        (lambda s: None, {"modules_to_save": ["lm_head"]}, "lm_head of modules_to_save is not there"),
        (lambda s: None, {"bias": "all"}, "bias 'all' is not supported"),
        (
            lambda s: [s.update({k.replace("layers", "blocks"): s.pop(k)}) for k in list(s)],
            {},
            "56 tensors do not fit",
        ),
        (lambda s: None, {"target_modules": ["nothing"]}, "does not fit this model"),
    ],
)
def test_an_adapter_that_cannot_be_right_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    config: dict[str, object],
    said: str,
    tiny_llama: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = broken(tiny_adapter, tmp_path / "adapter", change, **config)
    with pytest.raises(AdapterError, match=said):
        hb.merge(run(tiny_llama), folder, tmp_path / "out")
    assert (
        main(["merge", "--model", str(tiny_llama), "--adapter", str(folder), "--output", str(tmp_path / "out")]) == 3
    )
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_output_is_a_new_place(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for output, said in (
        (tmp_path / "full", "is there already"),
        (tiny_llama / "out", "overlaps"),
        (tiny_adapter / "out", "overlaps"),
        (tiny_llama.parent, "is there already"),
    ):
        with pytest.raises(ConfigError, match=said):
            hb.merge(run(tiny_llama), tiny_adapter, output)


def test_what_does_not_fit_the_dtype_is_an_error(
    make_llama: MakeLlama, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    half = make_llama(dtype=torch.float16)
    adapter = make_adapter(half, size=1e6)
    with pytest.raises(NumericsError, match=r"q_proj.weight: \d+ values do not fit float16"):
        hb.merge(run(half), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rank_patterns_and_rslora_scale_as_peft_says(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, use_rslora=True)
    folder = broken(adapter, tmp_path / "adapter", lambda s: None, alpha_pattern={"q_proj": 32})
    hb.merge(run(tiny_llama), folder, tmp_path / "out")
    base = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model
    trained = logits_of(attach_saved(base, load_adapter(folder)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits_of(model) - trained).abs().max() < 0.2


def test_auto_takes_the_base_that_was_trained_on_and_says_both_figures(
    tiny_llama: Path, tiny_adapter: Path, eval_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    result = hb.merge(run(tiny_llama, eval_file), tiny_adapter, tmp_path / "out", base="auto", say=said.append)
    assert result.base == "quantized"
    assert result.candidates["quantized"].kl < result.candidates["original"].kl
    assert result.candidates["quantized"] == result.drift
    assert sum("onto the" in line for line in said) == 2


def test_onto_the_original_weights(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    hb.quantize_model(str(tiny_llama), tmp_path / "base4", QuantConfig())
    with pytest.raises(hb.HalfbyteError, match="holds quantized weights"):
        hb.merge(run(tmp_path / "base4"), tiny_adapter, tmp_path / "out", base="original")
    given = {"base": "original", "original": str(tiny_llama), "max_drift": 5.0}
    result = hb.merge(run(tmp_path / "base4"), tiny_adapter, tmp_path / "out", **given)
    assert result.base == "original"
    assert "16-bit weights that the quantized base was made of" in (tmp_path / "out" / "README.md").read_text()
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (load_adapter(tiny_adapter).state[f"base_model.model.{name[:-7]}.lora_{x}.weight"] for x in "AB")
    wanted = (SafetensorsFolder(tiny_llama).read(name).float() + 2 * b @ a).bfloat16()
    assert (SafetensorsFolder(tmp_path / "out").read(name) != wanted).float().mean() < 1e-3  # ties of the rounding


def test_an_original_of_another_model_is_refused(
    make_llama: MakeLlama, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    hb.quantize_model(str(tiny_llama), tmp_path / "base4", QuantConfig())
    other = make_llama(initializer_range=0.05)
    with pytest.raises(hb.HalfbyteError, match=r"is not what .* was quantized from"):
        hb.merge(run(tmp_path / "base4"), tiny_adapter, tmp_path / "out", base="original", original=str(other))
