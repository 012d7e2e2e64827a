"""Files with something wrong: bytes, numbers and structure changed at random, many ways at once or one."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**48,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 2**64, 1e308, 0.5, "", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "a\0b",
    "\ud800", [], {}, [[[[]]]], {"": {}}, "F32", "BF16", [2**32, 2**32], [-1], float("nan"), float("inf"),
)  # fmt: skip
Mutation = Callable[[bytes, random.Random], bytes]


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _grow(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.choice((1, 7, 8, 1000)))


def _remove(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.choice((1, 2, 8, 100)) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(data)), chance.choice((1, 8, 50))
    return data[: start + size] + data[start:]


def _number(data: bytes, chance: random.Random) -> bytes:
    kind = chance.choice("BHIQ")
    value = chance.choice(NUMBERS) % 256 ** struct.calcsize("<" + kind)
    raw = struct.pack("<" + kind, value)
    start = chance.randrange(min(len(data), 4096))
    return data[:start] + raw + data[start + len(raw) :]


def _digits(data: bytes, chance: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+", data[:20000]))
    if not found:
        return _flip(data, chance)
    spot = chance.choice(found)
    return data[: spot.start()] + str(chance.choice(NUMBERS)).encode() + data[spot.end() :]


ANY: tuple[Mutation, ...] = (_flip, _cut, _grow, _remove, _repeat, _number, _digits)


def mutate(data: bytes, chance: random.Random, more: tuple[Mutation, ...] = ()) -> bytes:
    """One to three mutations of `data`, of the general kinds and of `more`."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice((*more, *more, *ANY))(data or b"\0", chance)
    return data


def change_value(data: bytes, chance: random.Random) -> bytes:
    """JSON with one value, key or item changed, removed, doubled or moved deep."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, chance)
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(places) < 2000:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
        places += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    if not places:
        return json.dumps(chance.choice(VALUES)).encode()
    holder, key = chance.choice(places)
    how = chance.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[chance.choice(("", "x", "__metadata__", "../x", str(key) + " "))] = holder.pop(key)
    elif how == 2:
        nested: Any = holder[key]
        for _ in range(chance.choice((1, 10, 900, 5000))):
            nested = [nested]
        return _dump(value, holder, key, nested)
    elif how == 3 and isinstance(holder, dict):
        text = json.dumps(value)
        return text.replace(f"{json.dumps(key)}:", f"{json.dumps(key)}: 1, {json.dumps(key)}:", 1).encode()
    else:
        holder[key] = chance.choice(VALUES)
    return json.dumps(value).encode()


def _dump(value: Any, holder: Any, key: Any, nested: Any) -> bytes:
    """As json.dumps, which recurses: the nested value goes in as text."""
    depth = 0
    while isinstance(nested, list) and len(nested) == 1:
        nested, depth = nested[0], depth + 1
    holder[key] = "@nested@"
    return json.dumps(value).replace('"@nested@"', "[" * depth + json.dumps(nested) + "]" * depth).encode()


def change_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose JSON header has one value changed, with a length that is right."""
    if len(data) < 8:
        return _grow(data, chance)
    size = int.from_bytes(data[:8], "little")
    header = change_value(data[8 : 8 + size], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
