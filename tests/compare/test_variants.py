"""Names and settings of what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.cli.compare import compare as command
from halfbyte.compare.cells import variant_run
from halfbyte.compare.variants import BUILT_IN, chosen
from halfbyte.config import load_config, settings_of
from halfbyte.errors import ConfigError


def test_names_and_own_settings() -> None:
    found = chosen("16bit, nf4", ["hot:optim.lr=1e-3,lora.target_modules=q_proj,v_proj,lora.r=8", "as-set"])
    assert [variant.name for variant in found] == ["16bit", "nf4", "hot", "as-set"]
    assert found[2].settings == ("optim.lr=1e-3", "lora.target_modules=q_proj,v_proj", "lora.r=8")
    run = variant_run(load_config(None, ["train.steps=7", "data.train=d.jsonl"]), found[2])
    assert (run.optim.lr, run.lora.r, run.train.steps) == (1e-3, 8, 7)
    assert run.lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        ("nf4,fp5", [], "unknown variant 'fp5'.*Did you mean"), ("nf4,nf4", [], "'nf4' is there twice"),
        ("nf4", [], "takes two variants"), ("nf4,fp4", ["../x:lora.r=8"], "cannot name a variant"),
        ("nf4,fp4", ["a:train.seed=3"], "sets train.seed, which compare sets itself"),
        ("nf4,fp4", ["nf4:lora.r=8"], "cannot name a variant"), ("nf4,fp4", ["a:lora"], "cannot read 'lora'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(names: str, own: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(names, own)


def test_a_run_survives_as_settings() -> None:
    run = load_config(None, [
        "model.path=2024", "data.train=a b.jsonl", "optim.betas=[0.8, 0.9]", "quant.skip_modules=q_proj,k_proj",
        "data.packing=false", "memory.budget=2GB", "train.micro_batch_size=3",
    ])  # fmt: skip
    assert load_config(None, settings_of(run)) == run
    assert settings_of(load_config()) == []


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_settings_are_valid(name: str) -> None:
    run = variant_run(load_config(None, ["data.train=train.jsonl"]), BUILT_IN[name])
    assert run.quant.calibrate == ("train.jsonl" if "calibrated" in name or "start" in name else "")


def test_help_and_page_name_every_variant() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    for name in BUILT_IN:
        assert name in str(command.__doc__)
        assert f"`{name}`" in page
