"""Figures in TensorBoard and W&B, read back with their own libraries."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import RunConfig, load_config
from halfbyte.errors import ResourceError
from halfbyte.report.log import read_log
from halfbyte.train import train
from halfbyte.train.trackers import HELD_OUT, trackers

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture
def run(tiny_llama: Path, chat_file: Path, eval_file: Path, tmp_path: Path) -> RunConfig:
    return load_config(
        model__path=str(tiny_llama), data__train=str(chat_file), data__eval=str(eval_file), lora__r=2,
        train__output=str(tmp_path / "run"), train__steps=4, train__save_every=2, data__max_seq_len=96,
    )  # fmt: skip


def with_log(run: RunConfig, **log: Any) -> RunConfig:
    return replace(run, log=replace(run.log, **log))


def logged(output: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(output / "metrics.jsonl") if line["event"] == "step"}


def test_tensorboard_has_every_step_once(run: RunConfig, tmp_path: Path) -> None:
    """Also of a run that goes on, which takes back what was written beyond its checkpoint."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard")
    run = with_log(run, tensorboard=True)
    train(replace(run, train=replace(run.train, steps=2)))
    train(run)
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx(logged(tmp_path / "run"))
    assert sorted(losses) == [1, 2, 3, 4]
    assert [event.step for event in found.Scalars(HELD_OUT)] == [0, 2, 4]
    assert all(event.value > 0 for event in found.Scalars("memory/bytes"))


class Listener:
    """Counts who connects: what stands in for the network."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.calls: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(2)
            self.calls.append(connection.recv(1000))
            connection.close()

    def close(self) -> None:
        self._socket.close()


def records(data: bytes) -> Iterator[bytes]:
    """Of a .wandb file: a head of 7 bytes, then LevelDB's log format: blocks of 32 KB, records whole or in parts."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def said(file: Path) -> tuple[dict[int, float], dict[int, float], dict[str, str]]:
    """Training and held-out losses by step, and the settings as JSON."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses, held_out, config = {}, {}, {}
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in row:
            losses[int(row["_step"])] = float(row["train/loss"])
        if HELD_OUT in row:
            held_out[int(row["_step"])] = float(row[HELD_OUT])
        config.update({item.key: item.value_json for item in record.run.config.update})
    return losses, held_out, config


def test_wandb_offline_keeps_to_the_disk(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb")
    network = Listener()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, network.url)
    train(with_log(run, wandb="offline"))
    network.close()
    assert network.calls == []
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    wanted = logged(tmp_path / "run")
    losses, held_out, config = said(file)
    deadline = time.monotonic() + 30
    while len(losses) < len(wanted) and time.monotonic() < deadline:  # W&B's own process writes the last of it
        time.sleep(0.2)
        losses, held_out, config = said(file)
    assert losses == pytest.approx(wanted)
    assert sorted(held_out) == [0, 4]
    assert '"r":2' in config["lora"].replace(" ", "")


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb", "offline")])
def test_a_package_that_is_missing(
    run: RunConfig, key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.train.trackers.find_spec", lambda name: None)
    with (
        pytest.raises(ResourceError, match=rf"log\.{key}: the package {key} is not installed"),
        trackers(with_log(run, **{key: value}).log, tmp_path),
    ):
        pass
