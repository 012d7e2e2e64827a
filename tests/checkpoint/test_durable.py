"""A folder is there whole or not at all: full disks, damage, kills."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoint.durable import recover, remove_folder, write_file, write_folder
from halfbyte.checkpoint.manifest import MANIFEST, MARKER, verify_folder
from halfbyte.errors import ConfigError, FileError, ResourceError

DEAD = 999_999_999  # above any pid_max


def save(final: Path, text: str = "one") -> None:
    with write_folder(final) as writer:
        writer.write_bytes("a.txt", text.encode())
        writer.write_json("b.json", {"text": text})
        writer.write_tensors("c.safetensors", {"t": torch.arange(6.0).view(2, 3).T})


def save_and_raise(final: Path, error: BaseException) -> None:
    with write_folder(final) as writer:
        writer.write_bytes("a", b"")
        raise error


def text_of(final: Path) -> str:
    verify_folder(final)
    return (final / "a.txt").read_text()


def hidden(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


def test_round_trip(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "er" / "out"
    save(final)
    manifest = verify_folder(final)
    assert sorted(manifest["files"]) == ["a.txt", "b.json", "c.safetensors"]
    assert sorted(path.name for path in final.iterdir()) == ["a.txt", "b.json", "c.safetensors", MANIFEST]
    modes = {path.stat().st_mode for path in final.iterdir()}
    assert len(modes) == 1, "safetensors' files get the same mode as ours"
    assert hidden(final.parent) == []


def test_same_input_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "x")
    save(tmp_path / "y")
    for path in (tmp_path / "x").iterdir():
        assert path.read_bytes() == (tmp_path / "y" / path.name).read_bytes()


def test_replaces_ours(tmp_path: Path) -> None:
    save(tmp_path / "out", "one")
    save(tmp_path / "out", "two")
    assert text_of(tmp_path / "out") == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_users_file_in_a_replaced_folder_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "out", "one")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING, "halfbyte"):
        save(tmp_path / "out", "two")
    assert text_of(tmp_path / "out") == "two"
    assert (tmp_path / "out.old-1" / "notes.txt").read_text() == "mine"
    assert "out.old-1" in caplog.text


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        save(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        save(tmp_path / "file")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert hidden(tmp_path) == []


def test_an_empty_folder_and_a_link_to_one_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert text_of(tmp_path / "real") == "one"


def test_an_error_inside_leaves_nothing_and_keeps_its_kind(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "no model", "/elsewhere/model"), OSError(1234)):
        with pytest.raises(type(error)) as caught:
            save_and_raise(tmp_path / "out", error)
        assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_failing_fsync_rename_or_open_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The Nth of each call fails: ResourceError, the older folder is whole, nothing is left over."""
    final = tmp_path / "out"
    for name in ("fsync", "rename", "mkdir", "open"):
        for number in range(100):
            save(final, "old")
            with monkeypatch.context() as patch:
                calls = fail_at(patch, name, number, code)
                said = os.strerror(code)
                try:
                    save(final, f"{name}{number}")
                except ResourceError as error:
                    said = str(error)
            assert os.strerror(code) in said
            if len(calls) <= number:
                assert number, f"{name} is never called"
                break
            assert text_of(final) in ("old", f"{name}{number}")
            recover(tmp_path, "out")
            assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_at(patch: pytest.MonkeyPatch, name: str, number: int, code: int) -> list[Any]:
    real: Callable[..., Any] = getattr(os, name)
    calls: list[Any] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number + 1:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    patch.setattr(os, name, failing)
    return calls


