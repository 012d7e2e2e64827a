"""A run whose embeddings and head are in int8: it learns, lives anywhere, and says what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.cli.common import console, open_model
from halfbyte.config import QuantConfig, RunConfig
from halfbyte.errors import ConfigError
from halfbyte.train import train

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def test_it_learns_and_is_recorded(make_run: Callable[..., RunConfig], eval_file: Path) -> None:
    run = make_run("int8", quant__embeddings="int8", train__save_every=3, data__eval=str(eval_file))
    plain = make_run("plain", data__eval=str(eval_file))
    result, other = train(run), train(plain)
    assert result.eval_loss is not None
    assert other.eval_loss is not None
    assert result.eval_loss < 0.9 * result.eval_loss_before  # type: ignore[operator]
    assert 0 < abs(result.eval_loss - other.eval_loss) < 1e-3 * other.eval_loss  # measured: 6e-5
    as_stored = replace(run, quant=QuantConfig())
    with pytest.raises(ConfigError, match=r"quant\.embeddings 'int8' -> 'as_stored'"):
        train(as_stored)
    for config, notes in ((run, 0), (as_stored, 1)):
        said = open_model(config, Path(result.adapter), console())[3]
        assert len([note for note in said if "trained with quant.embeddings=int8" in note]) == notes
