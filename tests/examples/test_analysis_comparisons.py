"""Which arms are held against which, and what may be said of them."""

import math
from pathlib import Path

import pytest
from analysis_records import chain_of, entry, two_arms, write

from analysis.comparisons import (
    QUESTIONS,
    Pairing,
    compare_arms,
    headlines,
    pairings,
    without_strengths,
)
from analysis.records import Record, read_metrics
from analysis.report_figures import styles_of
from trainer.arms import parse_arm

METHODS = (
    "scratch", "scratch+muon", "grown", "grown+ewc", "grown+ewc+subspace", "grown+distill",
)  # fmt: skip
ALL = (*METHODS, *(f"{method}+ars" for method in METHODS))


def found(tmp_path: Path, *arms: str) -> list[Pairing]:
    records = [entry(f"d3-{arm}", 2.5) for arm in arms]
    return pairings(read_metrics([write(tmp_path / "m.json", records)]))


def test_the_experiment_has_all_its_comparisons(tmp_path: Path) -> None:
    pairs = found(tmp_path, *ALL)
    by_question = {q: [p for p in pairs if p.question == q] for q in QUESTIONS}
    grown = [arm for arm in ALL if parse_arm(arm).grown]
    assert [(p.arm, p.baseline) for p in by_question["inheriting"]] == [
        (arm, "scratch") for arm in grown
    ]
    assert {(p.arm, p.baseline) for p in by_question["controller"]} == {
        (f"{method}+ars", method) for method in METHODS
    }
    assert [(p.arm, p.baseline) for p in by_question["penalty"]] == [
        (arm, "grown+ars" if arm.endswith("+ars") else "grown")
        for arm in grown
        if parse_arm(arm).parts
    ]
    assert [(p.arm, p.baseline) for p in by_question["control"]] == [
        ("scratch+muon", "scratch"), ("scratch+muon+ars", "scratch"),
    ]  # fmt: skip
    assert [(p.arm, p.baseline) for p in by_question["muon"]] == [
        ("grown", "scratch+muon"), ("grown+ars", "scratch+muon+ars"),
    ]  # fmt: skip
    held = {p.arm for p in pairs if p.from_scratch}
    assert held == set(ALL) - {"scratch"}, "every arm is held against the model from scratch"
    assert len({(p.arm, p.baseline) for p in pairs}) == len(pairs), "nothing is compared twice"


def test_without_a_plain_model_the_one_with_the_same_controller_is_the_baseline(
    tmp_path: Path,
) -> None:
    (pair,) = found(tmp_path, "scratch+ars", "grown+ewc+ars")
    assert (pair.arm, pair.baseline, pair.from_scratch) == ("grown+ewc+ars", "scratch+ars", True)
    assert found(tmp_path, "scratch+ars", "grown+ewc") == []


def test_strengths_are_compared_with_plain_growing(tmp_path: Path) -> None:
    pairs = found(tmp_path, "grown", "grown+ewc=0.5+subspace=0.05", "grown+distill=0.3+paper")
    assert [(p.arm, p.baseline, p.question) for p in pairs] == [
        ("grown+ewc=0.5+subspace=0.05", "grown", "penalty")
    ]


def test_other_words_are_compared_with_scratch_alone(tmp_path: Path) -> None:
    assert [(p.arm, p.question) for p in found(tmp_path, "scratch", "inherited")] == [
        ("inherited", "inheriting")
    ]


def test_all_arms_of_the_experiment_look_different() -> None:
    styles = styles_of([*ALL, "grown+subspace", "grown+ewc+distill", "unheard-of"])
    looks = {(style.colour, style.line, style.marker) for style in styles.values()}
    assert len(looks) == len(styles)
    assert styles["grown"].colour == styles["grown+ars"].colour
    assert styles["grown"].line != styles["grown+ars"].line
    # Equal however many other arms there are, and whatever the strengths.
    again = styles_of(["grown+ewc=0.5"])["grown+ewc=0.5"]
    assert again == styles["grown+ewc"]


@pytest.mark.parametrize(
    ("word", "plain"),
    [
        ("grown+ewc=0.5+subspace=2+ars", "grown+ewc+subspace+ars"),
        ("scratch", "scratch"),
        ("b=3", "b=3"),
    ],
)
def test_strengths_leave_the_legend(word: str, plain: str) -> None:
    assert without_strengths(word) == plain


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
        ("grown", 3, len(gains)), ("grown", 4, len(gains)),
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d3-grown", "diverged in 2 of 5 seeds"),
        ("d3-scratch", "scratch diverged in 2 of 5 seeds"),
    ],
)
def test_seeds_that_diverged_are_not_left_to_the_others(
    tmp_path: Path, name: str, words: str
) -> None:
    runs = [two_arms(seed, 0.1 + 0.01 * seed) for seed in range(5)]
    for run in runs[:2]:
        next(r for r in run if r["name"] == name)["val_bpb"] = math.nan
    paths = [write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)]
    first, second = compare_arms(read_metrics(paths))
    assert (first.conclusion, first.seeds, first.interval) == (words, 5, None)
    assert first.to_dict()["difference"] is None
    assert second.conclusion == "better"
    (line,) = headlines([first])
    assert line.endswith(f"No benefit shown. {words[0].upper()}{words[1:]}: grown at d3.")


def test_headlines_say_first_what_was_not_gained(tmp_path: Path) -> None:
    assert headlines([]) == [
        "There is nothing to compare: no two arms trained a model of the same depth."
    ]
    for gains, start in (
        ([0.1, 0.11, 0.12], "Fewer bits per byte: grown at d3, d4."),
        ([0.1, -0.09, 0.02], "No benefit shown. No difference beyond chance: grown at d3, d4."),
        ([-0.1, -0.11, -0.12], "No benefit shown. More bits per byte: grown at d3, d4."),
        (
            [0.1],
            "Nothing is shown either way. No conclusion from fewer than 3 seeds: grown at d3, d4.",
        ),
    ):
        (line,) = headlines(compare_arms(records(tmp_path, gains)))
        assert line == f"Does inheriting beat training from scratch at equal FLOPs? {start}"


def test_every_question_has_its_own_answer(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        noise = 0.001 * seed
        more = chain_of("grown+ewc", "scratch", [2.45 + noise, 2.15], seed)
        more += [entry("d2-scratch+ars", 3.0, seed=seed), entry("d3-scratch+ars", 2.5, seed=seed)]
        paths.append(write(tmp_path / f"{seed}.json", [*two_arms(seed, 0.1 + noise), *more]))
    lines = headlines(compare_arms(read_metrics(paths)))
    assert len(lines) == 3
    assert lines[0].endswith("? Fewer bits per byte: grown, grown+ewc at d3, d4.")
    assert lines[1].startswith("Do the penalties add anything to plain growing? No benefit shown.")
    assert "More bits per byte: grown+ewc at d3, d4" in lines[1]
    assert lines[2].endswith(
        "No benefit shown. No difference beyond chance: scratch+ars at d2, d3."
    )


def test_strengths_are_counted_and_not_listed(tmp_path: Path) -> None:
    more = [entry("d3-grown+ewc=2+ars", 2.4, "d2-scratch")]
    for word in ("grown+ewc=0.5", "grown+ewc=1", "grown+ewc=2", "grown+subspace=1"):
        more.append(entry(f"d3-{word}", 2.4, "d2-scratch"))
    lines = headlines(compare_arms(read_metrics([write(tmp_path / "m.json", two_arms() + more)])))
    assert lines[1].endswith("3 seeds: grown+ewc (3 strengths), grown+subspace=1 at d3.")
