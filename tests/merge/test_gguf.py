"""GGUF: what is written is base + adapter for us and for llama.cpp, with tokenizer and template."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte as hb
from halfbyte.checkpoint import load_adapter
from halfbyte.config import QuantConfig
from halfbyte.errors import AdapterError, ConfigError, ModelError
from halfbyte.merge.gguf_tokenizer import tokenizer_fields
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved
from halfbyte.model.source import open_source

MakeLlama = Callable[..., Path]
MakeAdapter = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def llama_cpp(model: Path, prompts: list[list[int]], tokens: int, lora: Path | None = None) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    if find_spec("xllamacpp") is None:
        pytest.skip("the package xllamacpp is not installed")
    job = {"model": str(model), "prompts": prompts, "tokens": tokens, "context": 256, "lora": lora and str(lora)}
    script = Path(__file__).with_name("llama_cpp.py")
    done = subprocess.run([sys.executable, script], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def greedy(model: Any, prompt: list[int], tokens: int, gap: float = 0.01) -> list[int]:
    """The same by halfbyte; ends where two tokens are so close that rounding may decide."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < gap:
            break
        ids.append(int(best.indices[0]))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt) :]


def run(model: Path) -> hb.RunConfig:
    return hb.load_config(model__path=str(model))


SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "eos_token_id": 2,
    "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
CASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-head": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, head_dim=32, attention_bias=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True)),
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any,
    make_adapter: MakeAdapter,
) -> tuple[Path, Path]:  # fmt: skip
    """A tiny model of each architecture, with random biases and norms, and an adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = CASES[request.param]().bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder, make_adapter(folder)


def test_the_numbers_are_base_and_adapter_in_16_bits(case: tuple[Path, Path], tmp_path: Path) -> None:
    """Measured: KL 3e-7 nats/token at most, of weights in F16 against float32."""
    model, adapter = case
    result = hb.merge(run(model), adapter, tmp_path / "out", format="gguf")
    assert result.drift.kl < 3e-6
    assert result.drift.greedy_agreement > 0.99
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name == "out-F16.gguf"
    config = open_source(str(file)).config
    theirs = AutoModelForCausalLM.from_pretrained(model).config
    for key in ("num_key_value_heads", "intermediate_size", "rms_norm_eps", "vocab_size"):
        assert getattr(config, key) == pytest.approx(getattr(theirs, key)), key


def test_llama_cpp_says_what_base_and_adapter_say(case: tuple[Path, Path], tmp_path: Path) -> None:
    """Log probabilities were measured at most 0.002 apart (F16 weights and activations against float32)."""
    model, adapter = case
    hb.merge(run(model), adapter, tmp_path / "out", format="gguf")
    base = load_model(str(model), QuantConfig(), compute_dtype=torch.float32).model
    trained = attach_saved(base, load_adapter(adapter))
    prompts = [[(start * 17 + i * 5) % 300 + 3 for i in range(6 + start)] for start in range(6)]
    answers = llama_cpp(tmp_path / "out" / "out-F16.gguf", prompts, 12)
    compared = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = greedy(trained, prompt, 12)
        assert answer[: len(wanted)] == wanted
        compared += len(wanted)
    assert compared > 20


def test_the_adapter_alone_over_its_base(case: tuple[Path, Path], tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """llama.cpp with --lora on a GGUF of the base, which is a merge of an adapter of zeros, equals the merged file."""
    model, adapter = case
    nothing = make_adapter(model, size=0.0)
    hb.merge(run(model), adapter, tmp_path / "merged", format="gguf")
    hb.merge(run(model), nothing, tmp_path / "base", format="gguf")
    hb.merge(run(model), adapter, tmp_path / "alone", format="gguf-lora")
    prompts = [[5, 6, 7, 8], [100, 50, 25]]
    base, lora = tmp_path / "base" / "base-F16.gguf", tmp_path / "alone" / "alone-lora.gguf"
    merged = llama_cpp(tmp_path / "merged" / "merged-F16.gguf", prompts, 6)
    assert llama_cpp(base, prompts, 6, lora) == merged
    assert llama_cpp(base, prompts, 6) != merged


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_every_type_is_written_and_read(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path, kind: str) -> None:
    result = hb.merge(run(tiny_llama), tiny_adapter, tmp_path / "out", format="gguf", gguf_type=kind, max_drift=5)
    assert result.drift.kl < {"B": 1e-3, "8": 1e-2}.get(kind[0 if kind[0] == "B" else 1], 0.5)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / f"out-{kind}.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == kind
    assert types["output.weight"] == ("BF16" if kind == "BF16" else "Q8_0")
    assert types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_codes_chosen_on_text_are_closer(
    tiny_llama: Path, tiny_adapter: Path, chat_file: Path, eval_file: Path, tmp_path: Path, kind: str
) -> None:
    """Measured: KL 0.09 to 0.12 of that of the nearest codes."""
    options: dict[str, Any] = {"format": "gguf", "gguf_type": kind, "max_drift": 5}
    nearest, chosen = (
        hb.merge(
            hb.load_config(model__path=str(tiny_llama), data__eval=str(eval_file), data__train=train),
            tiny_adapter, tmp_path / f"out{train[-4:]}", **options,
        )
        for train in ("", str(chat_file))
    )  # fmt: skip
    assert chosen.drift.kl < 0.3 * nearest.drift.kl
    assert len(chosen.survived) == 14
    assert not nearest.survived


def test_llama_cpp_reads_codes_chosen_on_text_as_we_do(
    tiny_llama: Path, tiny_adapter: Path, chat_file: Path, tmp_path: Path
) -> None:
    config = hb.load_config(model__path=str(tiny_llama), data__train=str(chat_file))
    hb.merge(config, tiny_adapter, tmp_path / "out", format="gguf", gguf_type="Q5_1", max_drift=5)
    file = tmp_path / "out" / "out-Q5_1.gguf"
    ours = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    prompts = [[(start * 17 + i * 5) % 300 + 3 for i in range(6 + start)] for start in range(8)]
    answers = llama_cpp(file, prompts, 8)
    wanted = [greedy(ours, prompt, 8, gap=0.05) for prompt in prompts]  # llama.cpp rounds activations to 8 bits
    assert [answer[: len(want)] for answer, want in zip(answers, wanted, strict=True)] == wanted
    assert sum(map(len, wanted)) > 10


def test_tokenizer_and_template_are_the_models(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    hb.merge(run(tiny_llama), tiny_adapter, tmp_path / "out", format="gguf")
    ours = hb.load_tokenizer(str(tmp_path / "out" / "out-F16.gguf"))
    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token_id == theirs.eos_token_id
    for text in ("What follows 3?", "a  b\n\tc é 🦙 12345", "<|im_start|>user\nx<|im_end|>"):
        assert ours(text).input_ids == theirs(text).input_ids


def test_a_gguf_file_merged_once_is_no_base(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    hb.merge(run(tiny_llama), tiny_adapter, tmp_path / "out", format="gguf")
    with pytest.raises(AdapterError, match="is merged into this model already"):
        hb.merge(run(tmp_path / "out" / "out-F16.gguf"), tiny_adapter, tmp_path / "again")


def test_what_is_not_proven_is_refused(make_llama: MakeLlama, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    scaled = make_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ModelError, match="cannot be written as GGUF: its rotary embedding is scaled by 'linear'"):
        hb.merge(run(scaled), make_adapter(scaled), tmp_path / "out", format="gguf")
    plain = make_llama()
    with pytest.raises(ConfigError, match="'Q4_K' is not a type"):
        hb.merge(run(plain), make_adapter(plain), tmp_path / "out", format="gguf", gguf_type="Q4_K")
    assert not (tmp_path / "out").exists()


def test_how_text_is_cut_has_llama_cpps_name_or_is_refused(tiny_llama: Path) -> None:
    tokenizer, config = hb.load_tokenizer(str(tiny_llama)), open_source(str(tiny_llama)).config
    english = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, cut in {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(english), "isolated"), byte_level]),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(english.replace("{1,3}", "")), "isolated"), byte_level]
        ),
    }.items():
        tokenizer.backend_tokenizer.pre_tokenizer = cut
        assert dict(tokenizer_fields(tokenizer, config, "x"))["tokenizer.ggml.pre"] == name
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="it cuts text by Whitespace"):
        dict(tokenizer_fields(tokenizer, config, "x"))
