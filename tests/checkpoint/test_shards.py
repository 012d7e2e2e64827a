"""Reading and writing model folders: what is well formed reads exactly, what is not is refused by file and tensor."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.checkpoint.shard_writer import Pieces, write_shards
from halfbyte.checkpoint.shards import INDEX_NAME, SINGLE_NAME, SafetensorsFolder
from halfbyte.errors import ModelError


def tensors_of_all_kinds() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(13, 7, generator=generator)
    return {
        "f32": matrix, "bf16": matrix.bfloat16(), "f16": matrix.half(), "f64": matrix.double(),
        "i64": torch.arange(5), "u8": torch.arange(9, dtype=torch.uint8), "bool": matrix > 0,
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "rank 3": matrix.view(1, 13, 7).clone(),
        "ünïcode ": torch.ones(2),
    }  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_raw(folder: Path, header: bytes | dict[str, Any], body: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / SINGLE_NAME
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return file


def entry(start: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# -- what is well formed -----------------------------------------------------------------------------------------


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    folder = SafetensorsFolder(tmp_path)
    assert set(folder.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert same(folder.read(name), tensor), name
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == tensor.dtype


def test_reads_slices(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / SINGLE_NAME)
    folder = SafetensorsFolder(tmp_path)
    for name in ("f32", "bf16", "bool", "u8", "empty", "rank 3"):
        for rows in (1, 4, 9, 100):
            slices = [part.clone() for part in folder.slices(name, rows)]
            assert [len(part) for part in slices[:-1]] == [rows] * (len(slices) - 1)
            assert same(torch.cat([tensors[name][:0], *slices]), tensors[name]), (name, rows)


def test_slices_lie_in_one_buffer(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64, 64), "b": torch.zeros(64, 64)}, tmp_path / SINGLE_NAME)
    folder = SafetensorsFolder(tmp_path)
    assert len({part.data_ptr() for name in "ab" for part in folder.slices(name, 5)}) == 1


@pytest.mark.parametrize("limit", [1, 500, 1000, 10**9])
def test_safetensors_reads_what_we_wrote(tmp_path: Path, limit: int) -> None:
    """Round trip through shards of any size, and through safetensors' own reader."""
    tensors = tensors_of_all_kinds()
    files, total = write_shards(tmp_path, iter(tensors.items()), max_shard_bytes=limit)
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    assert sorted(files) == sorted(tmp_path.iterdir())
    shards = [file for file in files if file.suffix == ".safetensors"]
    theirs: dict[str, Tensor] = {}
    for file in shards:
        part = load_file(file)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
        theirs |= part
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensor) for name, tensor in tensors.items())
    assert all(same(SafetensorsFolder(tmp_path).read(name), tensor) for name, tensor in tensors.items())
    if limit == 10**9:
        assert [file.name for file in files] == [SINGLE_NAME]
    else:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == total
        assert set(index["weight_map"]) == set(tensors)
        assert {file.name for file in shards} == set(index["weight_map"].values())


def test_writes_one_shard_at_a_time(tmp_path: Path) -> None:
    """What fills a file is in it before the next tensor is asked for."""
    seen = []

    def stream() -> Any:
        for number in range(6):
            seen.append(len(list(tmp_path.glob("*.safetensors"))))
            yield f"t{number}", torch.full((100,), float(number))

    write_shards(tmp_path, stream(), max_shard_bytes=400)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_nothing_to_write(tmp_path: Path) -> None:
    assert write_shards(tmp_path, [])[1] == 0
    assert SafetensorsFolder(tmp_path).names() == []


def test_non_contiguous_tensors_are_written(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    write_shards(tmp_path, [("t", matrix.t())])
    assert same(SafetensorsFolder(tmp_path).read("t"), matrix.t())


@pytest.mark.parametrize("limit", [1, 500, 10**9])
def test_pieces_are_written_as_the_whole_is(tmp_path: Path, limit: int) -> None:
    """Also when every piece lies where the one before it was, and when the tensor has to wait for its place."""
    tensors = {
        f"{n} x {dtype}": torch.randn(n, 4).to(dtype) for n in (0, 5, 16) for dtype in (torch.half, torch.float)
    }

    def parts(tensor: Tensor) -> Iterator[Tensor]:
        buffer = torch.empty_like(tensor[:3])
        for rows in tensor.split(3):
            yield buffer[: len(rows)].copy_(rows)

    (tmp_path / "whole").mkdir()
    write_shards(tmp_path / "whole", tensors.items(), max_shard_bytes=limit)
    (tmp_path / "pieces").mkdir()
    pieces = ((name, Pieces(t.dtype, tuple(t.shape), parts(t))) for name, t in tensors.items())
    write_shards(tmp_path / "pieces", pieces, max_shard_bytes=limit)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "pieces" / file.name).read_bytes() == file.read_bytes()


