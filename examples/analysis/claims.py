"""The proposal's claims, decided from records: holds, does not hold, or not shown.

* 60 % cheaper: a grown series takes at most 0.40 of the operations of its twins from scratch, each
  trunk paid once, and no member of any seed ends above its twin.
* The same score with under 75 % of the tokens: the largest member ends at or below its twin in
  every seed, and its whole lineage has read less than 0.75 of the twin's tokens. What it read
  itself, and what the series read in all, is said beside it.
* Monotonic improvement: the bits per byte of every grown series fall with size, in every seed.
* No divergence: every loss is finite, and none that validation measured is above that of the model
  before its training.

The first two are decided for each grown arm beside its twins, from at least 3 seeds. They fail
where as much was paid, or read, as the limit, and yet a member ended above its twin by its interval
over the seeds; what costs more than the limit at equal loss leaves open whether less would do.
A failure that one seed shows is a failure of the last two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.comparisons import read_arm
from analysis.planned_series import chain_saving
from analysis.records import Logs, Record, chain, sizes_of
from analysis.series_account import MemberAccount, SeriesAccount, own_accounts
from common.statistics import MIN_SEEDS, Estimate, count_seeds

__all__ = ["FAILS", "HOLDS", "NOT_SHOWN", "Claim", "decide_claims"]

HOLDS, FAILS, NOT_SHOWN = "holds", "does not hold", "not shown"

_FLOPS_LIMIT = 0.40
_TOKENS_LIMIT = 0.75
_LADDER = (0.25, 0.5, 0.75, 1.0)
_SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Claim:
    """One claim and what the records say about it.

    Args:
        claim: in words.
        verdict: "holds", "does not hold" or "not shown".
        evidence: the numbers, in words.
        details: arm, verdict and evidence, where it is decided for each arm.
    """

    claim: str
    verdict: str
    evidence: str
    details: tuple[dict[str, str], ...] = ()


def decide_claims(
    records: Sequence[Record], logs: Logs, accounts: Sequence[SeriesAccount]
) -> list[Claim]:
    """Decide every claim.

    Args:
        records: of one or more seeds, those that diverged included.
        logs: of their steps, as far as there are any.
        accounts: of `analysis.series_account.find_accounts`.
    """
    own = own_accounts(accounts)
    return [
        _of_accounts(
            "60 % cheaper: the series for at most 0.40 of its twins' FLOPs, no member worse",
            own, _is_cheaper, _cost_words, _ladder(),
        ),
        _of_accounts(
            "The same score with under 75 % of the tokens, its ancestors' included",
            own, _reads_less, _token_words, "",
        ),
        _monotonic(records),
        _no_divergence(records, logs),
    ]  # fmt: skip


def _of_accounts(
    claim: str,
    accounts: Sequence[SeriesAccount],
    decide: Callable[[SeriesAccount], str],
    words: Callable[[SeriesAccount], str],
    note: str,
) -> Claim:
    if not accounts:
        return Claim(claim, NOT_SHOWN, "no grown series beside twins that were trained in full")
    details = [
        {"arm": account.arm, "verdict": decide(account), "evidence": words(account)}
        for account in accounts
    ]
    order = (HOLDS, NOT_SHOWN, FAILS)
    best = min(details, key=lambda row: order.index(row["verdict"]))
    of = f"best of {len(details)} grown arms, " if len(details) > 1 else ""
    evidence = f"{of}{best['arm']}: {best['evidence']}. {note}".strip()
    return Claim(claim, best["verdict"], evidence, tuple(details))


def _is_cheaper(account: SeriesAccount) -> str:
    worse = any(_is_above(member) for member in account.members)
    return _decide(account, account.paid, _FLOPS_LIMIT, reached=account.at_equal_loss, worse=worse)


def _reads_less(account: SeriesAccount) -> str:
    last = account.members[-1]
    inherited = Estimate.of([
        whole - own
        for whole, own in zip(last.lineage_tokens.values, last.tokens.values, strict=True)
    ])  # fmt: skip
    if inherited.known is not None and inherited.known[0] >= _TOKENS_LIMIT:
        return FAILS  # whatever its own share
    reached, worse = not (last.worse or last.diverged), _is_above(last)
    return _decide(account, last.lineage_tokens, _TOKENS_LIMIT, reached=reached, worse=worse)


def _decide(
    account: SeriesAccount, cost: Estimate, limit: float, *, reached: bool, worse: bool
) -> str:
    if cost.known is None or account.diverged:
        return NOT_SHOWN
    if reached and cost.known[1] <= limit:
        return HOLDS
    return FAILS if worse and cost.known[0] >= limit else NOT_SHOWN


def _is_above(member: MemberAccount) -> bool:
    return member.difference.known is not None and member.difference.known[0] > 0


def _cost_words(account: SeriesAccount) -> str:
    e = "" if account.efficiency is None else f", transfer efficiency {account.efficiency:.2f}"
    return (
        f"{account.paid.mean:.2f} of the FLOPs, {account.worse} of {account.compared} models "
        f"above their twins{e} ({count_seeds(account.seeds)})"
    )


def _token_words(account: SeriesAccount) -> str:
    last = account.members[-1]
    return (
        f"the lineage of {last.size} read {last.lineage_tokens.mean:.2f} times its twin's tokens "
        f"({last.tokens.mean:.2f} times as {last.size} itself) and ended "
        f"{last.difference:+.4f} bits per byte from it; the whole series read "
        f"{account.tokens.mean:.2f} times its twins' tokens ({count_seeds(account.seeds)})"
    )


def _ladder() -> str:
    saved = " / ".join(f"{100 * chain_saving(e):.0f}" for e in _LADDER)
    return (
        f"By arithmetic alone a chain d10 ... d20 saves {saved} % at a transfer efficiency of "
        f"{' / '.join(f'{e:g}' for e in _LADDER)}."
    )


def _monotonic(records: Sequence[Record]) -> Claim:
    claim = "Monotonic improvement: bits per byte fall with size in every grown series"
    sizes = sizes_of(records)
    details, failures, series = [], [], 0
    seeds: set[int] = set()
    for arm in dict.fromkeys(r.arm for r in records):
        read = read_arm(arm)
        is_grown = read is None or read.grown
        steps, rises = 0, []
        for seed in dict.fromkeys(r.seed for r in records if r.arm == arm):
            models = sorted(chain(records, arm, seed), key=lambda r: sizes.index(r.size))
            steps += len(models) > 1
            if is_grown and len(models) > 1:
                series += 1
                seeds.add(seed)
            # Written so that a loss that is no number counts as a rise.
            rises += [
                f"{b.size} {b.val_bpb:.4f} after {a.size} {a.val_bpb:.4f} (seed {seed})"
                for a, b in pairwise(models)
                if not b.val_bpb < a.val_bpb
            ]
        if not steps:
            continue
        verdict = FAILS if rises else HOLDS if steps >= MIN_SEEDS else NOT_SHOWN
        evidence = "; ".join(rises) or f"falls at every step of {steps} series"
        details.append({"arm": arm, "verdict": verdict, "evidence": evidence})
        if is_grown:
            failures += [f"{arm}: {rise}" for rise in rises]
    if not series:
        return Claim(claim, NOT_SHOWN, "no grown series of two sizes", tuple(details))
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
        failures += [
            f"the cooled branch of {where} at {branch.share:g} ended at {branch.val_bpb}"
            for branch in record.cooled[:-1]
            if not math.isfinite(branch.val_bpb)
        ]
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
