"""What pydantic finds wrong with a value, in our words: typer asks it about flags, the server about requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "is not supported here",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "model_type": "must be an object",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "may have {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "string_type": "must be text",
    "too_long": "may have {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}


def in_plain_words(found: Mapping[str, Any]) -> str:
    """One of a ValidationError's `errors()`, without the name of what it concerns."""
    words = _WORDS.get(found["type"])
    return words.format(**found.get("ctx", {})) if words else str(found["msg"]).removeprefix("Value error, ")