def sharded(folder: Path) -> dict[str, Tensor]:
    tensors = tensors_of_all_kinds()
    write_shards(folder, tensors.items(), max_shard_bytes=500)
    return tensors


def test_only_what_the_index_names_is_read(tmp_path: Path) -> None:
    """Beside an index lie other files (original/, consolidated): they do not matter."""
    tensors = sharded(tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert set(SafetensorsFolder(tmp_path).names()) == set(tensors)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    del index["weight_map"]["bool"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    assert "bool" not in SafetensorsFolder(tmp_path).names()


def test_several_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    assert SafetensorsFolder(tmp_path).names() == ["a", "b"]
    save_file({"a": torch.ones(2)}, tmp_path / "model-3.safetensors")
    with pytest.raises(ModelError, match=r"model-3\.safetensors: tensor 'a' stands in two files"):
        SafetensorsFolder(tmp_path)


def test_one_file_of_the_usual_name_is_the_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_NAME)
    save_file({"lora": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    assert SafetensorsFolder(tmp_path).names() == ["a"]


# -- what is not -------------------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_NAME
    save_file(tensors_of_all_kinds(), file)
    data = file.read_bytes()
    offsets = {*range(min(len(data), 4096)), *random.Random(0).sample(range(len(data)), 200)} - {len(data)}
    for size in sorted(offsets, reverse=True):
        os.truncate(file, size)
        with pytest.raises(ModelError, match=r"model\.safetensors: ") as caught:
            SafetensorsFolder(tmp_path)
        assert "\n" not in str(caught.value)


def test_every_changed_length_is_refused(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_NAME
    save_file(tensors_of_all_kinds(), file)
    data = file.read_bytes()
    right = int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, right - 1, right + 1, len(data), 10**8 + 1, 2**31, 2**60, 2**63, 2**64 - 1):
        file.write_bytes(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(ModelError, match=r"model\.safetensors: the (header|file has)"):
            SafetensorsFolder(tmp_path)


def test_trailing_bytes(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_NAME
    save_file(tensors_of_all_kinds(), file)
    with file.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ModelError, match=r"the file has \d+ bytes, its tensors need \d+"):
        SafetensorsFolder(tmp_path)


BODY = bytes(32)
BAD_HEADERS: dict[str, bytes | dict[str, Any]] = {
    "bad UTF-8": b'{"\xff\xfe": 1}',
    "not JSON": b"not JSON",
    "deep nesting": b'{"a":' * 100_000,
    "deep arrays": b"[" * 100_000 + b"]" * 100_000,
    "a list": b"[]",
    "a number": b"17",
    "null": b"null",
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "duplicate names": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
    "duplicate fields": b'{"a":{"dtype":"F32","shape":[8],"shape":[4],"data_offsets":[0,32]}}',
    "an entry that is a string": {"a": "F32"},
    "an entry that is null": {"a": None},
    "no dtype": {"a": {"shape": [8], "data_offsets": [0, 32]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 32]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [8]}},
    "one offset": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 16, 32]}},
    "negative start": {"a": entry(-32, 0, [8])},
    "end before start": {"a": entry(32, 0, [8])},
    "float offsets": {"a": entry(0.0, 32.0, [8])},
    "boolean offset": {"a": entry(False, 32, [8])},
    "NaN offset": b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[NaN,32]}}',
    "infinite shape": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,32]}}',
    "huge offset": {"a": entry(0, 2**63, [8])},
    "offsets of strings": {"a": entry("0", "32", [8])},
    "negative sizes": {"a": entry(0, 32, [-2, -4])},
    "size of a string": {"a": entry(0, 32, "8")},
    "size of floats": {"a": entry(0, 32, [8.0])},
    "shape is a number": {"a": entry(0, 32, 8)},
    "product overflows": {"a": entry(0, 32, [4194305, 4194305, 211106198978564])},
    "product overflows to the right size": {"a": entry(0, 32, [2**32, 2**32, 8])},
    "shape too large": {"a": entry(0, 32, [9])},
    "shape too small": {"a": entry(0, 32, [7])},
    "overlap": {"a": entry(0, 24, [6]), "b": entry(16, 32, [4])},
    "same bytes twice": {"a": entry(0, 32, [8]), "b": entry(0, 32, [8])},
    "hole": {"a": entry(0, 8, [2]), "b": entry(16, 32, [4])},
    "hole at the start": {"a": entry(8, 32, [6])},
    "a tail of no tensor": {"a": entry(0, 24, [6])},
    "beyond the end": {"a": entry(0, 64, [16])},
    "unknown dtype": {"a": entry(0, 32, [8], "F31")},
    "dtype is a list": {"a": entry(0, 32, [8], ["F32"])},
    "dtype of another width": {"a": entry(0, 32, [8], "F64")},
    "F8": {"a": entry(0, 32, [32], "F8_E4M3")},
    "mixed kinds of offsets": {"a": entry(0, 16, [4]), "b": entry(None, 32, [4])},
}


