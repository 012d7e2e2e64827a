"""Sizes as people write them."""

from __future__ import annotations

import pytest

from halfbyte.dtypes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), (12345, 12345), ("7", 7), ("1GB", 10**9), ("512MiB", 512 << 20), (" 1.5 kib ", 1536), ("2e9", 2 * 10**9),
     ("0.5TB", 5 * 10**11), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_parse_bytes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1XB", "1 G B", "1..5GB", "nan", "inf", True])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_what_format_bytes_writes_can_be_read() -> None:
    for size in (0, 7, 1500, 512_000_000, 12 * 10**9, 3 * 10**12):
        assert parse_bytes(format_bytes(size)) == size
