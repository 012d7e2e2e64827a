"""Every state a disk may be in when a process is killed or the power fails, from the list of what it did to its files.

Killed: all operations up to some moment are there, the last write perhaps in part. Power lost: names are there as of
the last fsync of their folder and then of some of the operations since; bytes as of the last fsync of their file and
then of some of the writes since, in any combination that `Disk.after_power_loss` lists.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Tree = dict[str, bytes | None]
"""Relative path -> bytes; None: a folder."""
_TORN = (1, 512, 4096)
"""Bytes of a write that a kill or a power cut may leave, besides half and all but one."""


@dataclass(frozen=True)
class Op:
    """One operation as faultio.c wrote it down: c(reate), t(runcate), w(rite), s(ync), r(ename), u(nlink), mk(d)ir."""

    kind: str
    path: tuple[str, ...]
    other: tuple[str, ...] = ()
    offset: int = 0
    data: bytes = b""


def read_log(log: Path, root: Path) -> list[Op]:
    """The operations below `root`, in order."""
    raw, at, ops = log.read_bytes(), 0, []

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return raw[at - size : at]

    def path() -> tuple[str, ...]:
        text = take(struct.unpack("<I", take(4))[0]).decode()
        return Path(text).relative_to(root).parts if text else ()

    while at < len(raw):
        kind, one, two = take(1).decode(), path(), path()
        offset, size = struct.unpack("<qQ", take(16))
        ops.append(Op(kind, one, two, offset, take(size)))
    return ops


@dataclass
class _File:
    """What one file holds: now, on disk for certain, and what was done between."""

    now: bytes = b""
    safe: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)

    def do(self, offset: int, data: bytes | None) -> None:
        self.now = _apply(self.now, offset, data)
        self.since.append((offset, data))

    def versions(self) -> Iterator[bytes]:
        """What may be on disk: nothing since the last fsync, zeros, all but one write, a part of the last."""
        if not self.since:
            return
        yield self.safe
        yield bytes(len(self.now))
        for left_out in range(len(self.since)):
            content = self.safe
            for number, done in enumerate(self.since):
                content = content if number == left_out else _apply(content, *done)
            yield content
        offset, data = self.since[-1]
        before = self.safe
        for done in self.since[:-1]:
            before = _apply(before, *done)
        for size in _parts(data):
            assert data is not None
            yield _apply(before, offset, data[:size])


def _apply(content: bytes, offset: int, data: bytes | None) -> bytes:
    if data is None:  # a truncation to `offset`
        return content[:offset].ljust(offset, b"\0")
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


def _parts(data: bytes | None) -> list[int]:
    size = len(data or b"")
    return sorted({part for part in (*_TORN, size // 2, size - 1) if 0 < part < size})


Entry = tuple[int, str]
"""A name in a folder, which is known by its number; 0 is the root."""


class Disk:
    """A disk that remembers what is certain. Files and folders are numbers; a folder's names are `Entry`s."""

    def __init__(self, root: Path) -> None:
        """Begins as the folder `root` is, all of it certain."""
        self._files: dict[int, _File] = {}
        self._count = 0
        self._names: dict[Entry, int] = {}
        for path in sorted(root.rglob("*")):
            content = path.read_bytes() if path.is_file() else None
            self._new(self._entry(path.relative_to(root).parts), content)
        self._safe_names = dict(self._names)
        self._pending: list[dict[Entry, int | None]] = []

    def do(self, op: Op) -> None:
        """Carry out `op`."""
        entry = self._entry(op.path) if op.path else (0, "")
        if op.kind == "c":
            self._change({entry: self._number(b"")})
        elif op.kind == "d":
            self._change({entry: self._number(None)})
        elif op.kind == "u":
            self._change({entry: None})
        elif op.kind == "r":
            self._change({entry: None, self._entry(op.other): self._names[entry]})
        elif op.kind == "s":
            self._sync(self._names[entry] if op.path else 0)
        else:
            self._files[self._names[entry]].do(op.offset, op.data if op.kind == "w" else None)

    def killed_before(self, op: Op) -> Iterator[Tree]:
        """What is there when the process is killed as it begins `op`, or in the middle of it."""
        now = {number: file.now for number, file in self._files.items()}
        yield self._tree(self._names, now)
        if op.kind == "w":
            number = self._names[self._entry(op.path)]
            for size in _parts(op.data):
                part = _apply(now[number], op.offset, op.data[:size])
                yield self._tree(self._names, {**now, number: part})

    def after_power_loss(self) -> Iterator[Tree]:
        """Every combination of names (none to all of the pending changes, and all but one) and of bytes."""
        contents = [{number: file.now for number, file in self._files.items()}]
        contents.append({number: file.safe for number, file in self._files.items()})
        for number, file in self._files.items():
            contents += [{**contents[0], number: version} for version in file.versions()]
        for names in self._possible_names():
            for content in contents:
                yield self._tree(names, content)

    def _possible_names(self) -> Iterator[dict[Entry, int]]:
        count = len(self._pending)
        chosen = [range(k) for k in range(count + 1)]
        for some in [*chosen, *([k for k in range(count) if k != left_out] for left_out in range(count - 1))]:
            names: dict[Entry, int | None] = dict(self._safe_names)
            for number in some:
                names.update(self._pending[number])
            yield {entry: target for entry, target in names.items() if target is not None}

    def _tree(self, names: dict[Entry, int], contents: dict[int, bytes]) -> Tree:
        below: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), target in names.items():
            below.setdefault(folder, []).append((name, target))
        tree: Tree = {}
        waiting = [("", 0)]
        while waiting:
            prefix, folder = waiting.pop()
            for name, target in below.get(folder, []):
                tree[prefix + name] = contents.get(target)
                if target not in contents:
                    waiting.append((f"{prefix}{name}/", target))
        return tree

    def _entry(self, path: tuple[str, ...]) -> Entry:
        folder = 0
        for name in path[:-1]:
            folder = self._names[folder, name]
        return folder, path[-1]

    def _new(self, entry: Entry, content: bytes | None) -> None:
        self._names[entry] = self._number(content)

    def _number(self, content: bytes | None) -> int:
        self._count += 1
        if content is not None:
            self._files[self._count] = _File(content, content)
        return self._count

    def _change(self, change: dict[Entry, int | None]) -> None:
        self._pending.append(change)
        for entry, target in change.items():
            if target is None:
                del self._names[entry]
            else:
                self._names[entry] = target

    def _sync(self, number: int) -> None:
        if number in self._files:
            file = self._files[number]
            file.safe, file.since = file.now, []
            return
        done = [change for change in self._pending if any(folder == number for folder, _ in change)]
        self._pending = [change for change in self._pending if change not in done]
        for change in done:
            for entry, target in change.items():
                if target is None:
                    self._safe_names.pop(entry, None)
                else:
                    self._safe_names[entry] = target


def crash_states(before: Path, ops: list[Op]) -> Iterator[tuple[int, str, Tree]]:
    """(operations done, "kill" | "power", what is there), each different tree once by model.

    Args:
        before: a copy of the folder as it was before the first of `ops`.
    """
    disk, seen = Disk(before), set()
    for number, op in enumerate([*ops, Op("s", ())]):
        for model, trees in (("kill", disk.killed_before(op)), ("power", disk.after_power_loss())):
            for tree in trees:
                key = (model, hash(tuple(sorted(tree.items()))))
                if key not in seen:
                    seen.add(key)
                    yield number, model, tree
        if number < len(ops):
            disk.do(op)


def write_tree(tree: Tree, root: Path) -> None:
    """Make the folder `root` hold just `tree`."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
