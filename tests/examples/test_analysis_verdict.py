"""What may be said of two arms."""

from pathlib import Path

import pytest
from analysis_records import entry, two_arms, write

from analysis.records import Record, read_metrics
from analysis.verdict import compare_arms, headlines, is_sweep, mean_interval


def records(tmp_path: Path, gains: list[float]) -> list[Record]:
    return read_metrics([
        write(tmp_path / f"{seed}.json", two_arms(seed, gain)) for seed, gain in enumerate(gains)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("gains", "conclusion"),
    [
        ([0.1], "too few seeds"),
        ([0.1, 0.1001], "too few seeds"),
        ([0.1, 0.11, 0.12], "better"),
        ([-0.1, -0.11, -0.12], "worse"),
        ([0.1, -0.09, 0.02], "no difference shown"),
    ],
)
def test_conclusions(tmp_path: Path, gains: list[float], conclusion: str) -> None:
    found = compare_arms(records(tmp_path, gains))
    assert [(c.arm, c.depth, c.seeds) for c in found] == [
        ("inherited", 3, len(gains)), ("inherited", 4, len(gains)),
    ]  # fmt: skip
    for comparison in found:
        assert comparison.conclusion == conclusion
        assert comparison.difference == pytest.approx(-sum(gains) / len(gains))
        assert (comparison.interval is None) == (len(gains) == 1)
        assert comparison.flops_ratio == 1.0


def test_an_arm_with_more_operations_is_not_compared(tmp_path: Path) -> None:
    runs = [two_arms(seed, 0.1 + 0.01 * seed) for seed in range(3)]
    for run in runs:
        run[1]["lineage_flops"] = int(1.03 * run[1]["lineage_flops"])
    paths = [write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)]
    first, second = compare_arms(read_metrics(paths))
    assert (first.conclusion, second.conclusion) == ("budgets differ", "better")


def test_depths_without_a_counterpart_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.json", [entry("d2-scratch", 3.0), entry("d3-grown", 2, "d2-scratch")]
    )
    assert compare_arms(read_metrics([path])) == []


def test_the_interval_is_students() -> None:
    mean, interval = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert mean_interval([5.0]) == (5.0, None)


def test_a_sweep_is_not_compared(tmp_path: Path) -> None:
    again = {**entry("d3-inherited", 2.0, "d2-scratch"), "name": "d3-again"}
    found = read_metrics([write(tmp_path / "m.json", [*two_arms(), again])])
    assert is_sweep([r for r in found if r.arm == "inherited"])
    assert not is_sweep([r for r in found if r.arm == "scratch"])
    assert compare_arms(found) == []


def test_headlines_say_first_what_was_not_gained(tmp_path: Path) -> None:
    assert headlines([]) == [
        "There is nothing to compare: no two arms trained a model of the same depth."
    ]
    for gains, start in (
        ([0.1, 0.11, 0.12], "inherited against scratch: fewer bits"),
        ([0.1, -0.09, 0.02], "No benefit shown. inherited against scratch: no difference"),
        ([-0.1, -0.11, -0.12], "No benefit shown. inherited against scratch: more bits"),
        ([0.1], "Nothing is shown either way. inherited against scratch: no conclusion"),
    ):
        (line,) = headlines(compare_arms(records(tmp_path, gains)))
        assert line.startswith(start)
        assert line.endswith(" at d3, d4.")
