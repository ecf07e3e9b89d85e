"""Continued training: its methods, its measures and its command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from program_helpers import Refused

import protect
from common.program import StopRequest
from corpus import prepare_corpus
from protection import second_training
from protection.low_rank import add_low_rank
from protection.methods import METHODS, PLAIN, merged
from protection.protect_options import parse_options
from protection.protect_results import curves_of, lost_at, markdown_table
from protection.second_training import BASE, Run, Settings, Texts, run_method, train_first

SETTINGS = Settings(
    layers=1, width=16, sequence_len=16, batch_size=4, first_tokens=3.0, second_tokens=1.0,
    fisher_samples=40, windows=16,
)  # fmt: skip
TINY = ["--quick", "--width", "16", "--first-tokens", "0.5", "--second-tokens", "0.3"]


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts of words of their own letters."""
    folder, found = tmp_path_factory.mktemp("texts"), []
    for name, first in (("first", 97), ("second", 110)):
        generator = torch.Generator().manual_seed(first)
        words = [
            bytes(torch.randint(first, first + 12, (4,), generator=generator).tolist())
            for _ in range(12)
        ]
        picks = torch.randint(0, 12, (3000,), generator=generator).tolist()
        path = folder / f"{name}.txt"
        path.write_bytes(b" ".join(words[i] for i in picks))
        found.append(path)
    return found[0], found[1]


@pytest.fixture(scope="module")
def texts(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Texts:
    cache = tmp_path_factory.mktemp("tokens")
    first, second = (
        prepare_corpus(str(path), cache=cache / path.stem, sequence_len=16) for path in sources
    )
    return first, second


@pytest.fixture(scope="module")
def base(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    models = tmp_path_factory.mktemp("models")
    return models, train_first(Run(BASE, 0.0, 0), StopRequest(), SETTINGS, texts, models)


def point(name: str, strength: float, texts: Texts, models: Path) -> dict[str, float]:
    record = run_method(Run(name, strength, 0), StopRequest(), SETTINGS, texts, models)
    (found,) = record["points"]
    assert found["strength"] == strength
    return {text: found[text] for text in ("first", "second")}


def test_plain_training_learns_the_second_text_and_forgets_the_first(
    base: tuple[Path, dict[str, Any]],
) -> None:
    before, (after,) = base[1]["before"], base[1]["points"]
    assert after["second"] < before["second"] - 0.5
    assert after["first"] > before["first"] + 0.1


def test_no_strength_is_plain_training_bit_for_bit(
    base: tuple[Path, dict[str, Any]], texts: Texts
) -> None:
    models, record = base
    for name in ("l2", "ewc", "ewc-proximal", "kronecker", "subspace", "replay", "own-samples"):
        assert point(name, 0.0, texts, models) == record["points"][0], name
    assert point("rate", 1.0, texts, models) == record["points"][0]
    assert point("rate", 0.0, texts, models) == record["before"]


@pytest.mark.parametrize(
    "name",
    [name for name, m in METHODS.items() if m.kind not in ("merge", "rank") and m.samples is None],
)
def test_every_method_keeps_more_of_the_first_text(
    name: str, base: tuple[Path, dict[str, Any]], texts: Texts
) -> None:
    if name == PLAIN:
        return
    models, record = base
    # Own samples of so small a model are another text, which still has the first one's letters.
    chosen = {"rate": 0.1, "replay": 0.5, "own-samples": 0.5}
    strength = 0.05 if METHODS[name].is_budget else chosen.get(name, METHODS[name].grid[-1])
    found = point(name, strength, texts, models)
    assert found["first"] < record["points"][0]["first"] - 0.02
    assert found == point(name, strength, texts, models)


def test_a_penalty_is_fitted_on_as_many_sequences_as_its_method_says(
    base: tuple[Path, dict[str, Any]], texts: Texts
) -> None:
    models, strength = base[0], 3.0
    for family in ("ewc", "kronecker"):
        found = {count: point(f"{family}-{count}", strength, texts, models) for count in (4, 16)}
        assert found[4] != found[16]
        few = replace(SETTINGS, fisher_samples=4)
        again = run_method(Run(family, strength, 0), StopRequest(), few, texts, models)
        assert again["points"] == [found[4] | {"strength": strength}]


def test_low_rank_additions_are_all_that_is_trained(
    base: tuple[Path, dict[str, Any]], texts: Texts
) -> None:
    models, record = base
    model = SETTINGS.model(torch.Generator())
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    tokens = torch.arange(12).view(1, 12)
    before = model(tokens)
    changes = add_low_rank(model, 2, torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), before)
    assert weights.keys() - changes.keys() == {"wte.weight"}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    shapes = [weights[name].shape for name in changes]
    assert [w.shape for w in trained[::2]] == [(2, width) for _, width in shapes]
    assert [w.shape for w in trained[1::2]] == [(out, 2) for out, _ in shapes]
    with torch.no_grad():
        for weight in trained:
            weight.normal_()
    live = dict(model.named_modules())
    for name, change in changes.items():
        torch.testing.assert_close(
            live[name.removesuffix(".weight")].weight, weights[name] + change()
        )
        assert torch.linalg.matrix_rank(change()) == 2

    # Without strength the penalty is nothing, and a rank of 16 is what that method has.
    free = point("low-rank", 16.0, texts, models)
    assert free == point("low-rank-ewc", 0.0, texts, models)
    assert free["second"] < record["before"]["second"] - 0.1


def test_a_budget_bounds_what_is_lost(base: tuple[Path, dict[str, Any]], texts: Texts) -> None:
    models, record = base
    longer = replace(SETTINGS, second_tokens=6.0)
    lost = []
    for budget in (0.05, 0.2):
        run = Run("ewc-budget", budget, 0)
        found = run_method(run, StopRequest(), longer, texts, models)["points"][0]
        lost.append(found["first"] - record["before"]["first"])
    assert lost[0] < lost[1] < 0.35
    assert abs(lost[0] - 0.05) < 0.05


def test_merging_goes_from_the_one_model_to_the_other(
    base: tuple[Path, dict[str, Any]], texts: Texts
) -> None:
    models, record = base
    for name in ("interpolation", "fisher-merge"):
        found = run_method(Run(name, 0.0, 0), StopRequest(), SETTINGS, texts, models)["points"]
        assert [each["strength"] for each in found] == list(METHODS[name].grid)
        assert abs(found[0]["first"] - record["before"]["first"]) < 0.2
        assert found[-1]["second"] < found[0]["second"]


def test_the_formula_of_merging() -> None:
    one = {"w": torch.tensor([1.0, 2.0, 3.0])}
    two = {"w": torch.tensor([3.0, 6.0, 5.0])}
    assert merged(one, two, 0.25, None)["w"].tolist() == [1.5, 3.0, 3.5]
    fishers = ({"w": torch.tensor([1.0, 0.0, 0.0])}, {"w": torch.tensor([3.0, 2.0, 0.0])})
    # (0.5 * 1 * 1 + 0.5 * 3 * 3) / (0.5 * 1 + 0.5 * 3); the second alone; neither: the mean.
    assert merged(one, two, 0.5, fishers)["w"].tolist() == [2.5, 6.0, 4.0]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.3, 1.0])
