"""Panels or tiles: measured once, kept on disk, set by the environment, and the same within a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import halfbyte.kernels.crossover as crossover  # the package has no such name, it has the module's functions
from halfbyte.errors import ConfigError
from halfbyte.kernels import keep_to, panel, panel_rule
from halfbyte.kernels.registry import PANEL_ROWS_VARIABLE, cpu_choice


@pytest.fixture
def tiles() -> None:
    library = cpu_choice().library
    if library is None or not library.fused_linear:
        pytest.skip(f"no tiles: {cpu_choice().reason}")


@pytest.fixture
def unmeasured(tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing known, an empty cache folder, and a measurement of milliseconds; the cache file."""
    monkeypatch.setattr(crossover, "_chosen", {})
    monkeypatch.delenv(PANEL_ROWS_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(crossover, "OUT", 64)
    monkeypatch.setattr(crossover, "IN", 64)
    return tmp_path / "halfbyte/crossover.json"


def forget() -> None:
    crossover._chosen.clear()


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ({1024: 2.0, 256: 1.2, 64: 0.5}, 256),
        ({1024: 0.9}, None),
        ({1024: 1.09}, None),  # wins, but not clearly
        ({1024: 3.0, 256: 2.0, 64: 1.5}, 64),
        ({1024: 1.2, 256: 1.0, 64: 1.5}, 1024),
    ],
)
def test_the_least_size_from_which_on_panels_win(ratios: dict[int, float], least: int | None) -> None:
    assert crossover.least_rows({str(rows): ratio for rows, ratio in ratios.items()}) == least


def test_what_is_measured_says_who_wins(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels that take no time win at every size, tiles at the first; only then are fewer rows tried."""
    library = cpu_choice().library
    with monkeypatch.context() as patch:
        patch.setattr(panel, "linear", lambda *_: None)
        patch.setattr(panel, "linear_dx", lambda *_: None)
        ratios = crossover.measure(library)["float32"]
        assert list(ratios) == ["1024", "256", "64"]
        assert crossover.least_rows(ratios) == 64
    monkeypatch.setattr(crossover.GroupView, "linear", lambda *_: None)
    monkeypatch.setattr(crossover.GroupView, "linear_backward", lambda *_: None)
    ratios = crossover.measure(library)["float32"]
    assert list(ratios) == ["1024"]
    assert crossover.least_rows(ratios) is None


def test_measured_once_and_kept(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = panel_rule()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all("measured here now" in reason for reason in first.reasons.values())
    assert set(first.rows) == {"float32", "bfloat16"} if cpu_choice().library.fast_bf16 else {"float32"}
    assert unmeasured.exists()
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(crossover, "measure", lambda library: pytest.fail("measured again"))
        assert panel_rule().rows == first.rows
    assert all("measured here before" in reason for reason in panel_rule().reasons.values())
    forget()
    monkeypatch.setattr(crossover, "_processor", lambda: "another one")
    assert "measured here now" in panel_rule().explain(torch.float32)


@pytest.mark.parametrize("content", ["", "[1]", '{"here": {"float32": {"x": -1}}}', '{"here": {"float32": {"x": 1}}}'])
def test_a_file_that_makes_no_sense_is_written_anew(
    content: str, unmeasured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "_machine", lambda library: "here")
    unmeasured.parent.mkdir()
    unmeasured.write_text(content)
    assert "measured here now" in panel_rule().explain(torch.float32)
    forget()
    assert "measured here before" in panel_rule().explain(torch.float32)


def test_a_cache_that_cannot_be_written_is_no_error(unmeasured: Path) -> None:
    unmeasured.parent.write_text("a file where the folder should be")
    rule = panel_rule()
    assert "measured here now" in rule.explain(torch.float32)
    assert panel_rule() is rule


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("never", {"float32": None, "bfloat16": None}),
        ("bfloat16=64", {"float32": None, "bfloat16": 64}),
        ("bfloat16=64,float32=1024", {"float32": 1024, "bfloat16": 64}),
    ],
)
def test_the_environment_says_it(
    text: str, rows: dict[str, int | None], unmeasured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PANEL_ROWS_VARIABLE, text)
    assert panel_rule().rows == rows
    assert PANEL_ROWS_VARIABLE in panel_rule().explain(torch.float32)
    assert not unmeasured.exists()


@pytest.mark.parametrize("text", ["64", "float16=64", "bfloat16=", "bfloat16=-1", "float32=63"])
def test_a_setting_that_cannot_be_read(text: str, unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PANEL_ROWS_VARIABLE, text)
    with pytest.raises(ConfigError, match=PANEL_ROWS_VARIABLE):
        panel_rule()


def test_products_obey_the_rule_and_a_checkpoint_changes_it(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PANEL_ROWS_VARIABLE, "float32=70")
    served = []
    for name in ("linear", "linear_dx"):
        plain = getattr(panel, name)
        monkeypatch.setattr(panel, name, lambda *a, plain=plain, name=name: (served.append(name), plain(*a)))
    weight = torch.ops.halfbyte.quantize_4bit(torch.ones(64, 64), "nf4", 64)
    args = (*weight, None, 0.0, "nf4", 64)

    def in_panels(rows: int) -> list[str]:
        served.clear()
        x = torch.ones(rows, 64)
        torch.ops.halfbyte.linear_4bit(x, *args, 64, None)
        torch.ops.halfbyte.linear_4bit_dx(x, *args, 64)
        return list(served)

    assert in_panels(70) == ["linear", "linear_dx"]
    assert in_panels(69) == []
    assert keep_to({"float32": 70, "bfloat16": None}) == []
    (said,) = keep_to({"float32": 90, "bfloat16": None})
    assert "from 90 rows on (as the checkpoint's run)" in said
    assert in_panels(89) == []
    assert in_panels(90) == ["linear", "linear_dx"]
