"""Parquet files give the records that the same samples give as JSON lines; what cannot be read is one line."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import RecordReader
from halfbyte.errors import DataError

arrow = pytest.importorskip("pyarrow", reason="needs the package pyarrow")
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "user", "content": f"Q{i} ünï"}, {"role": "assistant", "content": f"A{i}"}]}
        for i in range(150)
    ],
    "alpaca": [
        {"instruction": "Add", "input": "2 2", "output": "four"}, {"instruction": "Say", "input": None, "output": "hi"}
    ],
    "text": [{"text": "running text"}, {"text": "and more"}],
}  # fmt: skip


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet as pq

    pq.write_table(arrow.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


@pytest.mark.parametrize("format", ROWS)
def test_a_parquet_file_gives_the_records_of_its_rows_as_lines(tmp_path: Path, write: Any, format: str) -> None:
    path = parquet(tmp_path, ROWS[format])
    reader, lines = RecordReader(path), RecordReader(write(ROWS[format]))
    records = list(reader)
    assert records == list(lines)
    assert records[-1].line == len(ROWS[format]) == reader.read
    assert reader.format == format
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_datasets_file_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    datasets.Dataset.from_list(ROWS["messages"]).to_parquet(tmp_path / "d.parquet")
    assert len(list(RecordReader(tmp_path / "d.parquet"))) == 150


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{"text": "good"}, {"text": None}])
    with pytest.raises(DataError, match=r"data\.parquet:2"):
        list(RecordReader(path))
    assert len(list(RecordReader(path, on_bad_line="skip"))) == 1


def test_what_is_no_parquet_file_is_one_line(tmp_path: Path) -> None:
    good = parquet(tmp_path, ROWS["messages"]).read_bytes()
    for name, data in {
        "text.parquet": json.dumps(ROWS["text"][0]).encode(), "empty.parquet": b"",
        "cut.parquet": good[: len(good) // 2],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="not a Parquet file that can be read") as error:
            list(RecordReader(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="No such file"):
        list(RecordReader(tmp_path / "none.parquet"))


def test_a_value_json_has_no_word_for_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{"text": "good", "when": datetime.datetime(2026, 1, 1)}])
    with pytest.raises(DataError, match=r"no word for.*datetime"):
        list(RecordReader(path))
