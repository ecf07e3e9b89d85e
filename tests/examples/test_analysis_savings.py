"""Operations to a loss, worked out by hand."""

from pathlib import Path

import pytest
from analysis_records import two_arms, write

from analysis.records import Log, Record, read_metrics
from analysis.savings import find_savings, flops_to_reach


def curve(*points: tuple[float, float | None]) -> Log:
    return [{"flops": flops, "val_bpb": bpb} for flops, bpb in points]


def test_the_first_crossing_is_interpolated_in_log_flops() -> None:
    log = curve((0, 8.0), (1e10, 4.0), (3e10, None), (1e12, 2.0), (1e13, 2.5), (1e14, 1.0))
    assert flops_to_reach(log, 4.0) == 1e10
    assert flops_to_reach(log, 3.0) == pytest.approx(1e11)
    assert flops_to_reach(log, 2.0) == pytest.approx(1e12)
    assert flops_to_reach(log, 1.25) == pytest.approx(10**13.8333333, rel=1e-6)
    assert flops_to_reach(log, 0.9) is None
    assert flops_to_reach(log, 5.0) == 1e10, "before the first measurement nothing is known"
    assert flops_to_reach([], 5.0) is None


def runs(tmp_path: Path, seeds: int) -> list[Record]:
    return read_metrics([write(tmp_path / f"{i}.json", two_arms(i)) for i in range(seeds)])


# d3: the lineage has 6e9 operations in either arm; of the inherited model's, 3e9 are its own
# training and 1e8 its Fisher pass.
SCRATCH = curve((1e9, 5.0), (6e9, 3.0))


def test_ratios_with_and_without_parents(tmp_path: Path) -> None:
    records = runs(tmp_path, 2)
    logs = {}
    for seed, reached in enumerate((4.5e9, 4.8e9)):
        logs["d3-scratch", seed] = SCRATCH
        logs["d3-inherited", seed] = curve((3e9, 4.0), (reached, 3.0), (6e9, 2.9))
    (saving,) = find_savings(records, logs)
    assert (saving.arm, saving.depth, saving.seeds, saving.reached) == ("inherited", 3, 2, 2)
    assert saving.with_parents == pytest.approx((0.75 + 0.8) / 2)
    assert saving.without_parents == pytest.approx((1.6 / 6 + 1.9 / 6) / 2)
    for interval, middle in (
        (saving.with_parents_interval, saving.with_parents),
        (saving.without_parents_interval, saving.without_parents),
    ):
        assert interval is not None
        assert interval[1] - interval[0] == pytest.approx(2 * 12.7062 * 0.025, rel=1e-4)
        assert sum(interval) / 2 == pytest.approx(middle)


def test_a_loss_that_is_not_reached_gives_no_ratio(tmp_path: Path) -> None:
    records = runs(tmp_path, 2)
    logs = {("d3-scratch", seed): SCRATCH for seed in (0, 1)}
    logs["d3-inherited", 0] = curve((3e9, 4.0), (6e9, 2.9))
    logs["d3-inherited", 1] = curve((3e9, 4.0), (6e9, 3.1))
    (saving,) = find_savings(records, logs)
    assert (saving.seeds, saving.reached) == (2, 1)
    assert saving.with_parents is saving.without_parents is saving.with_parents_interval is None


def test_a_parent_that_is_better_already_costs_its_fisher_pass_only(tmp_path: Path) -> None:
    logs = {("d3-scratch", 0): SCRATCH, ("d3-inherited", 0): curve((3e9, 2.5), (6e9, 2.0))}
    (saving,) = find_savings(runs(tmp_path, 1), logs)
    assert (saving.with_parents, saving.without_parents) == (0.5, pytest.approx(1 / 60))
    assert saving.with_parents_interval is None


def test_without_both_logs_nothing_is_said(tmp_path: Path) -> None:
    records = runs(tmp_path, 1)
    assert find_savings(records, {}) == []
    assert find_savings(records, {("d3-scratch", 0): SCRATCH}) == []
    silent = {("d3-scratch", 0): curve((6e9, None)), ("d3-inherited", 0): SCRATCH}
    assert find_savings(records, silent) == []
    again = find_savings(records, {("d3-scratch", 0): SCRATCH, ("d3-inherited", 0): SCRATCH})
    assert [s.depth for s in again] == [3]
