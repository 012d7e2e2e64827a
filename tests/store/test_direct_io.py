"""Direct I/O: the right bytes at any place and length, nothing left in the page cache, errors of one line."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import FileError, ResourceError
from halfbyte.store import ALIGNMENT, AlignedBuffer, DirectFile

MODES = ["as the system has it", "no O_DIRECT", "no preadv"]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The other two are what other systems have; the second is also what a file system without direct I/O gets."""
    if request.param != MODES[0]:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param == "no preadv":
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.delattr(os, "pwritev", raising=False)
    return str(request.param)


def test_a_buffer_is_aligned_zeroed_and_outlives_its_object() -> None:
    for size in (0, 1, ALIGNMENT, ALIGNMENT + 1, 3 << 20):
        buffer = AlignedBuffer(size)
        assert (buffer.tensor.dtype, buffer.tensor.shape, len(buffer.view)) == (torch.uint8, (size,), size)
        assert not buffer.tensor.any()
        assert size == 0 or buffer.tensor.data_ptr() % ALIGNMENT == 0
    tensor = buffer.tensor[5:]
    buffer.view[6] = 7
    del buffer
    assert tensor[1] == 7


def test_any_place_and_length(mode: str, tmp_path: Path) -> None:
    """200 reads and writes at random beside a bytearray: aligned, unaligned, over and within blocks, at the end."""
    draw = random.Random(0)
    size = 2_100_000
    file = DirectFile.scratch(tmp_path, size)
    assert file.nbytes == 513 * ALIGNMENT
    expected = bytearray(file.nbytes)
    for number in range(200):
        count = draw.choice([0, 1, 5, 4095, 4096, 4097, 8192, 70_001, 1_200_000])
        start = min(draw.choice([0, 4096, draw.randrange(size), file.nbytes - count]), file.nbytes - count)
        shift = draw.choice([0, start % ALIGNMENT, 3])
        part = AlignedBuffer(count + shift).tensor[shift:]
        if number % 2:
            part.copy_(torch.frombuffer(bytearray(draw.randbytes(count) or b" "), dtype=torch.uint8)[:count])
            file.write_from(part, start)
            expected[start : start + count] = part.numpy().tobytes()
        else:
            file.read_into(part, start)
            assert part.numpy().tobytes() == expected[start : start + count], (count, start, shift)
    everything = AlignedBuffer(file.nbytes)
    file.read_into(everything.view, 0)
    assert bytes(everything.view) == expected
    file.close()


def test_a_file_is_read_to_its_ragged_end_and_no_further(mode: str, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(10_001)
    (tmp_path / "weights").write_bytes(data)
    file = DirectFile(tmp_path / "weights")
    assert file.nbytes == 10_001
    target = torch.zeros(10_001 // 4, dtype=torch.float32)
    file.read_into(target, 1)
    assert target.view(torch.uint8).numpy().tobytes() == data[1:]
    for start, count in ((0, 10_002), (9_000, 4096), (20_000, 1)):
        with pytest.raises(FileError, match=r"weights: is cut off: 10001 bytes, .* are needed. Fetch"):
            file.read_into(AlignedBuffer(count).view, start)
    file.close()


def cached_bytes(path: Path) -> int:
    """Bytes of `path` in the page cache."""
    libc = ctypes.CDLL(None)
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        anchor = ctypes.c_char.from_buffer(memory)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), pages) == 0
        del anchor
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")
def test_what_was_read_is_not_in_the_page_cache(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 << 20))
    with path.open("rb") as plain:
        os.fsync(plain.fileno())
    if cached_bytes(path) != 4 << 20:
        pytest.skip("this file system has no page cache to look into")
    file = DirectFile(path)
    if file.direct:
        os.posix_fadvise(file._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = AlignedBuffer(1 << 20)
    for start in range(0, 4 << 20, 1 << 20):
        file.read_into(buffer.view, start)
    file.close()
    assert cached_bytes(path) < 1 << 19


def test_direct_io_is_used_where_the_file_system_takes_it(tmp_path: Path) -> None:
    """And `direct` says so; the suite runs on file systems of both kinds."""
    file = DirectFile.scratch(tmp_path, 1)
    taken = hasattr(os, "O_DIRECT")
    if taken:
        try:
            os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
        except OSError:
            taken = False
    assert file.direct == taken, file.why
    file.close()


def test_a_folder_that_is_memory_is_called_so(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.path.ismount(shm):
        pytest.skip("no /dev/shm here")
    assert DirectFile.scratch(shm, 1).why == "tmpfs: this folder is memory, not disk"
    assert "memory" not in DirectFile.scratch(Path(__file__).parent, 1).why


def test_several_threads_read_at_once(mode: str, tmp_path: Path) -> None:
    data = torch.arange(1 << 20, dtype=torch.int32)
    file = DirectFile.scratch(tmp_path, data.nbytes)
    file.write_from(data, 0)

    def check(part: int) -> bool:
        target = torch.empty(1 << 15, dtype=torch.int32)
        file.read_into(target, part * target.nbytes)
        return torch.equal(target, data[part << 15 : (part + 1) << 15])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(32)))
    file.close()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    file = DirectFile.scratch(tmp_path, 1 << 20)
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ResourceError, match=rf"{folder.name}: cannot be written: .*\. ") as caught:
            DirectFile.scratch(folder, 100)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileError, match="absent: cannot be read: No such file"):
        DirectFile(tmp_path / "absent")


def test_a_full_disk_is_said_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs .* TB, the disk has .* free: No space left .* Free some space"):
        DirectFile.scratch(tmp_path, 10**15)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ResourceError, match=r"cannot be written: File too large. Raise the limit"):
            DirectFile.scratch(tmp_path, 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [100, 4096, 5000])
def test_short_transfers_are_continued(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that end within a block, which direct I/O could not go on from."""
    file = DirectFile.scratch(tmp_path, 1 << 16)
    if file.direct and step < ALIGNMENT:
        pytest.skip("direct I/O moves whole blocks")
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: min(read(fd, views, at), step))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: min(write(fd, views, at), step))
    data = torch.arange(1 << 14, dtype=torch.int32)
    file.write_from(data, 0)
    target = torch.zeros_like(data)
    file.read_into(target, 0)
    assert torch.equal(target, data)
    file.close()


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "No space left .* Free some space"), (errno.EIO, "The disk reports an error")]
)
def test_what_the_disk_says_is_passed_on(
    code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = DirectFile.scratch(tmp_path, 1 << 16)

    def fail(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    buffer = AlignedBuffer(1 << 13)
    with pytest.raises(ResourceError, match=f"cannot be written: .*{text}") as caught:
        file.write_from(buffer.view, 0)
    assert caught.value.exit_code == 4
    with pytest.raises(ResourceError, match="cannot be read"):
        file.read_into(buffer.view, 0)
    monkeypatch.setattr(os, "pwritev", lambda *args: 0)
    with pytest.raises(ResourceError, match="No space left"):
        file.write_from(buffer.view, 0)
    file.close()
