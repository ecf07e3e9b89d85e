"""Which arms are held against which."""

from pathlib import Path

import pytest
from analysis_records import entry, write

from analysis.pairings import QUESTIONS, Pairing, pairings, without_strengths
from analysis.records import read_metrics
from analysis.style import styles_of
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
