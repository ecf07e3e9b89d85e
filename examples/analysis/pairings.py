"""Which arms are compared with which, and what each comparison asks.

Every arm is compared with the tuned model from scratch. What was added to an arm is compared with
the arm without it: the controller with the same arm uncontrolled, a penalty with plain growing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.records import Record
from trainer.arms import Arm, parse_arm
from trainer.errors import UsageError

__all__ = [
    "QUESTIONS",
    "Pairing",
    "is_sweep",
    "pairings",
    "read_arm",
    "single_arms",
    "without_strengths",
]

# Question -> its words, in the order of the report.
QUESTIONS = {
    "inheriting": "Does inheriting beat training from scratch at equal FLOPs?",
    "penalty": "Do the penalties add anything to plain growing?",
    "controller": "Does the controller add anything?",
    "muon": "Does growing with AdamW beat Muon from scratch?",
    "control": "How far is the other optimizer from tuned AdamW, both from scratch?",
}

_MUON = (("muon", None),)


@dataclass(frozen=True)
class Pairing:
    """Two arms to compare.

    Args:
        arm: compared.
        baseline: compared with.
        question: a key of `QUESTIONS`.
        from_scratch: whether the baseline is the model from scratch that every arm is held against.
    """

    arm: str
    baseline: str
    question: str
    from_scratch: bool


def read_arm(word: str) -> Arm | None:
    """The parts of an arm, ``None`` for a word that is none of the trainer's."""
    try:
        return parse_arm(word)
    except UsageError:
        return None


def without_strengths(word: str) -> str:
    """The arm without the strengths in its word.

    Example:
        >>> without_strengths("grown+ewc=0.5+subspace=0.05+ars")
        'grown+ewc+subspace+ars'
    """
    arm = read_arm(word)
    if arm is None:
        return word
    return Arm(arm.grown, tuple((part, None) for part, _ in arm.parts), arm.controller).name


def is_sweep(models: Sequence[Record]) -> bool:
    """Whether an arm has several models of one depth and seed, which differ by their budgets."""
    return len({(r.depth, r.seed) for r in models}) < len(models)


def single_arms(records: Sequence[Record]) -> list[str]:
    """The arms in the order of the records, sweeps left out: which model would be a choice."""
    arms = dict.fromkeys(r.arm for r in records)
    return [arm for arm in arms if not is_sweep([r for r in records if r.arm == arm])]


def pairings(records: Sequence[Record]) -> list[Pairing]:
    """The comparisons that a set of records allows, grouped by question.

    Args:
        records: of one or more seeds.
    """
    arms = single_arms(records)
    found = [pairing for arm in arms for pairing in _of(arm, arms)]
    order = list(QUESTIONS)
    return sorted(found, key=lambda pairing: order.index(pairing.question))


def _of(word: str, arms: Sequence[str]) -> list[Pairing]:
    arm = read_arm(word)
    wanted: list[tuple[Arm, str]] = []
    scratch = Arm(False, (), None)
    if scratch.name not in arms and arm is not None:
        scratch = Arm(False, (), arm.controller)
    if arm is None:
        wanted.append((scratch, "inheriting"))
    else:
        question = "control" if arm.parts else "controller"
        wanted.append((scratch, "inheriting" if arm.grown else question))
        if arm.controller is not None:
            wanted.append((Arm(arm.grown, arm.parts, None), "controller"))
        if arm.grown and arm.parts:
            wanted.append((Arm(True, (), arm.controller), "penalty"))
        if arm.grown and not arm.parts:
            wanted.append((Arm(False, _MUON, arm.controller), "muon"))
    baselines: dict[str, Pairing] = {}
    for baseline, question in wanted:
        name = baseline.name
        if name != word and name in arms:
            baselines.setdefault(name, Pairing(word, name, question, baseline == scratch))
    return list(baselines.values())