def test_file_size_limit_in_a_real_process(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: our writer and safetensors' both run into it."""
    save(tmp_path / "out", "old")
    script = """
        import resource, sys, torch
        from halfbyte.checkpoint.durable import write_folder, write_file
        from halfbyte.errors import ResourceError
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        def tensors(writer): writer.write_tensors("t.safetensors", {"t": torch.zeros(10_000)})
        def data(writer): writer.write_bytes("d", bytes(40_000))
        for write in (tensors, data):
            try:
                with write_folder(sys.argv[1]) as writer:
                    write(writer)
            except ResourceError as error:
                assert "File too large" in str(error) and "ulimit" in str(error), error
            else:
                raise AssertionError("no error")
        try:
            write_file(sys.argv[1] + "/../single", bytes(40_000))
        except ResourceError as error:
            assert "File too large" in str(error), error
        else:
            raise AssertionError("no error")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")], check=True, timeout=60)
    assert text_of(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_free_space_is_asked_for_first(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="free"), write_folder(tmp_path / "out", expected_bytes=10**18):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


def test_kill_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child dies (os._exit) at the Nth call; the next process finds old or new, whole, and clears the rest."""
    final = tmp_path / "out"
    save(final, "old")
    for number in range(200):
        child = os.fork()
        if child == 0:
            die_at(number)
            save(final, f"new{number}")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        recover(tmp_path)
        assert text_of(final) in ("old", f"new{number}")
        assert [path.name for path in tmp_path.iterdir()] == ["out"], f"left over after a kill at call {number}"
        if status == 0:
            assert number > 15, "the kills did not reach the calls"
            return
        assert status == 9
        save(final, "old")
    raise AssertionError("the child never finished")


def die_at(number: int) -> None:
    """Make this process end, as if killed, at the Nth call that changes the disk."""
    calls = count()

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("whole", [True, False])
def test_cut_between_the_two_renames(tmp_path: Path, whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "out", "old")
    save(tmp_path / "twin", "new")
    os.rename(tmp_path / "twin", tmp_path / f".tmp-out-{DEAD}")
    os.rename(tmp_path / "out", tmp_path / f".old-out-{DEAD}")
    if not whole:
        (tmp_path / f".tmp-out-{DEAD}" / "a.txt").write_text("x")
    with caplog.at_level(logging.WARNING, "halfbyte"):
        recover(tmp_path)
    assert text_of(tmp_path / "out") == ("new" if whole else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "cut off" in caplog.text


def test_what_is_not_ours_or_still_alive_stays(tmp_path: Path) -> None:
    stranger = tmp_path / f".tmp-out-{DEAD}"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    living = tmp_path / f".tmp-out-{os.getppid()}"
    living.mkdir()
    (living / MARKER).touch()
    (tmp_path / ".tmp-file").write_text("x")
    before = hidden(tmp_path)
    save(tmp_path / "out")
    assert hidden(tmp_path) == before
    assert (stranger / "thesis.txt").exists()


def test_leftovers_of_our_own_process_number_do_not_block(tmp_path: Path) -> None:
    """A container starts its program under the same number every time."""
    stranger, ours = tmp_path / f".tmp-out-{os.getpid()}", tmp_path / f".tmp-out-1-{os.getpid()}"
    stranger.mkdir()
    (stranger / "x").touch()
    save(tmp_path / "out")
    assert text_of(tmp_path / "out") == "one"
    assert stranger.exists()
    ours.mkdir()
    recover(tmp_path, "out-1")
    assert not ours.exists()


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    save(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        data = path.read_bytes()
        random = torch.Generator().manual_seed(len(data))
        flips = torch.randint(len(data) * 8, (40,), generator=random).tolist()
        damaged = [data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :] for bit in flips]
        for change in (*damaged, data[:-1], b"", data + b"\0"):
            path.write_bytes(change)
            if path.name == MANIFEST and same_meaning(change, data):
                continue
            with pytest.raises((FileError, ConfigError)) as caught:
                verify_folder(tmp_path / "out")
            assert "out" in caught.value.where
            assert path.name == MANIFEST or caught.value.where.endswith(path.name)
        path.unlink()
        with pytest.raises(FileError, match="missing"):
            verify_folder(tmp_path / "out")
        path.write_bytes(data)
    verify_folder(tmp_path / "out")


def same_meaning(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_manifest_entries_cannot_point_outside(tmp_path: Path) -> None:
    save(tmp_path / "out")
    for name in ("../x", "/etc/passwd", "a\0b"):
        text = {"written_by": "halfbyte", "format": 1, "files": {name: {"size": 0, "sha256": ""}}}
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(text))
        with pytest.raises(FileError):
            verify_folder(tmp_path / "out")


def test_no_manifest_and_a_newer_one(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="missing"):
        verify_folder(tmp_path)
    assert verify_folder(tmp_path, required=False) == {}
    (tmp_path / MANIFEST).write_text(json.dumps({"written_by": "halfbyte", "format": 99, "files": {}}))
    with pytest.raises(ConfigError, match="format 99"):
        verify_folder(tmp_path)


def test_remove_folder(tmp_path: Path) -> None:
    save(tmp_path / "out")
    (tmp_path / "out" / "mine").touch()
    assert not remove_folder(tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    assert remove_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_write_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "metrics.json"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            fail_at(patch, name, 0, errno.ENOSPC)
            with pytest.raises(ResourceError, match="No space left"):
                write_file(path, b"three")
        assert path.read_bytes() == b"two"
        assert [each.name for each in path.parent.iterdir()] == ["metrics.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="Permission denied"):
        save(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_fsync_comes_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, the manifest after them, the folder, then the rename, then the parent."""
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source: Any, target: Any) -> None:
        log.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    save(tmp_path / "out")
    temp = f".tmp-out-{os.getpid()}"
    assert log == ["a.txt", "b.json", "c.safetensors", MANIFEST, temp, "rename", tmp_path.name]
