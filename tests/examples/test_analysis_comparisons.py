"""Which arms are held against which, and what may be said of them."""

import math
from pathlib import Path
from typing import Any

import pytest
from analysis_records import grown_series, trained, write

from analysis.comparisons import (
    QUESTIONS,
    Pairing,
    compare_arms,
    headlines,
    pairings,
    twin_of,
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
    records = [trained(f"d3-{arm}", 2.5) for arm in arms]
    return pairings(read_metrics([write(tmp_path / "m.json", records)]))


def test_every_arm_has_its_comparisons(tmp_path: Path) -> None:
    pairs = found(tmp_path, *ALL)
    by_question = {q: [(p.arm, p.baseline) for p in pairs if p.question == q] for q in QUESTIONS}
    grown = [arm for arm in ALL if parse_arm(arm).grown]
    assert by_question["inheriting"] == [
        (arm, "scratch+ars" if arm.endswith("+ars") else "scratch") for arm in grown
    ]
    assert set(by_question["controller"]) == {(f"{method}+ars", method) for method in METHODS}
    assert by_question["penalty"] == [
        (arm, "grown+ars" if arm.endswith("+ars") else "grown")
        for arm in grown
        if parse_arm(arm).parts
    ]
    assert by_question["muon"] == [("grown", "scratch+muon"), ("grown+ars", "scratch+muon+ars")]
    assert by_question["optimizer"] == [
        ("scratch+muon", "scratch"), ("scratch+muon+ars", "scratch+ars"),
    ]  # fmt: skip
    assert len({(p.arm, p.baseline) for p in pairs}) == len(pairs), "nothing is compared twice"


def test_twins_have_the_controller_and_plain_ones_stand_in_for_them(tmp_path: Path) -> None:
    assert twin_of("grown+ewc+ars") == "scratch+ars"
    (pair,) = found(tmp_path, "scratch+ars", "grown+ewc+ars")
    assert (pair.arm, pair.baseline) == ("grown+ewc+ars", "scratch+ars")
    (pair,) = found(tmp_path, "scratch", "grown+ewc+ars")
    assert (pair.arm, pair.baseline) == ("grown+ewc+ars", "scratch")
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
        write(tmp_path / f"{seed}.json", grown_series(seed, gain))
        for seed, gain in enumerate(gains)
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
    assert [(c.arm, c.size, c.seeds) for c in found] == [
        ("grown", "d4", len(gains)), ("grown", "d6", len(gains)),
    ]  # fmt: skip
    for comparison in found:
        assert comparison.conclusion == conclusion
        assert comparison.difference == pytest.approx(-sum(gains) / len(gains))
        assert (comparison.interval is None) == (len(gains) == 1)
    # 40 of 100 steps, and growing: 8 operations a parameter of 60,000 a parameter and step.
    assert found[0].flops_ratio == pytest.approx(0.4 + 8 / 60_000 / 4)


def with_penalty(seed: int, share: float) -> list[dict[str, Any]]:
    """The made-up series, and d4 grown with a penalty at another share of the steps."""
    run = grown_series(seed, 0.1)
    bpb = 2.3 - 0.01 * seed
    return [*run, trained("d4-grown+ewc", {share: bpb}, run[0], seed=seed)]


@pytest.mark.parametrize(("share", "conclusion"), [(0.4, "better"), (0.45, "shares differ")])
def test_what_is_added_is_compared_at_one_share(
    tmp_path: Path, share: float, conclusion: str
) -> None:
    paths = [write(tmp_path / f"{i}.json", with_penalty(i, share)) for i in range(3)]
    (penalty,) = (c for c in compare_arms(read_metrics(paths)) if c.question == "penalty")
    assert penalty.conclusion == conclusion
    own = next(c for c in compare_arms(read_metrics(paths)) if c.arm == "grown+ewc")
    assert (own.question, own.conclusion) == ("inheriting", "better")


def test_sizes_without_a_counterpart_are_left_out(tmp_path: Path) -> None:
    first, grown, *_ = grown_series()
    assert compare_arms(read_metrics([write(tmp_path / "m.json", [first, grown])])) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d4-grown", "diverged in 2 of 5 seeds"),
        ("d4-scratch", "scratch diverged in 2 of 5 seeds"),
    ],
)
def test_seeds_that_diverged_are_not_left_to_the_others(
    tmp_path: Path, name: str, words: str
) -> None:
    runs = [grown_series(seed, 0.1 + 0.01 * seed) for seed in range(5)]
    for run in runs[:2]:
        next(r for r in run if r["name"] == name)["val_bpb"] = math.nan
    paths = [write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)]
    first, second = compare_arms(read_metrics(paths))
    assert (first.conclusion, first.seeds, first.interval) == (words, 5, None)
    assert first.to_dict()["difference"] is None
    assert second.conclusion == "better"
    (line,) = headlines([first])
    assert line.endswith(f"No benefit shown. {words[0].upper()}{words[1:]}: grown at d4.")


def test_headlines_say_first_what_was_not_gained(tmp_path: Path) -> None:
    assert headlines([]) == [
        "There is nothing to compare: no two arms trained a model of the same size."
    ]
    for gains, start in (
        ([0.1, 0.11, 0.12], "Fewer bits per byte: grown at d4, d6."),
        ([0.1, -0.09, 0.02], "No benefit shown. No difference beyond chance: grown at d4, d6."),
        ([-0.1, -0.11, -0.12], "No benefit shown. More bits per byte: grown at d4, d6."),
        (
            [0.1],
            "No conclusion from fewer than 3 seeds: grown at d4, d6.",
        ),
    ):
        (line,) = headlines(compare_arms(records(tmp_path, gains)))
        assert line == f"{QUESTIONS['inheriting']} {start}"


def test_every_question_has_its_own_answer(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        run = grown_series(seed, 0.1 + 0.001 * seed)
        run += [r for r in grown_series(seed, 0.05, "grown+ewc") if r["arm"] == "grown+ewc"]
        run += [trained(f"{r['size']}-scratch+ars", r["val_bpb"], seed=seed)
                for r in run if r["arm"] == "scratch"]  # fmt: skip
        paths.append(write(tmp_path / f"{seed}.json", run))
    lines = headlines(compare_arms(read_metrics(paths)))
    assert len(lines) == 3
    assert lines[0].endswith("? Fewer bits per byte: grown, grown+ewc at d4, d6.")
    assert lines[1].startswith(f"{QUESTIONS['penalty']} No benefit shown.")
    assert "More bits per byte: grown+ewc at d4, d6" in lines[1]
    assert lines[2].endswith(
        "No benefit shown. No difference beyond chance: scratch+ars at d2, d4, d6."
    )


def test_strengths_are_counted_and_not_listed(tmp_path: Path) -> None:
    run = grown_series()
    for word in ("grown+ewc=0.5", "grown+ewc=1", "grown+ewc=2", "grown+subspace=1"):
        run.append(trained(f"d4-{word}", {0.4: 2.4}, run[0]))
    lines = headlines(compare_arms(read_metrics([write(tmp_path / "m.json", run)])))
    assert lines[1].endswith("3 seeds: grown+ewc (3 strengths), grown+subspace=1 at d4.")
