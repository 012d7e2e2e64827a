"""New tokens' rows are trained as PEFT trains them, wherever tables live; and what comes of it is used everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte as hb
from halfbyte.checkpoint import load_adapter
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig, RunConfig
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved
from halfbyte.model.trained_rows import tokens_of
from halfbyte.plan import check_run, plan
from halfbyte.train import train

MakeRun = Callable[..., RunConfig]
MakeLlama = Callable[..., Path]
TOOL, CALL = "<|tool|>", "<|call|>"
TOKENS: dict[str, Any] = {"lora__trainable_tokens": [TOOL, "<|im_end|>", CALL], "train__steps": 3}
WHOLE = {"lora__modules_to_save": ["embed_tokens", "lm_head"]}
ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def make(make_run: MakeRun, tool_file: Path) -> MakeRun:
    return lambda name="run", **settings: make_run(name, **{"data__train": str(tool_file)} | TOKENS | settings)


def losses(config: RunConfig) -> list[float]:
    train(config)
    lines = map(json.loads, (Path(config.train.output) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def adapter_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.train.output) / "adapter" / "adapter_model.safetensors")


def decoded(path: Path, tokens: int = 322) -> Any:
    """The 4-bit base in float32, by transformers, resized as the tokenizer asks for."""
    base = load_model(str(path), QuantConfig(), compute_dtype=torch.float32)
    weights = {f"{n}.weight": m.dequantize(torch.float32) for n, m in base.model.named_modules()
               if isinstance(m, hb.Linear4bit)}  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs.load_state_dict(weights, strict=False)
    theirs.resize_token_embeddings(tokens)
    return theirs


@pytest.mark.parametrize("settings", [{}, WHOLE, {"quant__embeddings": "int8"}])
@pytest.mark.parametrize("tied", [False, True])
def test_resumed_equals_uninterrupted(
    tied: bool, settings: dict[str, Any], make: MakeRun, make_llama: MakeLlama, tmp_path: Path
) -> None:
    settings = settings | {"model__path": str(make_llama(tie_word_embeddings=tied)), "train__save_every": 1}
    expected = losses(make("whole", **settings))
    parts = losses(make("parts", **settings | {"train__steps": 2})) + losses(make("parts", **settings))[2:]
    assert parts == expected
    one, other = (adapter_of(make(name)) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_whole_tables_as_peft_has_them(make: MakeRun, make_llama: MakeLlama) -> None:
    for tied in (False, True):
        path = make_llama(tie_word_embeddings=tied)
        config = make(f"run-{tied}", model__path=str(path), **WHOLE)
        folder = Path(train(config).adapter)
        theirs = peft.PeftModel.from_pretrained(decoded(path), folder)
        base = load_model(
            str(path), QuantConfig(), compute_dtype=torch.float32, tokens=tokens_of(load_adapter(folder))
        )
        ids = torch.tensor([[5, 320, 9, 2, 321, 7, 320]])
        with torch.no_grad():
            wanted = theirs(input_ids=ids).logits
            ours = attach_saved(base.model, load_adapter(folder))(input_ids=ids).logits
        assert ours.shape[-1] == 322
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
        planned, size = plan(config).disk["adapter"], (folder / "adapter_model.safetensors").stat().st_size
        assert planned <= size < planned + 8000, "all but names; a tied table stands there twice"


@pytest.mark.parametrize("settings", [{}, WHOLE])
@pytest.mark.parametrize("tied", [False, True])
def test_the_other_commands(
    tied: bool, settings: dict[str, Any], make: MakeRun, make_llama: MakeLlama, tool_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Held-out loss is the one that training measured, merged or not; merged models know the tokens."""
    path = make_llama(tie_word_embeddings=tied)
    result = train(make(model__path=str(path), data__eval=str(tool_file), **settings))
    base, adapter = ["--model", str(path)], ["--adapter", result.adapter]
    compute = ["--set", "quant.compute_dtype=float32"]
    assert main(["eval", *base, *adapter, "--data", str(tool_file), "--json", *compute]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(result.eval_loss, abs=1e-6)
    assert main(["generate", *base, *adapter, "--prompt", "Hi", "--max-new-tokens", "4", "--json"]) == 0
    assert "TrainedHead" in json.loads(capsys.readouterr().out.splitlines()[-1])["engine"]
    assert main(["serve", *base, "--adapter", f"one={result.adapter}", "--port", "0"]) == 3
    assert "has trained rows of embedding or head, which are not served" in capsys.readouterr().err
    config = hb.load_config(model__path=str(path), data__eval=str(tool_file), data__train=str(tool_file))
    merged = hb.merge(config, result.adapter, tmp_path / "16bit")
    assert merged.drift.kl < 1e-4
    assert set(merged.rows.values()) == {322 if settings == WHOLE else 3}
    assert len(merged.rows) == (1 if tied else 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "16bit").convert_tokens_to_ids(CALL) == 321
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "16bit", dtype=torch.float32)
    assert there.get_input_embeddings().weight.shape[0] == 322
    fine = ["--set", "quant.quant_type=int8", *compute]
    assert main(["eval", "--model", str(tmp_path / "16bit"), "--data", str(tool_file), "--json", *fine]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["loss"] == pytest.approx(result.eval_loss, abs=0.02)
    for form, options in (("4bit", {}), ("gguf", {"gguf_type": "F16"})):
        made = hb.merge(config, result.adapter, tmp_path / form, format=form, max_drift=1.0, **options)
        assert made.drift.kl < (0.1 if form == "4bit" else 1e-4)
    with pytest.raises(AdapterError, match="has trained rows of"):
        hb.merge(config, result.adapter, tmp_path / "lora", format="gguf-lora")


@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_it_and_says_the_same(tied: bool, make: MakeRun, make_llama: MakeLlama) -> None:
    path = make_llama(tie_word_embeddings=tied)
    config = make(model__path=str(path))
    folder = Path(train(config).adapter)
    state = adapter_of(config)
    assert sorted(name for name in state if "lora" not in name) == [
        ROWS.format(name) for name in (["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"])
    ]
    ids = torch.tensor([[5, 320, 9, 2, 321, 7, 320]])
    base = load_model(str(path), QuantConfig(), compute_dtype=torch.float32, tokens=tokens_of(load_adapter(folder)))
    theirs = decoded(path)
    with torch.no_grad():
        plain = theirs(input_ids=ids).logits
        wanted = peft.PeftModel.from_pretrained(theirs, folder)(input_ids=ids).logits
        ours = attach_saved(base.model, load_adapter(folder))(input_ids=ids).logits
    assert float((wanted - plain).norm() / plain.norm()) > 1e-2
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids([TOOL, CALL]) == [320, 321]


def test_what_is_not_possible(make: MakeRun, make_llama: MakeLlama) -> None:
    tied = make_llama(tie_word_embeddings=True)
    for settings, message in (
        ({"lora__modules_to_save": ["norm"]}, "'norm' cannot be trained whole"),
        ({"model__path": str(tied), "lora__modules_to_save": ["lm_head"]}, "lm_head alone cannot be trained whole"),
    ):
        for refusing in (check_run, train):  # before torch is loaded, too
            with pytest.raises(ConfigError, match=message):
                refusing(make(**settings))


def test_rows_that_are_merely_claimed(make: MakeRun, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is allocated for a token far beyond the vocabulary."""
    folder = Path(train(make()).adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    for ids in config["trainable_token_indices"].values():
        ids[0] = 10**12
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    run = ["--model", str(tiny_llama), "--adapter", str(folder), "--prompt", "Hi"]
    assert main(["generate", *run]) == 2
    assert "2 new tokens go up to 1000000000000: the model has 320 rows" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="2 new tokens go up to"):
        hb.merge(hb.load_config(model__path=str(tiny_llama)), folder, folder.parent / "merged")
