"""The driver of the experiment on series of seconds: what has results is not trained again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import RunInterruptedError, UsageError
from experiment import experiment_run
from experiment.experiment_run import Options, run_experiment
from experiment.series_design import DESIGNS, Job, jobs_of
from experiment.series_results import records_of

pytestmark = pytest.mark.slow

QUICK = DESIGNS["quick"]
SMALL = replace(
    QUICK,
    base=replace(
        QUICK.base, depths=("1x8", "2x8"), ratio=0.7, batch_size=2, sequence_len=16,
        eval_windows=4, curve_windows=2,
    ),
    subsets={},
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DESIGNS, "quick", SMALL)
        yield


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment that is finished."""
    out = tmp_path_factory.mktemp("done")
    run_experiment(options(out, text))
    return out


def options(out: Path, text: Path, **changes: Any) -> Options:
    return Options(**{"out": out, "data": str(text), "design": "quick", **changes})


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results/quick.json").read_text())
    for account in found["accounts"].values():
        account.pop("seconds")
        for member in account["members"]:
            member.pop("seconds")
    return found


def test_the_saving_is_that_of_the_records(done: Path) -> None:
    found = summary(done)
    saving = found["saving"]["adamw"]
    account = found["accounts"]["adamw"]
    assert [member["size"] for member in account["members"]] == ["1x8", "2x8"]
    records = {
        record["name"]: record
        for job in jobs_of("miniature", SMALL)
        for record in json.loads(records_of(job.name, done / "results").read_text())
    }
    twins, ours = ([records[f"{size}-{arm}"] for size in ("1x8", "2x8")]
                   for arm in ("scratch", "grown"))  # fmt: skip
    paid = sum(record["flops"] + record["growth_flops"] for record in ours)
    assert saving["mean"] == pytest.approx(1 - paid / sum(twin["flops"] for twin in twins))
    assert saving["worse"] == sum(
        mine["val_bpb"] > twin["val_bpb"] for mine, twin in zip(ours, twins, strict=True)
    )
    assert (saving["seeds"], saving["low"]) == (1, None)


def test_nothing_is_trained_twice_and_the_records_are_enough(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_run, "run_jobs", lambda *_, **__: pytest.fail("trains"))
    elsewhere = Options(out=tmp_path / "out", results=done / "results", design="quick")
    before = summary(done)
    run_experiment(elsewhere)
    run_experiment(replace(elsewhere, stage=("none",)))
    assert summary(done) == before


def test_a_stopped_experiment_goes_on_to_the_same_results(
    done: Path, text: Path, tmp_path: Path
) -> None:
    stopped = options(tmp_path, text, minutes=0.05)
    with pytest.raises(RunInterruptedError):
        run_experiment(stopped)
    run_experiment(replace(stopped, minutes=None))
    assert summary(tmp_path) == summary(done)


def test_records_of_other_settings_are_refused(
    done: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(SMALL, base=replace(SMALL.base, lr=1e-3))
    monkeypatch.setitem(DESIGNS, "quick", changed)
    with pytest.raises(UsageError, match="other settings: delete its folder to train again"):
        run_experiment(options(tmp_path, text, results=done / "results"))


def test_the_last_words_of_a_run_that_fails_are_told(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stage: str, design: Any) -> tuple[Job, ...]:
        job = jobs_of("miniature", design)[0]
        machine = replace(job.machine, device="cuda:99")
        return (replace(job, machine=machine),) if stage == "miniature" else ()

    monkeypatch.setattr(experiment_run, "jobs_of", broken)
    with pytest.raises(UsageError, match="miniature/chain-of-2-seed-2"):
        run_experiment(options(tmp_path, text))
