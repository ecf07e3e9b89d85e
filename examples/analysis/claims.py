"""The proposal's claims, decided from records: holds, does not hold, or not shown.

* 60 % cheaper: a grown model reaches the loss of the model from scratch for at most 0.40 of its
  operations, all its parents' counted.
* The same score with under 75 % of the tokens, of the whole lineage.
* Monotonic improvement: the bits per byte of every grown series fall with depth, in every seed.
* No divergence: every loss is finite, and none that validation measured is above that of the model
  before its training.

A cost is decided by the interval over the seeds, at least 3, at the depth with the most parents. It
holds if the cost of the baseline's final loss is below the limit. That cost is an upper bound (see
`analysis.costs`), so the claim fails only if the cost between the trunks is above the limit too,
or if some seed never reached that loss at all. A cost that is a bound only, or that some seed's
divergence leaves open, makes nothing fail. A failure that one seed shows is a failure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.comparisons import count_seeds, read_arm, single_arms
from analysis.costs import Ratios, Saving
from analysis.planned_series import chain_saving
from analysis.records import Logs, Record, chain
from common.statistics import MIN_SEEDS, Estimate

__all__ = ["FAILS", "HOLDS", "NOT_SHOWN", "Claim", "decide_claims"]

HOLDS, FAILS, NOT_SHOWN = "holds", "does not hold", "not shown"

_FLOPS_LIMIT = 0.40
_TOKENS_LIMIT = 0.75
_SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Claim:
    """One claim and what the records say about it.

    Args:
        claim: in words.
        verdict: "holds", "does not hold" or "not shown".
        evidence: the numbers, in words.
        details: the verdict of every arm, where it is decided for each.
    """

    claim: str
    verdict: str
    evidence: str
    details: tuple[dict[str, str], ...] = ()


def decide_claims(records: Sequence[Record], logs: Logs, savings: Sequence[Saving]) -> list[Claim]:
    """Decide every claim.

    Args:
        records: of one or more seeds, those that diverged included.
        logs: of their steps, as far as there are any.
        savings: of `analysis.costs.find_savings`.
    """
    grown = [s for s in savings if _is_grown(s.arm)]
    return [
        _cost_claim(
            "60 % cheaper: the baseline's loss for at most 0.40 of its FLOPs, parents included",
            grown, _FLOPS_LIMIT, lambda ratios: ratios.with_parents, _ladder(grown),
        ),
        _cost_claim(
            "The same score with under 75 % of the tokens, parents' included",
            grown, _TOKENS_LIMIT, lambda ratios: ratios.tokens_with_parents, _own_tokens(grown),
        ),
        _monotonic(records),
        _no_divergence(records, logs),
    ]  # fmt: skip


def _is_grown(word: str) -> bool:
    arm = read_arm(word)
    return arm is None or arm.grown


def _deepest(savings: Sequence[Saving]) -> list[Saving]:
    depth = max((s.depth for s in savings), default=0)
    return [s for s in savings if s.depth == depth]


def _cost_claim(
    claim: str,
    savings: Sequence[Saving],
    limit: float,
    cost: Callable[[Ratios], Estimate],
    note: str,
) -> Claim:
    deepest = _deepest(savings)
    if not deepest:
        return Claim(claim, NOT_SHOWN, "no grown arm has logs beside a model from scratch")
    verdicts = {s.arm: _decide(s, limit, cost) for s in deepest}
    found = set(verdicts.values())
    verdict = HOLDS if HOLDS in found else FAILS if found == {FAILS} else NOT_SHOWN

    def rank(saving: Saving) -> tuple[int, bool, float]:
        ratios = saving.final or saving.trunk
        order = (HOLDS, NOT_SHOWN, FAILS).index(verdicts[saving.arm])
        mean = math.inf if ratios is None else cost(ratios).mean
        return order, saving.final is None, mean

    best = min(deepest, key=rank)
    of = f"best of {len(deepest)} grown arms" if len(deepest) > 1 else "the only grown arm"
    if verdict == NOT_SHOWN and FAILS in found:  # what leaves it open may be wide, not low
        failed = sum(v == FAILS for v in verdicts.values())
        of = f"{failed} of {len(deepest)} grown arms do not hold it; best of the others"
    evidence = f"{of} at d{best.depth}, {best.arm}: {_cost_words(best, cost)}. {note}"
    details = tuple(
        {
            "arm": s.arm,
            "depth": f"d{s.depth}",
            "verdict": _decide(s, limit, cost),
            "evidence": _cost_words(s, cost),
        }
        for s in savings
    )
    return Claim(claim, verdict, evidence.strip(), details)


def _decide(saving: Saving, limit: float, cost: Callable[[Ratios], Estimate]) -> str:
    if saving.seeds < MIN_SEEDS or saving.diverged:
        return NOT_SHOWN
    if saving.final is None:
        return FAILS
    final = cost(saving.final).known
    assert final is not None, "there are as many values as seeds"
    if final[1] <= limit:
        return HOLDS
    bounds = [ratios for ratios in (saving.final, saving.trunk) if ratios is not None]
    intervals = [cost(ratios).known for ratios in bounds]
    above = all(interval is not None and interval[0] > limit for interval in intervals)
    return FAILS if above and not any(ratios.is_bound for ratios in bounds) else NOT_SHOWN


def _cost_words(saving: Saving, cost: Callable[[Ratios], Estimate]) -> str:
    if saving.diverged:
        where = f"{saving.diverged} of {count_seeds(saving.seeds)}"
        return f"it or {saving.baseline} diverged in {where}"
    if saving.final is None:
        words = f"its final loss was reached in {saving.reached} of {saving.seeds} seeds"
    else:
        words = f"{_ratio(saving.final, cost)} to its final loss"
    if saving.trunk is not None:
        words += f", {_ratio(saving.trunk, cost)} trunk against trunk"
    return f"{words} ({count_seeds(saving.seeds)})"


def _ratio(ratios: Ratios, cost: Callable[[Ratios], Estimate]) -> str:
    return f"{'at most ' if ratios.is_bound else ''}{cost(ratios):.2f}"


def _ladder(savings: Sequence[Saving]) -> str:
    """The transfer efficiency, and what it would save on paper for d10 ... d20.

    It is that of a model with one ancestor: see `chain_saving`.
    """
    steps = (0.0, 0.25, 0.5, 0.75, 1.0)
    ladder = " / ".join(f"{100 * chain_saving(e):.0f}" for e in steps)
    needed = 0.6 / chain_saving(1.0)
    known = _deepest([s for s in savings if s.efficiency is not None and s.ancestors == 1])
    measured = ""
    if known:
        plain = next((s for s in known if s.arm == "grown"), known[0])
        assert plain.efficiency is not None
        e = min(1.0, max(0.0, plain.efficiency.mean))
        measured = (
            f"Measured at d{plain.depth} for {plain.arm}, with one ancestor: "
            f"e = {plain.efficiency:.2f}, on that ladder {chain_saving(e):.0%}."
        )
    return (
        "Transfer efficiency e, fresh tokens that an inherited one is worth: a d10 ... d20 chain "
        f"saves {ladder} % at e = 0 / 0.25 / 0.5 / 0.75 / 1, and 60 % needs e = {needed:.2f}. "
        f"{measured}"
    )


def _own_tokens(savings: Sequence[Saving]) -> str:
    known = [(s, s.final) for s in _deepest(savings) if s.final is not None]
    if not known:
        return ""
    best, ratios = min(known, key=lambda pair: pair[1].tokens_without_parents.mean)
    own = ratios.tokens_without_parents
    return f"Without the parents' tokens, the best is {best.arm} with {own:.2f}."


def _monotonic(records: Sequence[Record]) -> Claim:
    claim = "Monotonic improvement: bits per byte fall with depth in every grown series"
    details, failures, series = [], [], 0
    seeds: set[int] = set()
    for arm in single_arms(records):
        steps, rises = 0, []
        for seed in dict.fromkeys(r.seed for r in records if r.arm == arm):
            models = sorted(chain(records, arm, seed), key=lambda r: r.depth)
            steps += len(models) > 1
            if _is_grown(arm) and len(models) > 1:
                series += 1
                seeds.add(seed)
            # Written so that a loss that is no number counts as a rise.
            rises += [
                f"d{b.depth} {b.val_bpb:.4f} after d{a.depth} {a.val_bpb:.4f} (seed {seed})"
                for a, b in pairwise(models)
                if not b.val_bpb < a.val_bpb
            ]
        if not steps:
            continue
        verdict = FAILS if rises else HOLDS if steps >= MIN_SEEDS else NOT_SHOWN
        evidence = "; ".join(rises) or f"falls at every step of {steps} series"
        details.append({"arm": arm, "depth": "all", "verdict": verdict, "evidence": evidence})
        if _is_grown(arm):
            failures += [f"{arm}: {rise}" for rise in rises]
    if not series:
        return Claim(claim, NOT_SHOWN, "no grown series of two depths", tuple(details))
    if failures:
        return Claim(claim, FAILS, _some(failures), tuple(details))
    verdict = HOLDS if len(seeds) >= MIN_SEEDS else NOT_SHOWN
    evidence = f"they fall at every step of {series} series, {count_seeds(len(seeds))}"
    return Claim(claim, verdict, evidence, tuple(details))


def _no_divergence(records: Sequence[Record], logs: Logs) -> Claim:
    claim = "No divergence: every loss finite, none above the untrained model's"
    failures, logged = [], 0
    for record in records:
        where = f"{record.name} (seed {record.seed})"
        if record.diverged:
            failures.append(f"{where} ended at {record.val_bpb}")
            continue
        rows = logs.get((record.name, record.seed), [])
        logged += bool(rows)
        if any(row["loss"] is not None and not math.isfinite(row["loss"]) for row in rows):
            failures.append(f"{where} had a training loss that was no number")
        measured = [row["val_bpb"] for row in rows if row["val_bpb"] is not None]
        untrained = _untrained(record, records, logs)
        highest = max([record.val_bpb, *measured], key=lambda v: v if v == v else math.inf)
        if untrained is not None and not highest <= untrained * (1 + 1e-9):
            failures.append(f"{where} rose to {highest:.4f} from {untrained:.4f} untrained")
    if failures:
        return Claim(claim, FAILS, _some(failures))
    seeds = len({record.seed for record in records})
    verdict = HOLDS if seeds >= MIN_SEEDS and logged == len(records) else NOT_SHOWN
    evidence = f"none in {len(records)} models, {count_seeds(seeds)}"
    if logged < len(records):
        evidence += f"; only {logged} of them have logs"
    return Claim(claim, verdict, evidence)


def _untrained(record: Record, records: Sequence[Record], logs: Logs) -> float | None:
    """Bits per byte of the first model of a lineage before its first step."""
    by_name = {r.name: r for r in records if r.seed == record.seed}
    while record.parent is not None and record.parent in by_name:
        record = by_name[record.parent]
    for row in logs.get((record.name, record.seed), []):
        if row["val_bpb"] is not None:
            return float(row["val_bpb"]) if row["step"] == 0 else None
    return None


def _some(failures: Sequence[str]) -> str:
    more = len(failures) - _SHOWN_FAILURES
    words = "; ".join(failures[:_SHOWN_FAILURES])
    return f"{words}; and {more} more" if more > 0 else words