def test_shares_of_a_batch_are_spread_evenly(share: float) -> None:
    batches = [(torch.zeros(4, 2), torch.zeros(4, 2)) for _ in range(50)]
    rows = ((torch.ones(2), torch.full((2,), 2.0)) for _ in range(1000))
    taken = []
    for inputs, targets in second_training._mixed(iter(batches), rows, share):
        assert torch.equal(targets, 2 * inputs)
        taken.append(int(inputs[:, 0].sum()))
    assert sum(taken) == int(200 * share)
    assert max(taken) - min(taken) <= 1


def _record(method: str, points: list[tuple[float, float]], seed: int = 0) -> dict[str, Any]:
    made = [{"first": first, "second": second} for first, second in points]
    timed = {"preparing_seconds": 1.0, "state_bytes": 2**20, "cpu_seconds": 3.0}
    return {"method": method, "strength": 1.0, "seed": seed, "points": made, **timed}


def _base(seed: int = 0) -> dict[str, Any]:
    record = _record(BASE, [(3.0, 2.0)], seed)
    del record["preparing_seconds"]
    return record | {"before": {"first": 2.0, "second": 4.0}}


def test_curves_are_shares_of_what_plain_training_learns() -> None:
    records = [_base(), _record("ewc", [(2.1, 3.0)]), _record("ewc", [(2.4, 2.4)])]
    curves = curves_of([*records, _record("ewc", [(9.0, 9.0)], seed=7)])
    assert curves[PLAIN] == {0: [(1.0, 1.0)]}
    (curve,) = curves["ewc"].values()
    assert curve == [pytest.approx((0.5, 0.1)), pytest.approx((0.8, 0.4))]
    assert lost_at(curve, 1.0, 0.5) == pytest.approx(0.1)
    assert lost_at(curve, 1.0, 0.9) == pytest.approx(0.7)  # between the last point and (1, 1)
    assert lost_at(curve, 1.0, 0.25) == pytest.approx(0.05)
    assert lost_at([(0.5, 0.8), (0.5, 0.2)], 1.0, 0.5) == pytest.approx(0.2)


