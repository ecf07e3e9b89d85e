"""Which laws an arm of a series can have."""

import json
from pathlib import Path
from typing import Any

import pytest
from analysis_records import DEMO, entry, two_arms, write

from analysis.laws import ChinchillaLaw, ComputeLaw, HoldOut
from analysis.records import read_metrics
from analysis.scaling import ScalingLawValidator
from analysis.series_laws import ArmLaws, fit_series

VALIDATOR = ScalingLawValidator(bootstraps=10)


def laws(path: Path) -> dict[str, ArmLaws]:
    found = fit_series(read_metrics([path]), VALIDATOR)
    for arm in found:
        assert json.dumps(arm.to_dict(), allow_nan=False)
    return {arm.arm: arm for arm in found}


def test_the_committed_demo_is_too_small_for_any_law() -> None:
    found = laws(DEMO)
    assert "3 runs at 3 different (N, D) cannot determine the five parameters" in str(
        found["scratch"].chinchilla
    )
    assert "3 runs at 3 budgets" in str(found["scratch"].compute)
    assert "0 of 3 budgets" in str(found["scratch"].isoflop)
    assert all(isinstance(arm.chinchilla, str) for arm in found.values())
    assert found["scratch"].to_dict()["compute"] == {"refused": found["scratch"].compute}


def test_grown_models_have_a_law_in_their_lineages_compute_only(tmp_path: Path) -> None:
    records = two_arms()
    for depth in (5, 6, 7):
        records.append(entry(f"d{depth}-grown", 0, f"d{depth - 1}-grown"))
    for record in records:
        record["val_bpb"] = 1.1 + 300 * record["lineage_flops"] ** -0.25
    found = laws(write(tmp_path / "m.json", records))["grown"]
    assert "were grown" in str(found.chinchilla)
    assert "were grown" in str(found.chinchilla_score)
    assert "were grown" in str(found.isoflop)
    assert isinstance(found.compute, ComputeLaw)
    assert isinstance(found.compute_score, HoldOut)
    assert (found.compute.E, found.compute.gamma) == pytest.approx((1.1, 0.25), rel=1e-3)
    assert found.compute_score.rms_relative_error < 1e-6


def test_a_sweep_has_a_law_in_n_and_d(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for depth in (2, 3, 4, 5):
        for i, tokens in enumerate((10**6, 10**7, 10**8)):
            params = 10**5 * depth**3
            bpb = 0.9 + 30 * params**-0.3 + 60 * tokens**-0.28
            record = {
                **entry(f"d{depth}-sweep", bpb),
                "params": params,
                "tokens": tokens,
                "lineage_tokens": tokens,
            }
            flops = 6 * params * tokens
            records.append({**record, "name": f"s{depth}-{i}", "flops": flops})
            records[-1]["lineage_flops"] = flops
    found = laws(write(tmp_path / "m.json", records))["sweep"]
    assert isinstance(found.chinchilla, ChinchillaLaw)
    assert (found.chinchilla.alpha, found.chinchilla.beta) == pytest.approx((0.3, 0.28), rel=1e-3)
    assert isinstance(found.chinchilla_score, HoldOut)
    optimum = found.to_dict()["chinchilla"]["optimum"]
    assert optimum["flops"] == 6 * 10**5 * 5**3 * 10**8, "of the largest model and token count"
    assert 6 * optimum["params"] * optimum["tokens"] == pytest.approx(optimum["flops"])
    assert optimum["params_interval"][0] <= optimum["params"] <= optimum["params_interval"][1]
    assert found.to_dict()["chinchilla"]["intervals"].keys() >= {"alpha", "beta", "E", "a"}
