"""The runs of this user, in a small SQLite file: what each was asked, how far it came, and how it ended."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from halfbyte.report.chart import highest, thinned
from halfbyte.report.log import read_log
from halfbyte.report.run import RunReport

VERSION = 1
PATIENCE = 3.0
"""Seconds for another process to be done with the file."""
RUNNING, CRASHED = "running", "crashed"
_SCHEMA = """
create table if not exists runs (
    id integer primary key autoincrement, output text not null, title text not null, started real not null,
    ended real, state text not null, error text not null default '', host text not null, pid integer not null,
    born real not null, config text not null, figures text not null, curves text not null
) strict
"""
_COLUMNS = "id, output, title, started, ended, state, error, host, pid, born, config, figures, curves"


class StoreError(Exception):
    """The file cannot be used, in a line."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A run as it is kept.

    Attributes:
        output: its folder, absolute.
        started, ended: seconds since 1970.
        state: finished, interrupted, failed, running or crashed (its process is gone without a word).
        figures: step, steps, train_loss, eval_loss_before, eval_loss, tokens_per_s, peak_memory,
            predicted_peak_memory, seconds; None where not known.
        curves: by name (loss, held_out, memory) its points.
    """

    id: int
    output: str
    title: str
    started: float
    ended: float | None
    state: str
    error: str
    config: dict[str, dict[str, Any]]
    figures: dict[str, Any]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For --json, without the curves."""
        own = {name: getattr(self, name) for name in ("id", "state", "title", "output", "started", "ended", "error")}
        return {**own, **self.figures}


class Runs:
    """The file at `path`; each call opens it, does one thing, and leaves it on disk.

    Raises:
        StoreError: all methods do, where it cannot be read or written in `PATIENCE` seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, run: RunReport, output: Path) -> int:
        """Note that `run` begins in this process; its number. Whoever ran in its folder before has ended."""
        process = psutil.Process()
        with self._open(write=True) as base:
            before = f"select {_COLUMNS} from runs where output = ? and state = ?"
            for row in base.execute(before, (str(output), RUNNING)).fetchall():
                self._settle(base, row)
            values = (
                str(output), run.title, run.started, RUNNING, socket.gethostname(), process.pid, process.create_time(),
                json.dumps(run.config), json.dumps(_figures(run)), "{}",
            )  # fmt: skip
            columns = "output, title, started, state, host, pid, born, config, figures, curves"
            done = base.execute(f"insert into runs ({columns}) values ({', '.join('?' * len(values))})", values)
            assert done.lastrowid is not None
            return done.lastrowid

    def end(self, number: int, run: RunReport, state: str, error: str = "") -> None:
        """Note how it ended."""
        curves = {"loss": thinned(run.loss), "held_out": list(run.held_out), "memory": thinned(run.memory, highest)}
        with self._open(write=True) as base:
            ended = (state, error, time.time(), *map(json.dumps, (run.config, _figures(run), curves)), number)
            columns = "state = ?, error = ?, ended = ?, config = ?, figures = ?, curves = ?"
            base.execute(f"update runs set {columns} where id = ?", ended)

    def all(self) -> list[Kept]:
        """All runs, the newest first; none where there is no file."""
        if not self._path.exists():
            return []
        with self._open(write=False) as base:
            rows = base.execute(f"select {_COLUMNS} from runs order by id desc").fetchall()
        found, seen = [], set[str]()
        for row in rows:
            found.append(_kept(row, newest=row[1] not in seen))
            seen.add(row[1])
        return found

    def _settle(self, base: sqlite3.Connection, row: Sequence[Any]) -> None:
        """Keep what a run that is gone left in its log, which the next one may rewrite."""
        kept = _kept(row, newest=True)
        base.execute(
            "update runs set state = ?, figures = ?, curves = ? where id = ?",
            (CRASHED, json.dumps(kept.figures), json.dumps(kept.curves), kept.id),
        )

    @contextmanager
    def _open(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        try:
            if write:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            mode = "rwc" if write else "ro"
            where = f"{self._path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(where, uri=True, timeout=PATIENCE)) as base, base:
                version = base.execute("pragma user_version").fetchone()[0]
                if version > VERSION:
                    raise StoreError(f"{self._path}: written by a newer halfbyte (format {version})")
                if write and version < VERSION:
                    base.execute(_SCHEMA)
                    base.execute(f"pragma user_version = {VERSION}")
                yield base
        except (sqlite3.Error, OSError, ValueError) as error:
            raise StoreError(f"{self._path}: {error}") from None


def _figures(run: RunReport) -> dict[str, Any]:
    held_out = dict(run.held_out)
    return {
        "step": run.step, "steps": run.steps, "train_loss": run.train_loss, "eval_loss_before": held_out.get(0),
        "eval_loss": run.held_out[-1][1] if run.held_out and run.held_out[-1][0] else None,
        "tokens_per_s": run.tokens_per_s, "peak_memory": run.peak or None,
        "predicted_peak_memory": run.plan.peak_memory if run.plan else None, "seconds": run.seconds,
    }  # fmt: skip


def _kept(row: Sequence[Any], *, newest: bool) -> Kept:
    """A row; of one that is not done, what its log says, where no later run has written it."""
    number, output, title, started, ended, state, error, host, pid, born, config, figures, curves = row
    if state == RUNNING and host == socket.gethostname() and not _lives(pid, born):
        state = CRASHED
    kept = Kept(
        id=number, output=output, title=title, started=started, ended=ended, state=state, error=error,
        config=json.loads(config), figures=json.loads(figures), curves=json.loads(curves),
    )  # fmt: skip
    if ended is not None or kept.curves or not newest:
        return kept
    try:
        log = read_log(Path(output) / "metrics.jsonl")
    except OSError:
        return kept
    steps = [line for line in log if line.get("event") == "step"]
    evals = [(line["step"], line["eval_loss"]) for line in log if line.get("event") == "eval"]
    loss = thinned([(line["step"], line["loss"]) for line in steps])
    kept.curves.update(loss=[[*point] for point in loss], held_out=[[*point] for point in evals])
    if steps:
        kept.figures.update(step=steps[-1]["step"], steps=steps[-1]["steps"], seconds=log[-1]["time"] - started)
    last = evals[-1][1] if evals and evals[-1][0] else None
    kept.figures.update(eval_loss_before=dict(evals).get(0), eval_loss=last)
    return kept


def _lives(pid: int, born: float) -> bool:
    """Whether the process that was born then is there; another may have its number."""
    if pid == os.getpid():
        return True
    try:
        return bool(abs(psutil.Process(pid).create_time() - born) < 1)
    except psutil.Error:
        return False