@pytest.mark.parametrize("bad", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, bad: str) -> None:
    write_raw(tmp_path, BAD_HEADERS[bad], BODY)
    with pytest.raises(ModelError, match=r"model\.safetensors: ") as caught:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_tensors_are_named(tmp_path: Path) -> None:
    for header, message in (
        ({"q": entry(0, 24, [6]), "k": entry(16, 32, [4])}, "tensor 'k' does not fill its place: bytes 16 to 32"),
        ({"q": entry(0, 32, [8], "F8_E4M3")}, "tensor 'q' has dtype F8_E4M3: supported are F64, F32, "),
        ({"q": entry(0, 32, [-8])}, "tensor 'q' has a bad shape or offset"),
    ):
        write_raw(tmp_path, header, BODY)
        with pytest.raises(ModelError, match=message):
            SafetensorsFolder(tmp_path)


def test_the_same_header_well_formed_passes(tmp_path: Path) -> None:
    """So that the refusals above are for what is wrong with them; empty tensors share an offset."""
    header = {"__metadata__": {"format": "pt"}, "b": entry(16, 32, [4]), "e": entry(16, 16, [0, 3]),
              "a": entry(0, 16, [2, 2])}  # fmt: skip
    write_raw(tmp_path, header, BODY)
    folder = SafetensorsFolder(tmp_path)
    assert folder.names() == ["a", "e", "b"]
    assert folder.read("e").shape == (0, 3)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE_NAME)
    folder = SafetensorsFolder(tmp_path)
    os.truncate(tmp_path / SINGLE_NAME, 500)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        folder.read("a")


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        change(index["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return edit


def index_text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX_NAME).write_bytes(text) and None


BAD_INDEXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (
        lambda folder: next(folder.glob("model-00002*")).unlink(), "model-00002-of-.*: the file is missing",
    ),
    "listed tensor absent": (edit_index(lambda m: m.update(ghost=m["f32"])), "1 tensors .* first 'ghost'"),
    "tensor in another shard": (
        edit_index(lambda m: m.update({"f32": m["rank 3"]})), "not where the index says, first 'f32'",
    ),
    "parent folder": (edit_index(lambda m: m.update(f32="../outside.safetensors")), "names '../outside.safetensors'"),
    "absolute path": (edit_index(lambda m: m.update(f32="/etc/x.safetensors")), "names '/etc/x.safetensors'"),
    "subfolder": (edit_index(lambda m: m.update(f32="sub/x.safetensors")), "only .safetensors files beside it"),
    "a pickle": (edit_index(lambda m: m.update(f32="model.bin")), "names 'model.bin'"),
    "an empty name": (edit_index(lambda m: m.update(f32="")), "names ''"),
    "a null byte": (edit_index(lambda m: m.update(f32="a\0.safetensors")), "index.json|missing"),
    "not JSON": (index_text(b"{"), "is not a safetensors index"),
    "bad UTF-8": (index_text(b"\xff\xff"), "is not a safetensors index"),
    "no weight_map": (index_text(b"{}"), "is not a safetensors index"),
    "weight_map is a list": (index_text(b'{"weight_map": []}'), "is not a safetensors index"),
    "a list": (index_text(b"[1]"), "is not a safetensors index"),
    "deep": (index_text(b"[" * 200_000), "is not a safetensors index"),
    "empty": (index_text(b""), "is not a safetensors index"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INDEXES)
def test_bad_indexes(tmp_path: Path, bad: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    sharded(folder)
    save_file({"f32": torch.ones(3)}, tmp_path / "outside.safetensors")
    change, message = BAD_INDEXES[bad]
    change(folder)
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(folder)


def test_index_of_absurd_size(tmp_path: Path) -> None:
    sharded(tmp_path)
    os.truncate(tmp_path / INDEX_NAME, 16 * 2**20 + 1)
    with pytest.raises(
        ModelError,
        match=r"16,777,217 bytes: limits\.json_bytes is 16,777,216\. If you trust .* limits\.json_bytes=16777217",
    ):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(ModelError, match=rf"no \.safetensors file: {name} is a pickle.*save_pretrained\(\) writes"):
        SafetensorsFolder(tmp_path)
    assert not marker.exists()


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors file\. Give a folder"):
        SafetensorsFolder(tmp_path)


def test_a_folder_under_a_files_name(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        SafetensorsFolder(tmp_path)
