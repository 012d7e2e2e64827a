"""Samples given as objects become files of the run, so that it can be resumed, hashed and done again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, DataError
from halfbyte.train.ranks import ALONE, Ranks

Samples = Iterable[Mapping[str, Any]]
"""Records as docs/data.md has them: a list of dicts, a `datasets.Dataset`."""


def with_samples(
    config: RunConfig, samples: Samples | None, eval_samples: Samples | None, ranks: Ranks = ALONE
) -> RunConfig:
    """`config` on the samples, written as JSON lines into train.output.

    Raises:
        ConfigError: there are samples and a file of them, no train.output, or several ranks, of which one must write.
        DataError: a sample is no mapping, or has a value that JSON has no word for.
    """
    if samples is not None:
        config = replace(config, data=replace(config.data, train=_file_of(samples, "train", config, ranks)))
    if eval_samples is not None:
        config = replace(config, data=replace(config.data, eval=_file_of(eval_samples, "eval", config, ranks)))
    return config


def _file_of(samples: Samples, name: str, config: RunConfig, ranks: Ranks) -> str:
    where = f"data.{name}"
    if getattr(config.data, name):
        raise ConfigError("samples and a file of them were given", where=where, fix="Give one of them")
    if not config.train.output:
        raise ConfigError("there is no folder for the samples", where="train.output", fix="Set train.output")
    if ranks.world > 1:
        raise ConfigError("samples cannot be objects under torchrun", where=where, fix="Write them to a file first")
    path = Path(config.train.output) / f"{name}.jsonl"
    write_file(path, b"".join(_lines(samples, where)))
    return str(path)


def _lines(rows: Samples, where: str) -> Iterator[bytes]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError("not a sample", where=f"{where}:{number}", why=f"it is of type {type(row).__name__}")
        try:  # a table has all columns in every row: what is null in one is left out
            yield json.dumps({key: value for key, value in row.items() if value is not None}).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError("a sample that JSON has no word for", where=f"{where}:{number}", why=str(error)) from None
