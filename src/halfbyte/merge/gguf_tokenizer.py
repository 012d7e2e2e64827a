"""A tokenizer as llama.cpp's metadata: tokens, kinds, merges, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.errors import ModelError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
_SPLITS = {_ENGLISH % "" + r"\s+(?!\S)|\s+": "qwen2", _ENGLISH % "{1,3}" + r"\s+(?!\S)|\s+": "llama-bpe"}
"""How text is cut before merging, and llama.cpp's name for it; compared letter by letter."""


def tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: str
) -> Iterator[tuple[str, Any]]:
    """Key and value of every field ``tokenizer.*``, without types: text, whole number, truth value, or list of them.

    Raises:
        ModelError: not a byte-level BPE tokenizer, or one that cuts text in a way llama.cpp has no name for.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE" or parts["model"].get("byte_fallback"):
        raise ModelError(
            f"has a {parts['model']['type']} tokenizer", where=where, why="byte-level BPE is written to GGUF",
            fix="Convert the 16-bit folder with llama.cpp's own script",
        )  # fmt: skip
    added = {entry["id"]: entry for entry in parts["added_tokens"]}
    by_id = {number: text for text, number in parts["model"]["vocab"].items()}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        special = added[number]["special"] if number in added else False
        kinds.append(
            UNUSED if number not in by_id else CONTROL if special else USER_DEFINED if number in added else NORMAL
        )
    yield "tokenizer.ggml.model", "gpt2"
    yield "tokenizer.ggml.pre", _pre(parts, where)
    yield "tokenizer.ggml.tokens", tokens
    yield "tokenizer.ggml.token_type", kinds
    yield "tokenizer.ggml.merges", [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    yield "tokenizer.ggml.add_space_prefix", False
    started = tokenizer("a").input_ids
    yield "tokenizer.ggml.add_bos_token", bool(started) and started[0] == tokenizer.bos_token_id
    for key, number in (
        ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):  # fmt: skip
        if number is not None:
            yield f"tokenizer.ggml.{key}_token_id", int(number)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    other = [number for number in ends if number is not None and number != tokenizer.eos_token_id]
    if other:  # a chat model whose turns end in another token than its texts
        yield "tokenizer.ggml.eot_token_id", int(other[0])
    if tokenizer.chat_template:
        yield "tokenizer.chat_template", tokenizer.chat_template


def _pre(parts: dict[str, Any], where: str) -> str:
    """llama.cpp's name for how `parts`, a tokenizer.json, cuts text."""
    first = parts["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    plain = not steps[-1].get("add_prefix_space") and parts["model"].get("dropout") is None
    if plain and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            name = _SPLITS.get(str(steps[0]["pattern"].get("Regex")))
            if name is not None:
                return name
    raise ModelError(
        "has a tokenizer that GGUF is not written for", where=where,
        why=f"it cuts text by {', '.join(map(str, kinds))}; known are those of GPT-2, SmolLM, Llama 3 and Qwen2",
        fix="Convert the 16-bit folder with llama.cpp's own script",
    )  # fmt: skip
