"""The comparison with peers: its command line, its measures by hand, its files, from end to end."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from program_helpers import Refused

import steady
from common.errors import UsageError
from common.program import StopRequest
from stress import steady_report, step_times
from stress.compared_optimizers import ARMS, PEER_ARMS
from stress.faults import FAULTS
from stress.networks import NETWORKS
from stress.scenarios import SIZES, Size, load_file
from stress.steady_options import COLUMNS, GRIDS, OURS, ROWS, ROWS_OF, parse_options, read_tuned
from stress.steady_report import beaten, choose, draw, measures, summarize, tables
from stress.stress_run import Job

SIZE = Size(1, 32, 24, 2, 40)  # half-way is step 20


pytestmark = pytest.mark.usefixtures("own_folder")


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--scenarios", "random-6"], "'random-6' is none of ordinary, random-1"),
        (["--arms", "sgd"], "'sgd' is none of adamw, adamw-clip"),
        (["--seeds", "0"], "'0' is not a whole number from 1"),
        (["--size", "huge"], "'huge' is not one of 'tiny'"),
        (["--networks", "rnn"], "'rnn' is none of gpt, lstm, conv"),
        (
            ["--networks", "lstm,conv", "--scenarios", "edge,entropy"],
            "--scenarios: entropy is not run with lstm, conv: add gpt to them",
        ),
        (["--tune", "--quick"], "--tune: takes neither --quick"),
        (["--tune", "--scenarios", "edge"], "--tune: takes neither --quick"),
        (["--tune", "--tuned", "tuning.json"], "--tune: takes neither --quick"),
        (["--tune", "--arms", "default"], "--tune has no grid for default; name adamw-clip"),
        (["--tuned", "missing.json"], "missing.json"),
        (["--data", "missing"], "--data missing does not exist"),
    ],
)
def test_mistakes_are_one_line(words: list[str], reason: str, refused: Refused) -> None:
    assert reason in refused(steady.main, words)


def test_the_gpu_size_needs_a_gpu(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--size gpu needs a CUDA device" in refused(steady.main, ["--size", "gpu"])


def core_minutes(jobs: Sequence[Job]) -> float:
    seconds = {"gpt": 3.2, "lstm": 1.0, "conv": 1.1}  # a run, as docs/steady.md has it
    return sum(seconds[job.network] for job in jobs) / 60


def test_what_is_run() -> None:
    options = parse_options([])
    jobs = options.jobs({"lstm": {"zclip": (("alpha", 0.9),)}})
    assert len(jobs) == len({job.file for job in jobs}) == (20 + 10 + 10) * len(COLUMNS) * 10
    assert core_minutes(jobs) < 160
    assert {job.seed for job in jobs} == set(range(10))
    tuned = [job for job in jobs if (job.network, job.arm) == ("lstm", "zclip")]
    assert {job.changes for job in tuned} == {(("alpha", 0.9),)}
    assert {job.changes for job in jobs if job not in tuned} == {()}
    of_rows = {(job.network, job.scenario) for job in jobs}
    assert of_rows == {(network, row) for network in NETWORKS for row in ROWS_OF[network]}
    assert not {"plain-attention", "entropy"} & {*ROWS_OF["lstm"], *ROWS_OF["conv"]}
    assert set(ROWS) == {"ordinary", "edge", *FAULTS}
    assert set(COLUMNS) == {"adamw", "adamw-clip", "default", *PEER_ARMS}
    words = ["--scenarios", "entropy", "--arms", "skip", "--seeds", "1"]
    some = parse_options(words).jobs({})
    assert {job.network for job in some} == {"gpt"}
    assert {(job.scenario, job.arm) for job in some} == {
        (row, arm)
        for row in ("ordinary", "plain-attention", "entropy")
        for arm in ("adamw", "skip")
    }


def test_what_is_tuned() -> None:
    options = parse_options(["--tune"])
    jobs = options.tuning_jobs
    assert len(jobs) == len({job.file for job in jobs}) == 26 * 3 * 8 * len(NETWORKS)
    assert core_minutes(jobs) < 60
    assert {job.network for job in jobs} == NETWORKS.keys()
    assert {job.seed for job in jobs} == set(range(100, 108))
    assert options.folder == Path("out/steady-tune")
    for arm, grid in GRIDS.items():
        tried = {job.changes for job in jobs if job.arm == arm}
        assert all(len(changes) == len(grid) <= 2 for changes in tried)
        assert 3 <= len(tried) <= 4


# ------------------------------------------------------------------------------- tuned settings

TUNED = {arm: {name: values[-1] for name, values in grid.items()} for arm, grid in GRIDS.items()}


def tuned_file(**changes: Any) -> Path:
    path = Path("tuning.json")
    chosen = {"gpt": {**TUNED, **changes}, "lstm": TUNED, "conv": TUNED}
    path.write_text(json.dumps({"chosen": chosen}))
    return path


def test_tuned_settings_are_read_and_the_clipped_default_takes_the_norm_of_its_peer() -> None:
    read = read_tuned(tuned_file(zclip={"threshold": 2.5, "alpha": 0.97}), ["lstm", "gpt"])
    assert read.keys() == {"lstm", "gpt"}
    assert read["gpt"]["zclip"] == (("threshold", 2.5), ("alpha", 0.97))
    tuned = read["lstm"]
    assert tuned["zclip"] == (("threshold", 2.0), ("alpha", 0.9))
    assert tuned["default-max-norm"] == tuned["adamw-clip"] == (("clip", 3.0),)
    assert tuned.keys() == {*GRIDS, "default-max-norm"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ours": {}}, r"tuning.json knows ours"),
        ({"zclip": {"threshold": 2.0}}, r"does not set threshold, alpha of zclip"),
        ({"zclip": {"threshold": 2.0, "alpha": 3.0}}, r"zclip: alpha must lie in \[0, 1\]"),
        ({"zclip": {"threshold": "2", "alpha": 0.9}}, r"zclip: '2' is not a number"),
        ({"adamw-clip": {"clip": 0.0}}, r"adamw-clip: clip must be above 0"),
        ({"skip": {"sigmas": 3.0, "window": 2}}, r"skip: window must lie in \[4, inf\]"),
        ({"zclip": 3}, r"tuning.json"),
    ],
)
def test_tuned_settings_that_are_wrong_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason + r"(.|\n)*give the tuning.json that --tune wrote"):
        read_tuned(tuned_file(**changes), NETWORKS)


def test_a_file_of_other_arms_is_refused() -> None:
    Path("tuning.json").write_text('{"chosen": {"gpt": {"zclip": {}}}}')
    with pytest.raises(UsageError, match="lacks adagc, adamw-clip"):
        read_tuned(Path("tuning.json"), ["gpt"])
    reason = r"no settings for lstm, conv: run --tune --networks gpt,lstm,conv again"
    with pytest.raises(UsageError, match=reason):
        read_tuned(Path("tuning.json"), NETWORKS)


def test_the_lowest_mean_of_the_scenarios_is_chosen() -> None:
    jobs, records = [], []
    finals = {
        (2.5, "ordinary"): [3.0, 3.2], (2.5, "rate-10"): [None, 3.0],  # 3.1 and 5.5
        (2.0, "ordinary"): [3.4, 3.4], (2.0, "rate-10"): [5.0, 5.0],  # 4.2
        (3.0, "ordinary"): [3.4, 3.4], (3.0, "rate-10"): [5.0, 5.0],  # the same, later
    }  # fmt: skip
    for (threshold, scenario), values in finals.items():
        for seed, value in enumerate(values):
            jobs.append(Job(scenario, "zclip", 1.0, seed, SIZE, (("threshold", threshold),)))
            records.append({"metrics": {"final": value}})
    rows = choose(jobs, records)
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert [row["score"] for row in rows] == pytest.approx([4.3, 4.2, 4.2])
    for at in (2, 3, 4, 5):  # of another network, the same settings are chosen for themselves
        jobs[at] = replace(jobs[at], network="lstm")
    assert [row["chosen"] for row in choose(jobs, records)].count(True) == 2
    assert rows[0]["finals"] == {"ordinary": [3.0, 3.2], "rate-10": [8.0, 3.0]}


# ------------------------------------------------------------------------------- measures


def record(job: Job, final: float | None, late: Sequence[float | None]) -> dict[str, Any]:
    validation = [8.0, 5.0, 4.0, *late]  # at 0, 10, 20, 30 and 40
    curves = {
        "times": [0, 10, 20, 30, 40], "validation": validation, "norm": [1.0] * 20 + [1.5] * 21,
    }  # fmt: skip
    identity = {"arm": job.arm, "scenario": job.scenario, "update": {}, "size": {"steps": 40}}
    return {"identity": identity, "metrics": {"final": final}, "curves": curves}


def runs(
    values: dict[tuple[str, str], Sequence[Any]], network: str = "gpt"
) -> tuple[list[Job], list[dict[str, Any]]]:
    """(scenario, arm) -> (final, late validation) of each seed."""
    jobs, records = [], []
    for (scenario, arm), seeds in values.items():
        for seed, (final, late) in enumerate(seeds):
            jobs.append(Job(scenario, arm, 1.0, seed, SIZE, network=network))
            records.append(record(jobs[-1], final, late))
    return jobs, records


EXAMPLE = {
    ("ordinary", "adamw"): [(3.0, [3.5, 3.0])] * 3,
    ("ordinary", "zclip"): [(3.1, [3.6, 3.1])] * 3,
    ("ordinary", "default"): [(3.0, [3.5, 3.0]), (3.03, [3.5, 3.0]), (3.0, [3.5, 3.0])],
    ("rate-10", "adamw"): [(9.0, [7.0, 9.0]), (None, [6.0, None]), (3.5, [3.9, 3.5])],
    ("rate-10", "zclip"): [(3.2, [3.65, 3.2]), (3.3, [3.9, 3.15]), (3.2, [3.6, 3.1])],
    ("rate-10", "default"): [(3.5, [3.9, 3.5]), (3.6, [3.9, 3.5]), (3.6, [3.9, 3.5])],
}


ORDINARY = {key: seeds for key, seeds in EXAMPLE.items() if key[0] == "ordinary"}
TIMES = {
    network: {arm: {"milliseconds": ms, "ratio": 1.5} for arm in ("adamw", "zclip", "default")}
    for network, ms in (("gpt", 12.0), ("conv", 3.0))
}


def test_a_network_is_held_against_itself_and_has_a_table_of_its_own() -> None:
    lower = {
        key: [(None if final is None else final - 1, late) for final, late in seeds]
        for key, seeds in EXAMPLE.items()
        if key[0] == "ordinary" or key[1] != "zclip"  # the peer that is better is not there
    }
    lower["rate-10", "zclip"] = [(5.0, [5.0, 5.0])] * 3
    (jobs, records), others = runs(EXAMPLE), runs(lower, "conv")
    frame = measures([*others[0], *jobs], [*others[1], *records])
    of = frame.set_index(["network", "scenario", "arm", "seed"])
    assert of.loc[("conv", "rate-10", "zclip", 0), "above_own"] == pytest.approx(5.0 - 2.1)
    assert of.loc[("conv", "rate-10", "zclip", 0), "above_adamw"] == pytest.approx(5.0 - 2.0)
    assert of.loc[("gpt", "rate-10", "zclip", 0), "above_own"] == pytest.approx(0.1)
    text = tables(frame, TIMES)
    grids = text.split("### When")[0]
    assert "| rate x 10 | 3.5/2 | 0.23 | 0.57 |" in grids.split("**convolutions**")[0]
    assert "| rate x 10 | 4.2/2 | 3.0/3 | 0.57 |" in grids.split("**convolutions**")[1]
    assert "| convolutions | default | 2.010 ± 0.043 | +0.50 ± 2.15 | 3.0 | 1.50 |" in text
    assert [found[:4] for found in beaten(frame)] == [("gpt", "default", "rate-10", "zclip")]
    assert [row["network"] for row in summarize(frame)] == ["gpt"] * 6 + ["conv"] * 6


def test_measures_by_hand() -> None:
    frame = measures(*runs(EXAMPLE)).set_index(["scenario", "arm", "seed"]).sort_index()
    lost = frame.loc["rate-10", "adamw"]
    assert lost["final"].tolist() == [8.0, 8.0, 3.5]  # guessing costs no more
    assert lost["above_own"].tolist() == [5.0, 5.0, 0.5]
    assert lost["lost"].tolist() == [True, True, False]
    assert lost["peak_loss"].tolist() == [8.0, 8.0, 3.9]
    assert lost["peak_norm"].tolist() == [1.5, 1.5, 1.5]
    assert lost["recovered"].tolist() == [20, 20, 20]
    clipped = frame.loc["rate-10", "zclip"]
    assert clipped["above_own"].tolist() == pytest.approx([0.1, 0.2, 0.1])
    assert clipped["above_adamw"].tolist() == pytest.approx([0.2, 0.3, 0.2])
    # Within 0.1 of its own at 30 and 40; not at 30; at both.
    assert clipped["recovered"].tolist() == [0, 20, 0]
    plain = frame.loc["ordinary"]
    assert (plain["above_own"] == 0).all()
    assert (plain["recovered"] == 0).all()


def test_a_fault_from_the_start_is_seen_from_the_start() -> None:
    jobs, records = runs({
        ("ordinary", "adamw"): [(3.0, [3.5, 3.0])], ("no-warmup", "adamw"): [(3.0, [3.5, 3.0])],
    })  # fmt: skip
    records[1]["curves"]["validation"] = [8.0, 7.5, 4.0, 3.5, 3.0]
    records[1]["curves"]["norm"][3] = 9.0
    late = measures(jobs, records).set_index("scenario").loc["no-warmup"]
    assert (late["peak_loss"], late["peak_norm"], late["recovered"]) == (7.5, 9.0, 20)


def test_entropy_is_held_against_a_model_without_the_norm() -> None:
    frame = measures(*runs({
        ("ordinary", "adamw"): [(3.0, [3.5, 3.0])],
        ("plain-attention", "adamw"): [(3.4, [3.5, 3.4])],
        ("entropy", "adamw"): [(3.5, [3.5, 3.5])],
    })).set_index("scenario")  # fmt: skip
    assert frame["above_own"].tolist() == pytest.approx([0.0, 0.4, 0.1])


def test_a_peer_that_is_better_by_more_than_its_interval_is_named() -> None:
    frame = measures(*runs(EXAMPLE))
    ((network, ours, row, peer, estimate),) = beaten(frame)
    assert (network, ours, row, peer) == ("gpt", "default", "rate-10", "zclip")
    assert estimate.values == pytest.approx((0.3, 0.3, 0.4))
    noisy = dict(EXAMPLE)
    noisy["rate-10", "zclip"] = [(3.2, [3.6, 3.2]), (3.7, [3.6, 3.2]), (3.2, [3.6, 3.2])]
    assert beaten(measures(*runs(noisy))) == []
    two = {key: values[:2] for key, values in EXAMPLE.items()}
    assert beaten(measures(*runs(two))) == []  # too few seeds


def test_tables_say_it_all() -> None:
    frame = measures(*runs(EXAMPLE))
    text = tables(frame, TIMES)
    assert "| fault | AdamW | ZClip | ours |" in text
    assert "| nothing happens | 0.00 | 0.10 | 0.01 |" in text
    assert "| rate x 10 | 3.5/2 | 0.23 | 0.57 |" in text
    assert "| GPT | default | 3.010 ± 0.043 | +0.33 ± 1.43 | 12.0 | 1.50 |" in text
    assert "| GPT | ours | rate x 10 | ZClip | 0.333 ± 0.143 |" in text
    long = (
        "| GPT | rate x 10 | AdamW | 2 [21%, 94%] | +3.500 ± 6.454 | +3.500 ± 6.454 | 6.63 ± 5.88 |"
    )
    assert f"{long} 1.50 ± 0.00 | 20 ± 0 |" in text
    one = {key: values[:1] for key, values in EXAMPLE.items()}
    assert "Too few seeds to say" in tables(measures(*runs(one)), TIMES)
    assert all(len(line) <= 120 for line in text.split("### Every measure")[0].splitlines())


def test_the_whole_table_fits_a_page() -> None:
    values: dict[tuple[str, str], Any] = {}
    for arm in COLUMNS:
        for row in ("swapped-50", "plain-attention", "entropy"):
            values[row, arm] = [(3.75, [3.8, 3.8])] * 10
        values["ordinary", arm] = [(3.0, [3.5, 3.0])] * 10
        values["edge", arm] = [(9.0, [8.0, 9.0])] * 10
    times = {"gpt": {arm: {"milliseconds": 12.0, "ratio": 1.5} for arm in COLUMNS}}
    text = tables(measures(*runs(values)), times)
    assert "| no QK-norm, x 10 | 0.00 |" in text
    assert "| rate x 100 | 5.0/10 | 5.0/10 |" in text
    shown = text.split("### Every measure")[0]
    assert all(len(line) <= 120 for line in shown.splitlines())


def test_the_picture_has_a_cell_for_each_fault_and_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(steady_report.plt, "close", kept.append)
        (jobs, records), others = runs(EXAMPLE), runs(ORDINARY, "lstm")
        draw(Path("steady.png"), measures([*jobs, *others[0]], [*records, *others[1]]))
    (figure,) = kept
    axes, below = figure.axes[:2]
    assert [text.get_text() for text in below.texts] == ["0.00", "0.10", "0.01"]
    assert [each.get_ylabel() for each in (axes, below)] == ["GPT", "LSTM"]
    assert [text.get_text() for text in axes.texts] == [
        "0.00", "0.10", "0.01", "3.5/2", "0.23", "0.57",
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "nothing happens",
        "rate x 10",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["AdamW", "ZClip", "default"]
    shown = axes.images[0].get_array()
    assert shown[1, 0] == pytest.approx(3.5)
    assert shown[0, 0] == pytest.approx(0.03)
    assert Path("steady.png").stat().st_size > 5000
    plt.close(figure)


def test_a_norm_that_is_not_finite_is_said() -> None:
    jobs, records = runs(EXAMPLE)
    for each in records:
        if each["identity"]["arm"] == "adamw":
            each["curves"]["norm"][-1] = None
    (row,) = [
        row
        for row in summarize(measures(jobs, records))
        if (row["scenario"], row["arm"]) == ("rate-10", "adamw")
    ]
    assert row["peak_norm"] is None
    json.dumps(row, allow_nan=False)
    assert "| not finite |" in tables(measures(jobs, records), TIMES)


# ------------------------------------------------------------------------------- times


def test_times_are_ratios_of_the_same_round_and_are_kept(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load_file(text, SIZE.sequence_len)
    now = [0.0]

    class Slow:
        """Every step of AdamW takes as long as its round is late; the other one twice as long."""

        def __init__(self, name: str, *_: Any) -> None:
            self.factor, self.calls = (1.0 if name == "adamw" else 2.0), 0

        def __call__(self, loss: torch.Tensor, factor: float) -> None:
            self.calls += 1
            now[0] += self.factor * self.calls

    monkeypatch.setattr(step_times, "Step", Slow)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])
    arms: dict[str, Any] = {"adamw": (), "zclip": (("alpha", 0.9),)}
    path = Path("times.json")
    times = step_times.kept_times(path, arms, "conv", SIZE, corpus, 3, StopRequest())
    assert times["zclip"] == {"milliseconds": pytest.approx(14e3), "ratio": pytest.approx(2.0)}
    assert times["adamw"] == {"milliseconds": pytest.approx(7e3), "ratio": 1.0}
    written = path.read_bytes()
    again = step_times.kept_times(path, arms, "conv", SIZE, corpus, 3, StopRequest())
    assert (again, path.read_bytes()) == (times, written)
    step_times.kept_times(path, {"adamw": (), "zclip": ()}, "conv", SIZE, corpus, 3, StopRequest())
    assert path.read_bytes() != written
    written = path.read_bytes()
    step_times.kept_times(path, {"adamw": (), "zclip": ()}, "gpt", SIZE, corpus, 3, StopRequest())
    assert path.read_bytes() != written
    path.write_text("{")
    with pytest.raises(UsageError, match=r"times\.json(.|\n)*delete it: times are measured again"):
        step_times.kept_times(path, arms, "conv", SIZE, corpus, 3, StopRequest())


# ------------------------------------------------------------------------------- end to end


def test_quick_from_end_to_end_and_again(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], steps=12))
    path = tuned_file()
    words = ["--quick", "--data", str(text), "--tuned", str(path)]
    assert steady.main(words) == 0
    first = capsys.readouterr().out
    assert "### What each fault costs" in first
    out = Path("out/steady-quick")
    assert sorted(each.name for each in out.iterdir()) == [
        "runs", "runs.csv", "steady.json", "steady.png", "tables.md", "times-conv.json",
        "times-gpt.json", "times-lstm.json",
    ]  # fmt: skip
    content = json.loads((out / "steady.json").read_text())
    assert len(content["rows"]) == (4 + 2 + 2) * 6
    assert content["networks"]["lstm"]["rate"] == 3.0
    assert content["arms"]["zclip"]["settings"]["threshold"] == 2.0
    assert content["arms"]["default-max-norm"]["clip"] == 3.0
    assert content["faults"].keys() == {"random-5", "rate-10", "lost-moments"}
    assert (out / "tables.md").read_text() in first
    with open(out / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 48
    plain = [line for line in lines if line["scenario"] == "ordinary" and line["arm"] == "default"]
    assert len(plain) == 3
    assert all(abs(float(line["above_adamw"])) < 0.01 for line in plain)
    stamps = {each: each.stat().st_mtime_ns for each in (out / "runs").rglob("*.json")}
    assert len(stamps) == 48
    assert steady.main(words) == 0
    assert capsys.readouterr().out == first
    assert stamps == {each: each.stat().st_mtime_ns for each in (out / "runs").rglob("*.json")}


def test_tuning_from_end_to_end(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], steps=8))
    words = ["--tune", "--networks", "conv", "--size", "tiny", "--seeds", "1"]
    words += ["--data", str(text)]
    assert steady.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("chosen") == len(GRIDS)
    content = json.loads(Path("out/steady-tune/tuning.json").read_text())
    assert (content["seeds"], len(content["rows"])) == ([100], 26)
    read = read_tuned(Path("out/steady-tune/tuning.json"), ["conv"])
    assert read["conv"].keys() == {*GRIDS, "default-max-norm"}


def test_arms_have_titles_of_their_own() -> None:
    titles = [arm.title for arm in (ARMS | PEER_ARMS).values()]
    assert len(titles) == len(set(titles))
    assert set(OURS) < set(COLUMNS)
