"""The feedback loop under an anchor: its batches, its signals, its alarms and its report."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import narcissus
from common.program import StopRequest
from corpus import Corpus
from stress import anchored_loop
from stress.anchored_loop import ORDINARY, SIGNALS, LoopJob, identity_of, run_loop
from stress.loop_report import limits, loop_tables
from stress.scenarios import Size, Stream, load_file
from stress.stress_options import parse_options

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ars"
SIZE = Size(layers=1, width=32, sequence_len=16, batch_size=4, steps=40)


@pytest.fixture(scope="module")
def corpus(text: Path) -> Corpus:
    return load_file(text, SIZE.sequence_len)


def run(corpus: Corpus, anchor: str = "none", share: float = 0.0) -> dict[str, Any]:
    torch.manual_seed(id(object()))  # nothing may depend on the global state
    return run_loop(LoopJob(anchor, share, 0, SIZE), StopRequest(), corpus)


def test_a_run_repeats_and_anchors_hold_it(corpus: Corpus) -> None:
    free = run(corpus)
    assert run(corpus) == free
    curves = free["curves"]
    assert free["identity"] == identity_of(LoopJob("none", 0.0, 0, SIZE), corpus)
    assert curves["times"] == [0, 5, 10, 15, 20]
    assert [len(curves[name]) for name in SIGNALS] == [20] * len(SIGNALS)
    # At the start nothing has moved, and what the model draws it knows as well as it draws it.
    assert [curves[name][0] for name in ("distance", "disagreement", "kept")] == [0, 0, 0]
    assert abs(curves["loss"][0] - curves["entropy"][0]) < 1.0
    for anchor in ("ewc", "kronecker"):
        held = run(corpus, anchor)["curves"]
        assert held["validation"][0] == curves["validation"][0]
        assert held["distance"][-1] < 0.9 * curves["distance"][-1]


def test_the_signals_are_what_they_are_said_to_be(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    watched = anchored_loop._Watched

    class Spy(watched):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, *others: Any) -> None:
            super().__init__(model, *others)
            models.append(self)

    monkeypatch.setattr(anchored_loop, "_Watched", Spy)
    run(corpus, share=ORDINARY)
    (spy,) = models
    inputs = torch.arange(32).view(2, 16)
    targets = inputs + 1
    with torch.no_grad():
        logits, before = spy._model(inputs), spy._start(inputs)
    found = spy.signals(40, inputs, logits, targets)
    now, start = (torch.distributions.Categorical(logits=x) for x in (logits, before))
    apart = torch.distributions.kl_divergence(start, now).mean() / math.log(2)
    assert found["disagreement"] == pytest.approx(float(apart), rel=1e-4)
    entropy = float(now.entropy().mean()) / math.log(2)
    assert found["entropy"] == pytest.approx(spy._reference - entropy, rel=1e-4)
    loss = -float(now.log_prob(targets).mean()) / math.log(2)
    assert found["loss"] == pytest.approx(spy._reference - loss, rel=1e-4)
    assert found["kept"] == pytest.approx(float(spy._kept_loss()) - spy._start_kept, abs=1e-6)
    importance = anchored_loop.fisher_of(spy._start.requires_grad_(True), [spy._fitted]).importance
    moved = dict(spy._model.named_parameters())
    squares = [
        (importance[name] * (moved[name] - value).square()).sum()
        for name, value in spy._start.named_parameters()
    ]
    expected = 0.5 * float(torch.stack(squares).sum().detach()) / 16 / math.log(2)
    assert found["distance"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.1, 8), (ORDINARY, 80)])
def test_a_share_of_the_batches_is_text(
    share: float, rows: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = anchored_loop._step

    def spied(optimizer: Any, logits: Any, targets: torch.Tensor, rate: float) -> float:
        seen.append(targets.clone())
        return step(optimizer, logits, targets, rate)

    monkeypatch.setattr(anchored_loop, "_step", spied)
    run(corpus, share=share)
    real = Stream("ordinary", 0, SIZE, corpus.train)
    texts = [real.training(index, None)[1] for index in range(SIZE.steps)]  # type: ignore[arg-type]
    same = [int((a == b).all(1).sum()) for a, b in zip(seen, texts, strict=True)]
    assert same[:20] == [4] * 20
    assert sum(same[20:]) == rows


def _records() -> dict[LoopJob, dict[str, Any]]:
    """Validation rises by 4 bits without an anchor; signals say so at steps of their own."""
    found = {}

    def add(anchor: str, share: float, seed: int, end: float, **signals: list[float]) -> None:
        quiet = {name: [0.0] * 20 for name in SIGNALS} | signals
        course = [3.0 + end * part for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
        curves = {**quiet, "times": [0, 5, 10, 15, 20], "validation": course}
        found[LoopJob(anchor, share, seed, SIZE)] = {"curves": curves}

    for seed in range(3):
        for anchor, end in (("none", 4.0), ("ewc", 0.3), ("kronecker", 0.2)):
            for share in (0.0, 0.01, 0.1):
                add(
                    anchor, share, seed, end, disagreement=[0.1 * step for step in range(20)],
                    kept=[0.0, 0.01, 0.01, 0.0] * 3 + [1.0] * 8, entropy=[0.0] * 10 + [9.0] * 10,
                )  # fmt: skip
        add("none", ORDINARY, seed, -0.5, distance=[0.0] * 15 + [0.9 * (seed == 2)] * 5)
    add("none", ORDINARY, 100, -0.5, disagreement=[0.3] * 20, entropy=[8.0] * 20)
    add("none", ORDINARY, 101, -0.5, disagreement=[0.2] * 20, distance=[0.4] * 20)
    return found


def test_limits_are_of_ordinary_training_on_other_seeds() -> None:
    assert limits(_records()) == pytest.approx(
        {"loss": 0.05, "entropy": 10.0, "distance": 0.5, "disagreement": 0.375, "kept": 0.05}
    )


def test_the_tables_say_what_is_lost_and_noticed() -> None:
    text = loop_tables(_records())
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert rows["no anchor"] == ["+4.00 ± 0.00"] * 3
    assert rows["Kronecker"][0] == "+0.20 ± 0.00"
    assert "Ordinary training for as long: -0.50 ± 0.00" in text
    assert rows["distance"][:4] == ["0.500", "1 of 3", "0 of 3", "0 of 3"]
    # Above 0.375 at step 4, so that a quarter is lost at the next measurement.
    assert rows["disagreement"][1:] == ["0 of 3", "3 of 3", "3 of 3", "25%", "25%", "4"]
    assert rows["kept"][1:] == ["0 of 3", "3 of 3", "0 of 3", "75%", "75%", "12"]
    assert rows["entropy"][1:] == ["0 of 3", "0 of 3", "0 of 3", "", "", ""]
    # A jump out of noise is what the controller brakes on, and a steady rise is not.
    assert rows["controller on kept"][2] == "3 of 3"
    assert rows["controller on disagreement"][2] == "0 of 3"


def test_the_whole_path(
    text: Path,
    own_folder: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("stress.scenarios.SIZES", {"tiny": SIZE})
    monkeypatch.setattr("stress.stress_options.SIZES", {"tiny": SIZE, "small": SIZE})
    out = Path("out")
    words = ["--anchor", "--quick", "--size", "tiny", "--data", str(text), "--out", str(out)]
    assert narcissus.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((out / "loop.md").read_text())
    assert (out / "loop.png").stat().st_size > 20_000
    files = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert {path.name for path in files} == {job.file for job in parse_options(words).loop_jobs}
    assert narcissus.main(words) == 0
    assert capsys.readouterr().out == printed
    assert files == {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}


def test_the_documentation_shows_the_tables_of_the_raw_results() -> None:
    content = json.loads((RESULTS / "loop.json").read_text())
    size = Size(**content["settings"]["size"])
    runs = {
        LoopJob(run["anchor"], run["share"], run["seed"], size): {"curves": run["curves"]}
        for run in content["runs"]
    }
    text = loop_tables(runs)
    document = (ROOT / "docs" / "ars.md").read_text()
    for part in text.split("\n\n"):
        if part.startswith("|"):
            assert part in document


def test_ten_seeds_are_reported_and_five_others_give_the_limits() -> None:
    jobs = parse_options(["--anchor"]).loop_jobs
    assert len(jobs) == len({job.file for job in jobs}) == 105
    others = [job for job in jobs if job.seed not in range(10)]
    assert {(job.anchor, job.share) for job in others} == {("none", ORDINARY)}
    assert {job.seed for job in others} == set(range(100, 105))
