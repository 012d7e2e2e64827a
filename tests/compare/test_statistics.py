"""Intervals of few seeds against published tables."""

from __future__ import annotations

import statistics

import pytest

from halfbyte.compare.statistics import difference, mean, student_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 30, 2.042),
        (0.95, 3, 2.353),
        (0.995, 5, 4.032),
    ],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, expected: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)


def test_mean_and_interval() -> None:
    values = [2.0, 2.2, 2.1]
    found = mean(values)
    assert found.value == pytest.approx(2.1)
    assert found.half_width == pytest.approx(4.3027 * statistics.stdev(values) / 3**0.5, rel=1e-4)
    assert mean([1.0]).half_width is None
    assert not mean([1.0]).real


def test_pairs_cancel_what_a_seed_does_to_both() -> None:
    """The seeds differ by 1, the variants by 0.1: only the paired difference shows it."""
    ours, reference = {0: 2.11, 1: 3.10, 2: 4.09, 3: 9.0}, {0: 2.0, 1: 3.0, 2: 4.0}
    found = difference(ours, reference)
    assert found is not None
    assert found.value == pytest.approx(0.1)
    assert found.real
    alone = mean([2.11, 3.10, 4.09]).half_width
    assert alone is not None
    assert alone > 2  # twenty times the difference
    assert difference({0: 1.0}, {1: 1.0}) is None
    same = difference({0: 1.0, 1: 2.0}, {0: 1.01, 1: 1.98})
    assert same is not None
    assert not same.real
