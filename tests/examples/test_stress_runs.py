"""A seeded miniature of each scenario, run by run, and what a record says of it."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ars.models import GPT
from common.errors import RunInterruptedError, UsageError
from common.output_folder import OutputFolder
from common.program import StopRequest
from corpus import Corpus
from stress import compared_optimizers, scenarios, stress_run
from stress.compared_optimizers import ARMS, BASE_RATES, Step, arm_settings
from stress.scenarios import EDGE_FACTOR, SCENARIOS, SIZES, Size, Stream, load_file
from stress.stress_run import Job, _recovery, _wasted, identity_of, run_all, run_job

SIZE = Size(layers=1, width=32, sequence_len=24, batch_size=4, steps=80)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(text: Path) -> Corpus:
    return load_file(text, SIZE.sequence_len)


def run(corpus: Corpus, scenario: str, arm: str, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(time.monotonic_ns())  # nothing may depend on the global state
    job = Job(scenario, arm, 1.0, 0, SIZE, tuple(changes.items()))
    return run_job(job, StopRequest(), corpus)


def test_beyond_the_edge_the_default_holds_what_adamw_loses(corpus: Corpus) -> None:
    longer = replace(SIZE, steps=120)  # with the history to know a relapse by
    lost, clipped, saved = (
        run_job(Job("edge", arm, 1.0, 0, longer), StopRequest(), corpus)
        for arm in ("adamw", "adamw-clip", "default")
    )
    assert lost["metrics"]["diverged"]
    assert clipped["metrics"]["diverged"]
    worst_lost, worst_clipped, worst_saved = (
        max(r["curves"]["validation"][10:]) for r in (lost, clipped, saved)
    )
    assert worst_saved < min(worst_lost, worst_clipped) / 1.5
    assert saved["metrics"]["final"] < min(r["metrics"]["final"] for r in (lost, clipped))
    assert saved["metrics"]["peak_norm"] < lost["metrics"]["peak_norm"] / 1.5
    gates = saved["curves"]["phi"]
    relapse = gates.index(0.1, 66)  # after a first alarm and an attempt to open
    assert gates[relapse - 1] > 0.2
    assert max(gates[relapse:]) < 0.3
    assert saved["metrics"]["mean_phi_before"] == 1.0
    assert saved["metrics"]["least_phi"] == pytest.approx(0.1, abs=0.01)
    assert lost["metrics"]["recovery"] == longer.steps // 2


def test_in_ordinary_training_the_default_is_adamw_up_to_rounding(corpus: Corpus) -> None:
    plain, gated = (run(corpus, "ordinary", arm) for arm in ("adamw-clip", "default"))
    assert gated["metrics"]["mean_phi"] == 1.0
    assert set(gated["curves"]["psi"]) == {1.0}
    assert gated["metrics"]["final"] == pytest.approx(
        run(corpus, "ordinary", "adamw")["metrics"]["final"], abs=0.01
    )
    assert not plain["metrics"]["diverged"]
    assert plain["metrics"]["final"] < plain["curves"]["validation"][0] - 1


def test_after_a_shift_the_gate_on_the_betas_recovers_sooner(corpus: Corpus) -> None:
    plain, braked = (run(corpus, "bytes", arm) for arm in ("adamw", "default-betas"))
    half = SIZE.steps // 2
    assert plain["curves"]["loss"][half] > plain["curves"]["loss"][half - 1] + 2
    assert braked["curves"]["phi"][half] < 0.2
    assert braked["metrics"]["final"] < plain["metrics"]["final"]


def test_reversed_text_is_a_shift_that_is_learnt(corpus: Corpus) -> None:
    record = run(corpus, "reversal", "adamw")
    loss, half = record["curves"]["loss"], SIZE.steps // 2
    assert loss[half] > loss[half - 1] + 0.5
    assert loss[-1] < loss[half] - 0.5
    assert 0 < record["metrics"]["recovery"] < half


def test_on_its_own_samples_the_loss_falls_and_the_validation_rises(corpus: Corpus) -> None:
    """The failure that no arm sees: the surprise is small."""
    record = run(corpus, "loop", "default")
    loss, metrics = record["curves"]["loss"], record["metrics"]
    assert loss[-1] < loss[SIZE.steps // 2 - 1]
    assert metrics["final"] > metrics["half"] + 0.25
    assert metrics["wasted"] >= SIZE.steps // 4
    assert metrics["mean_phi"] > 0.9


@pytest.mark.parametrize("arm", [arm for arm in ARMS if ARMS[arm].family != "adamw"])
def test_other_optimizers_learn(corpus: Corpus, arm: str) -> None:
    metrics = run(corpus, "ordinary", arm)["metrics"]
    assert metrics["final"] < 6
    assert metrics["mean_phi"] == 1.0


def test_a_record_repeats_bit_by_bit_and_is_json(corpus: Corpus) -> None:
    first = run(corpus, "loop", "paper", phi_min=0.5)
    assert run(corpus, "loop", "paper", phi_min=0.5) == first
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first["identity"]["update"]["controller"]["phi_min"] == 0.5
    assert first["metrics"]["least_phi"] >= 0.5


def test_a_run_that_blows_up_is_diverged_and_still_json(corpus: Corpus) -> None:
    job = Job("ordinary", "sgd", 1e30, 0, SIZE)
    record = run_job(job, StopRequest(), corpus)
    assert record["metrics"]["diverged"]
    assert record["metrics"]["final"] is None
    assert record["metrics"]["peak_norm"] is None
    assert record["metrics"]["wasted"] == SIZE.steps
    json.dumps(record, allow_nan=False)


def test_the_ablations_are_what_they_are_called() -> None:
    def controller_of(arm: str, **changes: Any) -> Any:
        return arm_settings(arm, changes)["controller"]

    paper = controller_of("paper")
    for arm, differences in {
        "paper-psi": {"phi_min": 1.0, "jitter": 0.0},
        "paper-psi-chi": {"phi_min": 1.0},
        "paper-psi-phi": {"jitter": 0.0},
        "paper-lr": {"gate": ("lr",)},
    }.items():
        assert controller_of(arm) == paper | differences
    assert controller_of("adamw") is None
    for arm in ("default", "sgd-default", "muon-default"):
        assert controller_of(arm, alpha=3.0) == controller_of("default") | {"alpha": 3.0}


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (compared_optimizers, "BASE_RATES", BASE_RATES | {"adamw": 0.02}),
        (compared_optimizers, "_WEIGHT_DECAY", 0.2),
        (compared_optimizers, "_MOMENTUM", 0.8),
        (compared_optimizers, "ARMS", ARMS | {"adamw": replace(ARMS["adamw"], clip=2.0)}),
        (compared_optimizers, "ARMS", ARMS | {"adamw": replace(ARMS["adamw"], factor=2.0)}),
        (
            compared_optimizers,
            "ARMS",
            ARMS | {"adamw": replace(ARMS["adamw"], betas=(0.5, 0.5))},
        ),
        (scenarios, "EDGE_FACTOR", 50.0),
        (scenarios, "_WARMUP", 0.2),
        (scenarios, "_PROMPT", 4),
        (scenarios, "_POOL", 4),
        (scenarios, "_POOL_STEPS", 10),
        (stress_run, "_POINTS", 10),
        (stress_run, "_WINDOWS", 32),
        (stress_run, "_CURVE_WINDOWS", 8),
        (stress_run, "DIVERGED_BY", 2.0),
        (stress_run, "RECOVERED_WITHIN", 0.5),
        (torch, "__version__", "0.0"),
    ],
)
def test_a_record_is_known_by_every_constant(
    module: Any, name: str, value: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("edge", "adamw", 1.0, 0, SIZE)
    before = identity_of(job, corpus)
    assert identity_of(job, corpus) == before
    monkeypatch.setattr(module, name, value)
    assert identity_of(job, corpus) != before


def test_rates_of_a_run(corpus: Corpus) -> None:
    stream = Stream("edge", 0, SIZE, corpus.train)
    assert stream.rate(0) == 1 / 8
    assert stream.rate(7) == stream.rate(39) == 1.0
    assert stream.rate(40) == stream.rate(79) == EDGE_FACTOR
    assert Stream("bytes", 0, SIZE, corpus.train).rate(60) == 1.0
    model = GPT(SIZE.model())
    for arm, factor in (("adamw", 1.0), ("adamw-low", 0.1), ("default", 1.0)):
        step = Step(arm, model, 3.0, {})
        (group,) = step.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(3.0 * factor * BASE_RATES["adamw"])
    assert [len(o.param_groups[0]["params"]) for o in Step("muon", model, 1.0, {}).optimizers] == [
        6, 2,
    ]  # fmt: skip


def test_shifts_change_the_text_as_they_say_and_only_from_half_way(corpus: Corpus) -> None:
    windows = torch.arange(10).reshape(2, 5)
    streams = {name: Stream(name, 0, SIZE, corpus.train) for name in SCENARIOS}
    for name, stream in streams.items():
        assert torch.equal(stream.shifted(windows, 39), windows), name
    assert torch.equal(streams["reversal"].shifted(windows, 40), windows.flip(1))
    permuted = streams["bytes"].shifted(torch.arange(256), 40)
    assert sorted(permuted.tolist()) == list(range(256))
    assert (permuted == torch.arange(256)).sum() < 10
    model = GPT(SIZE.model(), torch.Generator().manual_seed(0))
    plain = streams["ordinary"].training(40, model)
    for name in ("reversal", "bytes"):
        inputs, targets = streams[name].training(40, model)
        whole = torch.cat((inputs, targets[:, -1:]), 1)
        expected = streams[name].shifted(torch.cat((plain[0], plain[1][:, -1:]), 1), 40)
        assert torch.equal(whole, expected)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_pool_of_samples_begins_with_the_text_and_is_kept(corpus: Corpus) -> None:
    stream = Stream("loop", 0, SIZE, corpus.train)
    model = GPT(SIZE.model(), torch.Generator().manual_seed(0))
    texts = {bytes(row[:8].tolist()) for row in stream.training(0, model)[0]}
    pools = []
    for step in range(40, 80):
        inputs, _ = stream.training(step, model)
        pools.append({bytes(row.tolist()) for row in inputs})
    text = bytes(corpus.train.windows(torch.tensor([0]), len(corpus.train))[0].tolist())
    assert all(row[:8] in text for pool in pools for row in pool)
    assert texts
    assert len(set.union(*pools[:20])) <= 8
    assert len(set.union(*pools)) > 8


def test_recovery_and_waste_by_hand() -> None:
    times = [0, 10, 20, 30, 40]
    assert _recovery(times, [8, 3, 3.1, 3.2, 3.0], 3.0, 20, 40) == 0
    assert _recovery(times, [8, 3, 3.1, 3.5, 3.0], 3.0, 20, 40) == 20
    assert _recovery([0, 10, 20, 30], [3.0, 3.5, 3.2, 3.1], 3.0, 0, 30) == 20
    assert _recovery(times, [8, 3, 3.1, 3.0, 3.3], 3.0, 20, 40) == 20
    assert _recovery(times, [8, 3, 3.1, math.nan, 3.0], 3.0, 20, 40) == 20
    assert _wasted(times, [8, 5, 4, 3, 2], 40) == 0
    assert _wasted(times, [8, 5, 4, 3, 4.5], 40) == 20
    assert _wasted(times, [8, 5, 4, 3, math.nan], 40) == 40


def test_finished_runs_are_not_run_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Size(layers=1, width=32, sequence_len=24, batch_size=2, steps=4)
    jobs = [Job("ordinary", "default", 1.0, seed, short) for seed in range(3)]
    first = run_all(OutputFolder(tmp_path), jobs, corpus, 1, StopRequest())
    assert [record["identity"]["seed"] for record in first] == [0, 1, 2]
    (tmp_path / "runs" / jobs[1].file).write_text('{"identity": {"seed')  # as a full disk leaves it
    ran: list[int] = []

    def counted(job: Job, *rest: Any, **named: Any) -> dict[str, Any]:
        ran.append(job.seed)
        return run_job(job, *rest, **named)

    monkeypatch.setattr(stress_run, "run_job", counted)
    assert run_all(OutputFolder(tmp_path), jobs, corpus, 1, StopRequest()) == first
    assert ran == [1]
    changed = [Job("ordinary", "default", 1.0, 0, Size(1, 32, 24, 2, 6))]  # in the same file
    assert changed[0].file == jobs[0].file
    kept = (tmp_path / "runs" / jobs[0].file).read_bytes()
    with pytest.raises(UsageError, match=r"of other settings: size.steps 4 \(now 6\); repeat"):
        run_all(OutputFolder(tmp_path), changed, corpus, 1, StopRequest())
    assert ran == [1]
    assert (tmp_path / "runs" / jobs[0].file).read_bytes() == kept
    assert not list(tmp_path.rglob("*.tmp"))


def test_processes_leave_the_same_records(corpus: Corpus, tmp_path: Path) -> None:
    short = Size(layers=1, width=32, sequence_len=24, batch_size=2, steps=6)
    jobs = [Job("loop", arm, 1.0, 0, short) for arm in ("default", "sgd-default")]
    inline = run_all(OutputFolder(tmp_path / "a"), jobs, corpus, 1, StopRequest())
    assert run_all(OutputFolder(tmp_path / "b"), jobs, corpus, 2, StopRequest()) == inline


def test_a_signal_keeps_the_finished_runs(corpus: Corpus, tmp_path: Path) -> None:
    class After(StopRequest):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls > 6:
                raise RunInterruptedError(2)

    short = Size(layers=1, width=32, sequence_len=24, batch_size=2, steps=4)
    jobs = [Job("ordinary", "adamw", 1.0, seed, short) for seed in range(3)]
    with pytest.raises(RunInterruptedError):
        run_all(OutputFolder(tmp_path), jobs, corpus, 1, After())
    assert [path.name for path in tmp_path.rglob("*.*")] == ["adamw-x1-0.json"]


def test_sizes() -> None:
    counts = {name: GPT(size.model()).num_parameters() for name, size in SIZES.items()}
    assert 100_000 < counts["small"] < 200_000
    assert max(counts[name] for name in counts if SIZES[name].device == "cpu") < 3_000_000
