"""The one interpolation, by hand."""

import math

import pytest

from analysis.equal_loss import ABOVE, AT_MOST, Bounded, equal_share, mean_of

FALLING = [(0.1, 2.4), (0.2, 2.2), (0.4, 2.0)]


@pytest.mark.parametrize(
    ("points", "level", "found"),
    [
        (FALLING, 2.3, Bounded(math.sqrt(0.1 * 0.2))),  # half of the way is the geometric mean
        (FALLING, 2.05, Bounded(0.2 * 2**0.75)),
        (FALLING[::-1], 2.05, Bounded(0.2 * 2**0.75)),  # in any order
        (FALLING, 2.2, Bounded(0.2)),
        (FALLING, 2.4, Bounded(0.1)),
        (FALLING, 2.0, Bounded(0.4)),
        (FALLING, 2.41, Bounded(0.1, AT_MOST)),
        (FALLING, 1.99, Bounded(0.4, ABOVE)),
        # A curve that rises again: the last crossing, behind which all is at or below.
        ([(0.1, 2.0), (0.2, 2.2), (0.4, 2.0)], 2.1, Bounded(0.2 * math.sqrt(2))),
        ([(0.1, 2.4), (0.2, 2.0), (0.3, 2.3), (0.4, 2.1)], 2.2, Bounded(math.sqrt(0.3 * 0.4))),
        ([(0.1, 2.0), (0.4, 2.3)], 2.2, Bounded(0.4, ABOVE)),
        # A flat piece at the level is reached where it begins.
        ([(0.1, 2.4), (0.2, 2.0), (0.4, 2.0)], 2.0, Bounded(0.2)),
        # A branch that diverged is above every level.
        ([(0.1, math.nan), (0.2, 2.2), (0.4, 2.0)], 2.3, Bounded(0.2, AT_MOST)),
        ([(0.1, 2.4), (0.2, 2.2), (0.4, math.inf)], 2.3, Bounded(0.4, ABOVE)),
        ([(1.0, 2.5)], 2.5, Bounded(1.0)),
    ],
)
def test_where_a_level_is_reached(
    points: list[tuple[float, float]], level: float, found: Bounded
) -> None:
    crossing = equal_share(points, level)
    assert (crossing.value, crossing.bound) == (pytest.approx(found.value, rel=1e-12), found.bound)
    assert crossing.interval is None


def test_a_table_of_two_members() -> None:
    shares = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    d5 = zip(shares, (1.919, 1.856, 1.810, 1.770, 1.740, 1.726), strict=True)
    d6 = zip(shares, (1.638, 1.618, 1.599, 1.579, 1.556, 1.543), strict=True)
    assert f"{equal_share(list(d5), 1.800):.2f}" == "0.52"
    assert f"{equal_share(list(d6), 1.603):.2f}" == "0.48"


@pytest.mark.parametrize(
    ("points", "level", "words"),
    [
        ([], 2.0, "there must be branches"),
        ([(0.0, 2.0)], 2.0, "positive shares"),
        ([(math.inf, 2.0)], 2.0, "positive shares"),
        ([(0.2, 2.0), (0.2, 2.1)], 2.0, "twice"),
        (FALLING, math.nan, "the level must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    points: list[tuple[float, float]], level: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        equal_share(points, level)


def test_a_mean_is_no_surer_than_its_seeds() -> None:
    exact = mean_of([Bounded(0.2), Bounded(0.3), Bounded(0.4)])
    assert exact is not None
    assert f"{exact:.2f}" == "0.30 [0.05, 0.55]"
    assert f"{mean_of([Bounded(0.2)]):.2f}" == "0.20"
    low = mean_of([Bounded(0.2, AT_MOST), Bounded(0.4)])
    assert low == Bounded(pytest.approx(0.3), AT_MOST)
    assert mean_of([Bounded(0.4, ABOVE), Bounded(0.2, AT_MOST)]) is None
