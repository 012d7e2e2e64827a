"""A sample as tokens to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.data.tokenize import Example

_GLYPHS = {"\n": "⏎\n", "\t": "⇥"}


@dataclass(frozen=True)
class Token:
    """One token: its text with control characters made visible, whether it is learned, and whether it is special."""

    text: str
    learned: bool
    special: bool


def tokens_of(tokenizer: Any, example: Example) -> list[Token]:
    """The tokens of a sample, legible wherever they are shown."""
    special = set(tokenizer.all_special_ids)
    return [
        Token(visible(token_text(tokenizer, token)), label >= 0, token in special)
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    ]


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, with the leading space that decoding a single SentencePiece token drops."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    raw = str(tokenizer.convert_ids_to_tokens(token))
    return " " + text if raw.startswith("▁") and not text.startswith(" ") else text


def visible(text: str) -> str:
    """Newlines and tabs as glyphs, other control characters escaped (a data file must not drive the terminal)."""
    return "".join(
        _GLYPHS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode("ascii")) for c in text
    )
