"""Settings that were tried: strengths of the penalties on a grid, and sweeps of one."""

import json
import math
from pathlib import Path

import pytest
from analysis_records import chain_of, entry, write

from analysis.records import read_metrics
from analysis.report_figures import grid_map, sweep_curves
from analysis.sweeps import Grid, Sweep, find_grid


def grid_of(tmp_path: Path, losses: dict[str, list[float]]) -> Grid | None:
    """Losses of each arm by seed, at d3."""
    paths = []
    for seed in range(max(map(len, losses.values()))):
        records = [entry("d2-scratch", 3.0, seed=seed), entry("d3-scratch", 2.5, seed=seed)]
        for arm, values in losses.items():
            if seed < len(values):
                records += chain_of(arm, "scratch", [values[seed]], seed)
        paths.append(write(tmp_path / f"{seed}.json", records))
    return find_grid(read_metrics(paths))


def test_every_pair_is_held_against_plain_growing_by_seed(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, {
        "grown": [2.4, 2.3],
        "grown+ewc=0.5": [2.41, 2.29],
        "grown+subspace=0.05": [2.42, 2.33],
        "grown+ewc=0.5+subspace=0.05": [2.38, 2.29],
        "grown+ewc=10+subspace=0.05": [2.9, 2.8],
        "grown+ewc": [1.0, 1.0],  # a strength that is not named is no point of a grid
        "grown+ewc=0.5+ars": [1.0, 1.0],
        "grown+distill=0.1": [1.0, 1.0],
    })  # fmt: skip
    assert grid is not None
    found = {(c.ewc, c.subspace): c for c in grid.cells}
    assert set(found) == {(0.5, None), (None, 0.05), (0.5, 0.05), (10.0, 0.05)}
    assert found[0.5, None].difference.values == pytest.approx((0.01, -0.01))
    assert found[10.0, 0.05].difference.mean == pytest.approx(0.5)
    assert [key for key, cell in found.items() if cell.proposed] == [(0.5, 0.05)]
    assert (grid.depth, grid.parent_depth, grid.seeds) == (3, 2, 2)
    assert grid.baseline == pytest.approx(2.35)
    assert grid.ranked[0] is found[0.5, 0.05]
    assert grid.sentence == (
        "A search, not a test: 2 seeds. Of 4 pairs, 1 end below plain growing in every seed and 2 "
        "above it; the best, lambda 0.5 and gamma 0.05, differs by -0.0150 bits per byte."
    )
    assert grid.to_dict()["cells"][0]["difference"]["mean"] == pytest.approx(0.0)


def test_three_seeds_can_show_a_benefit_or_none(tmp_path: Path) -> None:
    plain = [2.4, 2.3, 2.35]
    gain = [value - 0.1 - 0.001 * i for i, value in enumerate(plain)]
    noise = [value + d for value, d in zip(plain, (0.1, -0.1, -0.001), strict=True)]
    grid = grid_of(tmp_path, {"grown": plain, "grown+ewc=1": gain, "grown+ewc=2": noise})
    assert grid is not None
    assert grid.sentence.startswith(
        "Better by their own intervals: 1, by chance 0.1. Of 2 pairs, 1"
    )
    grid = grid_of(tmp_path, {"grown": plain, "grown+ewc=1": noise, "grown+ewc=2": noise})
    assert grid is not None
    assert grid.sentence.startswith("No benefit shown. Of 2 pairs, 0 end below")


def test_a_pair_that_diverged_in_a_seed_is_not_the_best_of_the_others(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, {
        "grown": [2.4, 2.3, 2.35],
        "grown+ewc=1": [2.2, math.nan, 2.1],
        "grown+ewc=2": [2.41, 2.32, 2.36],
    })  # fmt: skip
    assert grid is not None
    assert [cell.ewc for cell in grid.ranked] == [2.0]
    assert grid.sentence == (
        "No benefit shown. Of 2 pairs, 0 end below plain growing in every seed and 1 above it; the "
        "best, lambda 2, differs by +0.0133 bits per byte. 1 diverged in some seed."
    )
    content = json.loads(json.dumps(grid.to_dict(), allow_nan=False))
    assert [cell["difference"] is None for cell in content["cells"]] == [True, False]
    assert grid_map(grid).startswith(b"\x89PNG")
    bad = [math.nan] * 3
    grid = grid_of(tmp_path, {"grown": [2.4] * 3, "grown+ewc=1": bad, "grown+ewc=2": bad})
    assert grid is not None
    assert grid.sentence == "No benefit shown. Of 2 pairs, 2 diverged in some seed."
    assert grid_map(grid).startswith(b"\x89PNG")
    assert grid_of(tmp_path, {"grown": bad, "grown+ewc=1": bad, "grown+ewc=2": bad}) is None


def test_two_strengths_are_the_least(tmp_path: Path) -> None:
    assert grid_of(tmp_path, {"grown": [2.4], "grown+ewc=1": [2.3]}) is None
    assert grid_of(tmp_path, {"grown+ewc=1": [2.4], "grown+ewc=2": [2.3]}) is None
    assert grid_of(tmp_path, {"grown": [2.4], "grown+ewc": [2.3], "grown+distill": [2.2]}) is None


def test_the_map_is_drawn_where_nothing_differs(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, {"grown": [2.4], "grown+ewc=1": [2.4], "grown+subspace=2": [2.4]})
    assert grid is not None
    assert grid_map(grid).startswith(b"\x89PNG")


def test_the_best_of_a_sweep_and_its_edges() -> None:
    sweep = Sweep.of("rate", 2, {3e-3: [2.0, 2.2], 1e-3: [2.4, 2.4], 1e-2: [2.1, 2.2]})
    assert (sweep.values, sweep.best, sweep.at_edge) == ((1e-3, 3e-3, 1e-2), 3e-3, False)
    assert sweep.to_dict()["val_bpb"] == pytest.approx([2.4, 2.1, 2.15])
    assert sweep.to_dict()["seeds"] == 2
    for losses in ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0)):
        edge = Sweep.of("rate", 2, {k: [v] for k, v in zip((1, 2, 3), losses, strict=True)})
        assert edge.at_edge
    assert sweep_curves([sweep]).startswith(b"\x89PNG")
