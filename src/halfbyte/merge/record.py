"""What a merged model says of itself: halfbyte.json, a key in config.json, and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import versions
from halfbyte.config.target import check_new
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.merge.base import MergeBase
from halfbyte.merge.parts import Part

CONFIG_KEY = "halfbyte_merged"
"""In config.json, so that it stays with the model when files are copied one by one."""
GGUF_KEY = "halfbyte.merged"


def record(base: MergeBase, base_sha256: str, parts: Sequence[Part], *, form: str, onto: str) -> dict[str, Any]:
    """What was merged on what; plain JSON values.

    Args:
        form: what was written ("16bit bfloat16").
        onto: "quantized" or "original": which weights the update was added to.
    """
    return {
        "format": form,
        "onto": onto,
        "base": base.source.label,
        "base_sha256": base_sha256,
        "base_quant": base.recipe(),
        "adapters": [part.record() for part in parts],
        "tokenizer_sha256": parts[0].adapter.info.get("tokenizer_sha256"),
        "versions": versions(),
    }


def refuse_merged(base: MergeBase, base_sha256: str, part: Part) -> None:
    """See that nothing is merged twice: a merged model is a base only for an adapter that was trained on it.

    Raises:
        AdapterError: says what the model already is.
    """
    merged = _merged_record(base)
    if merged is None:
        return
    known = merged.get("adapters", [])
    if part.sha256 in [adapter["adapter_sha256"] for adapter in known]:
        raise AdapterError(
            "is merged into this model already", where=part.label, why=f"{base.source.label} says so",
            fix="Use the model as it is",
        )  # fmt: skip
    if part.adapter.info.get("base_sha256") != base_sha256:
        those = " and ".join(adapter["adapter"] for adapter in known)
        raise AdapterError(
            f"was not trained on {base.source.label}", where=part.label,
            why=f"that is {merged.get('base')} with {those} merged into it",
            fix="Merge onto the base that the adapter was trained on",
        )  # fmt: skip


def _merged_record(base: MergeBase) -> dict[str, Any] | None:
    """What `base` says of itself, if it is a merged model."""
    merged = getattr(base.source.config, CONFIG_KEY, None)
    if base.source.is_gguf:
        import gguf

        field = gguf.GGUFReader(base.source.path).fields.get(GGUF_KEY)
        with suppress(ValueError):
            merged = json.loads(field.contents()) if field is not None else None
    return merged if isinstance(merged, dict) else None


def check_output(output: Path, *inputs: Path) -> None:
    """ConfigError if `output` holds something, cannot be made, or lies in, or holds, one of `inputs`."""
    check_new(output)
    for path in inputs:
        mine, theirs = output.resolve(), path.resolve()
        if mine == theirs or theirs in mine.parents or mine in theirs.parents:
            raise ConfigError(f"overlaps {path}", where=str(output), fix="Give a folder of its own as --output")


def card(merged: dict[str, Any], drift: dict[str, Any], use: str) -> str:
    """README.md of the folder, with the front matter that hubs read.

    Args:
        use: lines of code that load it.
    """
    base = str(merged["base"])
    front = f"base_model: {json.dumps(base)}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    recipe = merged["base_quant"]
    rows = {
        "base": (
            f"`{base}`, sha256 `{merged['base_sha256']}` in {recipe['quant_type']}, blocks of {recipe['blocksize']}"
        ),
        "adapter": "<br>".join(
            f"{part['weight']:g} x `{part['adapter']}`, sha256 `{part['adapter_sha256']}`"
            for part in merged["adapters"]
        ),
        "added to": {
            "quantized": "the quantized base, decoded: the weights that the adapter was trained on",
            "original": "the 16-bit weights that the quantized base was made of",
        }[merged["onto"]],
        "written as": merged["format"],
        "by": ", ".join(f"{name} {version}" for name, version in merged["versions"].items()),
        "against base + adapter": (
            f"KL {drift['kl']:.2e} nats per token, same likeliest token at {drift['greedy_agreement']:.2%}, "
            f"largest logit difference {drift['max_logit']:.3g}, "
            f"loss {drift['loss']:.4f} against {drift['trained_loss']:.4f}; {drift['tokens']} tokens of {drift['on']}"
        ),
    }  # fmt: skip
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    title = "Adapters as one" if str(merged["format"]).startswith("adapter") else "A merged model"
    return f"---\n{front}tags: [halfbyte, qlora, merged]\n---\n# {title}\n\n| | |\n|---|---|\n{table}\n{use}"