def test_the_table_says_what_is_lost_at_equal_learning() -> None:
    records = [
        each
        for seed in range(3)
        for each in (_base(seed), _record("ewc", [(2.1 + 0.01 * seed, 3.0)], seed))
    ]
    text = markdown_table(records)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[:4]]
    assert rows[2][0] == "plain"
    assert rows[2][2:4] == ["+0.500 ± 0.000", "+0.900 ± 0.000"]
    assert rows[3][:3] == ["EWC", "sequences of it, once", "+0.110 ± 0.025"]
    assert rows[3][4:] == ["3.0", "1.0", "1.0"]
    assert "above the 2.000 before" in text
    assert "3 seeds" in text
    assert "no number" not in text
    records[1]["points"].append({"first": None, "second": 3.0})
    assert "- 1 trainings ended in no number" in markdown_table(records)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--colour"], "--colour"),
        (["--methods", "ewx"], "'ewx' is not a method: choose among plain, rate"),
        (["--width", "40"], "multiple of 16"),
        (["--width", "8"], "whole number from 16"),
        (["--layers", "0"], "whole number from 1"),
        (["--seeds", "0"], "whole number from 1"),
        (["--first-tokens", "0"], "first-tokens"),
        (["--second-tokens", "nan"], "second-tokens"),
        (["--workers", "0"], "whole number from 1"),
        (["--out", "file.txt"], "is a file"),
        (["--out", "."], "is not a run of this program"),
        (["--quick", "--first", "absent.txt"], "absent.txt"),
    ],
)
def test_bad_input(words: list[str], says: str, refused: Refused) -> None:
    Path("file.txt").write_text("mine")
    assert says in refused(protect.main, words)
    assert not list(Path.cwd().rglob("results.json"))


def test_every_method_is_run_with_every_strength_once() -> None:
    options = parse_options(["--seeds", "2"])
    runs = [(run.method, run.strength) for run in options.runs if run.seed == 1]
    expected = [
        (name, strength)
        for name, method in METHODS.items()
        if name != PLAIN
        for strength in ((0.0,) if method.kind == "merge" else method.grid)
    ]
    assert runs == expected
    assert [run.seed for run in options.first_runs] == [0, 1]
    assert len(options.runs) == 2 * len(runs)


def test_the_whole_path_and_what_it_leaves(
    sources: tuple[Path, Path], capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    words = [*TINY, "--first", str(sources[0]), "--second", str(sources[1]), "--out", "run"]
    assert protect.main([*words, "--methods", "plain,ewc,interpolation"]) == 0
    printed = capsys.readouterr().out
    table = Path("run/table.md").read_text()
    assert printed.startswith(table)
    assert all(Path("run", name).stat().st_size > 5000 for name in ("kept.png", "cost.png"))
    assert not Path("run/samples.png").exists()
    kept = json.loads(Path("run/results.json").read_text())["runs"]
    assert [run["method"] for run in kept] == [BASE, "ewc", "interpolation"]

    # What is done is kept, what is added begins with the same models.
    assert protect.main([*words, "--methods", "ewc,ewc-4,replay", "--workers", "2"]) == 0
    assert Path("run/samples.png").stat().st_size > 5000
    assert "interpolation" not in capsys.readouterr().out
    assert protect.main([*words, "--methods", "ewc,replay"]) == 0
    assert "%" not in capsys.readouterr().err  # there is nothing to do
    again = json.loads(Path("run/results.json").read_text())["runs"]
    assert again[:3] == kept
    assert {run["method"] for run in again[3:]} == {"ewc-4", "replay"}

    assert "other settings: layers 1 (now 2)" in refused(protect.main, [*words, "--layers", "2"])
    other = [str(sources[1]) if word == str(sources[0]) else word for word in words]
    assert protect.main(other) == 2  # not without its tokens, which are kept
    assert "other settings: texts" in capsys.readouterr().err
    model = Path("run/models/base-seed-0.pt")
    content = model.read_bytes()
    model.write_bytes(b"damaged")
    assert protect.main([*words, "--methods", "rate"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "base-seed-0.pt is damaged" in line
    assert "delete it, then the same command trains it again" in line
    model.unlink()
    assert protect.main([*words, "--methods", "rate"]) == 0
    assert model.read_bytes() == content
    changed = json.loads(Path("run/results.json").read_text())
    changed["runs"][0]["points"][0]["first"] += 1e-3
    whole = Path("run/results.json").read_text()
    Path("run/results.json").write_text(json.dumps(changed))
    model.unlink()
    assert protect.main([*words, "--methods", "rate"]) == 2
    assert "trained again they are others" in capsys.readouterr().err.splitlines()[-1]
    for damaged in ("{", "{}", whole.replace('"points"', '"point"')):
        Path("run/results.json").write_text(damaged)
        assert "results.json" in refused(protect.main, words)
