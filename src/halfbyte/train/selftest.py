"""What halfbyte claims of itself, tried on this machine: the same run done two ways, compared bit for bit."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import halfbyte.kernels  # noqa: F401  (registers the fast implementations of the operators)
from halfbyte.checkpoint.shards import SINGLE_NAME, SafetensorsFolder
from halfbyte.config import QuantConfig, RunConfig, load_config
from halfbyte.config.formats import QUANT_TYPES
from halfbyte.data import load_data, make_batch
from halfbyte.model.adapt import attach_lora
from halfbyte.model.load import load_model
from halfbyte.model.quantize import quantize_model
from halfbyte.model.source import load_tokenizer
from halfbyte.quant import quantize
from halfbyte.quant.reference import dequantize_reference
from halfbyte.train.loop import train
from halfbyte.train.objective import Objective

STEPS = 4
RUN: dict[str, Any] = {
    "train__steps": STEPS, "train__gradient_accumulation_steps": 2, "train__resume": "never", "lora__r": 8,
    "optim__lr": 1e-2, "data__max_seq_len": 96, "data__format": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One claim: two things that are said to be the same, and whether they are, to the bit."""

    name: str
    passed: bool
    detail: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def selftest() -> Iterator[Check]:
    """Each check as it is done; a small model of random weights, made on the spot and removed again."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-selftest-") as folder:
        lab = _Laboratory(Path(folder))
        for name, check in lab.checks.items():
            started = time.perf_counter()
            found = check()
            yield Check(name, not found, found or "the same bits", time.perf_counter() - started)


class _Laboratory:
    """A tiny model in 4 bits, some text, and runs on them; every check says what differs, or nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model, self._data = folder / "model", folder / "text.jsonl"
        _write_model(folder / "plain", self._model)
        words = [f"{number} and {number * number} and {number % 7}, then" for number in range(1, 90)]
        texts = [" ".join(words[start : start + 2 + start % 9]) for start in range(48)]
        self._data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self._expected: tuple[list[float], dict[str, torch.Tensor]] | None = None

    @property
    def checks(self) -> dict[str, Callable[[], str]]:
        """By what they claim."""
        return {
            "decode == reference": self._decodes,
            "packed == unpacked": self._packs,
            "checkpointed == stored": lambda: self._runs(train__gradient_checkpointing=True),
            "streamed == resident": lambda: self._runs(memory__weights="stream"),
            "mapped == resident": lambda: self._runs(memory__weights="mmap"),
            "paged == unpaged": lambda: self._runs(optim__paged=True, memory__optimizer_budget="8192"),
            "offloaded == kept": lambda: self._runs(memory__activations="disk"),
            "resumed == uninterrupted": self._resumes,
        }

    def _decodes(self) -> str:
        generator = torch.Generator().manual_seed(0)
        for quant_type in QUANT_TYPES:
            for shape in ((7, 33), (64, 1024)):
                weight = quantize(torch.randn(shape, generator=generator), quant_type=quant_type)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    expected = dequantize_reference(*weight.op_args, shape, dtype)
                    if not torch.equal(weight.dequantize(dtype), expected):
                        return f"{quant_type} {shape} decodes otherwise in {dtype}"
        return ""

    def _packs(self) -> str:
        """Every sample's loss alone, and in one row with all others before it."""
        loaded = load_model(str(self._model), QuantConfig(), compute_dtype=torch.float32)
        attach_lora(loaded.model, load_config(**RUN).lora, seed=0)
        data = load_data(self._data, load_tokenizer(str(self._model)), load_config(**RUN).data)
        objective = Objective(loaded.model.eval())
        with objective.ready(), torch.no_grad():
            samples = [make_batch(data, [index]) for index in range(8)]
            together = objective.loss_sums(samples)
            alone = [objective.loss_sum(sample) for sample in samples]
        differing = sum(not torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        return f"{differing} of {len(samples)} losses differ" if differing else ""

    def _runs(self, name: str = "other", **changes: Any) -> str:
        """A run with `changes` beside the one without."""
        if self._expected is None:
            self._expected = self._outcome("resident")
        losses, adapter = self._outcome(name, **changes)
        if losses != self._expected[0]:
            return f"losses {losses}, not {self._expected[0]}"
        differing = [name for name, tensor in self._expected[1].items() if not torch.equal(adapter[name], tensor)]
        return f"{len(differing)} of {len(adapter)} adapter tensors differ" if differing else ""

    def _resumes(self) -> str:
        """Stopped half way, and gone on from the checkpoint."""
        self._outcome("resumed", train__steps=STEPS // 2, train__save_every=STEPS // 2)
        return self._runs("resumed", train__resume="auto")

    def _outcome(self, name: str, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        """Losses and adapter of a run."""
        output = self._folder / name
        paths = {"model__path": str(self._model), "data__train": str(self._data), "train__output": str(output)}
        config: RunConfig = load_config(**RUN | paths | changes)
        result = train(config)
        events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        adapter = SafetensorsFolder(result.adapter)
        return [event["loss"] for event in events], {name: adapter.read(name) for name in adapter.names()}


def _write_model(plain: Path, folder: Path) -> None:
    """A Llama of four layers in 4 bits, with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={text: number for number, text in enumerate(["<eos>", *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(alphabet) + 1, initializer_range=0.1, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=0, pad_token_id=0,
        ))  # fmt: skip
    plain.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, plain / SINGLE_NAME)
    model.config.save_pretrained(plain)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(plain)
    quantize_model(str(plain), folder, QuantConfig())
