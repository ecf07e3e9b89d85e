"""What all programs share: their beginning, estimates, intervals and tables."""

import math
import signal
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from program_helpers import Refused
from scipy import stats

from common.program import Begun, program
from common.statistics import Estimate, bootstrap_interval, share_interval
from common.tables import aligned, markdown


def test_what_a_program_imports_may_be_missing_but_nothing_of_its_own(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, default = "pandas", signal.getsignal(signal.SIGTERM)

    @program
    def main(argv: Sequence[str] | None) -> Begun:
        assert signal.getsignal(signal.SIGTERM) != default, "a signal meanwhile is one line too"
        monkeypatch.setitem(sys.modules, name, None)
        __import__(name)
        return None, lambda: None

    expected = "error: the module pandas is missing: pip install 'ars-triton[examples]'\n"
    assert refused(main, []) == expected
    name = "analysis"
    with pytest.raises(ModuleNotFoundError):
        main([])


def test_the_interval_is_students() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.error == pytest.approx(1 / 3**0.5)
    assert found.margin == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    alone = Estimate.of([5.0])
    assert (alone.mean, alone.interval, alone.margin) == (5.0, None, None)
    assert math.isnan(alone.error)


def test_an_estimate_of_two_seeds_is_not_known() -> None:
    assert Estimate.of([1.0, 2.0]).interval is not None
    assert Estimate.of([1.0, 2.0]).known is None
    assert Estimate.of([1.0, 2.0, 3.0]).known == Estimate.of([1.0, 2.0, 3.0]).interval


def test_an_estimate_in_words() -> None:
    found = Estimate.of([-1.0, -2.0, -3.0])
    assert f"{found:.1f}" == "-2.0 [-4.5, 0.5]"
    assert found.plus_minus("+.2f") == "-2.00 ± 2.48"
    assert (f"{Estimate.of([3.0]):.1f}", Estimate.of([3.0]).plus_minus("+.1f")) == ("3.0", "+3.0")


def test_wilson_interval_by_its_equation() -> None:
    """Its ends are the shares p whose score test just rejects the observed share."""
    for successes, count in ((0, 10), (1, 10), (5, 10), (10, 10)):
        for end in share_interval(successes, count):
            if 0 < end < 1:
                error = math.sqrt(end * (1 - end) / count)
                assert abs(successes / count - end) / error == pytest.approx(stats.norm.ppf(0.975))
    assert share_interval(0, 10)[0] == 0.0
    assert share_interval(10, 10)[1] == 1.0


def test_a_bootstrap_keeps_its_middle() -> None:
    draws = np.random.default_rng(0).permutation(1001).astype(float)
    assert bootstrap_interval(draws, 0.9) == pytest.approx((50.0, 950.0))


def test_tables() -> None:
    rows = [("arm", "x", "y"), ("grown", "1", "22")]
    assert markdown(rows) == "| arm | x | y |\n| --- | --- | --- |\n| grown | 1 | 22 |"
    assert markdown(rows, "lr").splitlines()[1] == "| --- | ---: | ---: |"
    assert markdown(rows, "rl", padded=True).splitlines() == [
        "|   arm | x   | y   |", "| ----: | --- | --- |", "| grown | 1   | 22  |",
    ]  # fmt: skip
    assert aligned(rows) == "arm    x   y\ngrown  1  22\n"
    with pytest.raises(ValueError, match="shorter"):
        markdown([("a", "b"), ("c",)])
