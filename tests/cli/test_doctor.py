"""The table of kernels: every operator once, every reason once for all that it holds for, in the terminal's width."""

from __future__ import annotations

import pytest

from halfbyte.cli.doctor import _print_kernels
from halfbyte.kernels import kernel_report


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_kernels(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = kernel_report()
    _print_kernels(rows)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    words = text.replace(",", " ").split()
    assert [words.count(row.op) for row in rows] == [1] * len(rows)
    reasons = {(row.kernel, row.device, row.reason) for row in rows}
    assert sum(" ".join(words).count(" on " + device) for device in {row.device for row in rows}) == len(reasons)
