r"""What a grown series costs beside the same models from scratch, and what its growth was worth.

A *member* is a model of the series; its *twin* is the model from scratch of the same size, with the
same optimizer and controller, trained in full. Every member is wanted, so a trunk that a child
grows out of is no extra: it is its own model's. A member pays its trunk, one cooled branch, its
growth and its Fisher pass; branches at smaller shares are measurements. The first member is its own
twin, or one that is trained for longer, for what grows out of it.

    paid    = sum over members of what they pay / sum of their twins' operations
    saving  = 1 - paid

That is a saving *at equal loss* only if every member of every seed ends at or below its twin. Where
a trunk has branches at several shares of the twin's steps, the share at which the losses are equal
is interpolated (`analysis.equal_loss`).

In the account of a *single model* everything that went into it counts, its whole lineage.

The transfer efficiency e says what a token of the parent's trunk is worth in tokens of the child.
With growth factor g (parameters in products, child over parent), the cooled share c of the tokens,
the share at equal loss s* and what the method adds, delta (of the twin's operations),

    s* = 1 - (1 - c) e / g + delta
    S  = ((1 - c) e / g - delta) (1 - w),      w = (g^2 - 1) / (g^(2n) - 1)

is the saving of a series of n members with tokens in proportion to the parameters, whose first one
takes the share w. The formula takes every parent for as good as its twin: a chain whose first
member was trained for longer says nothing of e.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from analysis.comparisons import PLAIN, twin_of
from analysis.equal_loss import ABOVE, AT_MOST, EXACT, Bounded, equal_share, mean_of
from analysis.records import Cooled, Record, chain, sizes_of, without_nan
from common.statistics import MIN_SEEDS, Estimate, count_seeds
from common.tables import markdown

__all__ = [
    "ACCOUNT_NOTE", "AT_LEAST", "BELOW", "MemberAccount", "SeriesAccount", "account_of",
    "describe_account", "find_accounts", "formula_saving", "own_accounts", "transfer_efficiency",
]  # fmt: skip

AT_LEAST, BELOW = "at least", "below"
_OF_EFFICIENCY = {EXACT: EXACT, AT_MOST: AT_LEAST, ABOVE: BELOW}  # less share, more efficiency
ACCOUNT_NOTE = (
    "Twin: the model from scratch of the same size, trained in full. Paid: own trunk, cooled "
    "branch, growth and Fisher pass, in operations, as a share of the twin's. Equal at: the share "
    "of the twin's steps at which the cooled member has the twin's loss. With lineage: all "
    "operations that went into the member."
)


def formula_saving(e: float, g: float, c: float, n: int, delta: float = 0.0) -> float:
    """The share S of a series' operations that growing saves, by the formula of this module.

    Args:
        e: transfer efficiency.
        g: growth factor, parameters of a member over those of the one before, >= 1.
        c: cooled share of a model's tokens, in [0, 1).
        n: members, >= 1.
        delta: what the method adds, as a share of a twin's operations.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> [f"{formula_saving(e, 1.3, 0.1, 100):.0%}" for e in (0.5, 0.75, 1)]
        ['35%', '52%', '69%']
        >>> formula_saving(1.0, 2.0, 0.2, 1)
        0.0
    """
    _check_shape(g, c)
    if n < 1:
        raise ValueError(f"a series has at least 1 member, got {n}")
    first = 1 / n if g == 1 else 1 / sum(g ** (2 * k) for k in range(n))
    return ((1 - c) * e / g - delta) * (1 - first)


def transfer_efficiency(share: float, g: float, c: float, delta: float = 0.0) -> float:
    """The efficiency e of a growth, by the formula of this module.

    Args:
        share: of the twin's operations at equal loss.
        g: growth factor, >= 1.
        c: cooled share of the twin's tokens, in [0, 1).
        delta: of the share, what the method added; 0 where the share is one of steps.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> round(transfer_efficiency(0.4, g=1.2, c=0.1), 3)
        0.8
    """
    _check_shape(g, c)
    return (1 - share + delta) * g / (1 - c)


def _check_shape(g: float, c: float) -> None:
    if not 1 <= g < math.inf:
        raise ValueError(f"g, the growth factor, must be at least 1 and finite, got {g}")
    if not 0 <= c < 1:
        raise ValueError(f"c, the cooled share, must lie in [0, 1), got {c}")


@dataclass(frozen=True)
class MemberAccount:
    """One size of a series beside its twins, over the seeds; shares are of the twin's.

    Args:
        size: label.
        params: in matrix products.
        is_twin: whether it is its own twin.
        growth_factor: g; ``None`` without a parent.
        loss: bits per byte.
        twin_loss: bits per byte of the twin.
        difference: loss minus the twin's, paired by seed; no number if either diverged.
        worse: seeds in which it ended above its twin.
        diverged: seeds in which it or its twin diverged.
        paid: operations.
        added: of these, what the method adds: growth, Fisher pass, and in each step penalties, a
            teacher or another optimizer.
        seconds: of training; ``None`` where none were measured.
        tokens: it was trained on itself.
        lineage_flops: operations of everything that went into it.
        lineage_tokens: it and its ancestors were trained on.
        twin_flops: operations of the twin, mean.
        branches: share of the steps and bits per byte of its cooled branches, the member last;
            those that all seeds have.
        equal_steps: share of the steps at equal loss; ``None`` without one.
        equal_flops: share of the operations at equal loss; ``None`` without one.
        efficiency: e; ``None`` without a parent or a share at equal loss, beside twins of another
            optimizer, and in a chain whose first member is trained for longer than its twin.
    """

    size: str
    params: int
    is_twin: bool
    growth_factor: float | None
    loss: Estimate
    twin_loss: Estimate
    difference: Estimate
    worse: int
    diverged: int
    paid: Estimate
    added: Estimate
    seconds: Estimate | None
    tokens: Estimate
    lineage_flops: Estimate
    lineage_tokens: Estimate
    twin_flops: float
    branches: tuple[tuple[float, Estimate], ...]
    equal_steps: Bounded | None
    equal_flops: Bounded | None
    efficiency: Bounded | None


@dataclass(frozen=True)
class SeriesAccount:
    """A grown series beside its twins.

    Args:
        arm: how the members were trained.
        baseline: how the twins were trained.
        seeds: in which all members and twins are there.
        left_out: further seeds, in which some are not.
        members: in the order they grow out of each other.
        paid: operations, as a share of all twins'.
        seconds: the same of seconds; ``None`` where none were measured.
        tokens: the same of tokens.
        growth_factor: geometric mean of the members'.
        efficiency: e, the mean of the members'; ``None`` unless all have one.
    """

    arm: str
    baseline: str
    seeds: int
    left_out: int
    members: tuple[MemberAccount, ...]
    paid: Estimate
    seconds: Estimate | None
    tokens: Estimate
    growth_factor: float
    efficiency: Bounded | None

    @property
    def has_own_twins(self) -> bool:
        """Whether the twins have the optimizer and controller of the members."""
        return self.baseline == twin_of(self.arm)

    @property
    def saving(self) -> Estimate:
        """S, the share of all twins' operations that was not paid."""
        return Estimate.of([1 - value for value in self.paid.values])

    @property
    def compared(self) -> int:
        """Number of members that are not their own twins, over all seeds."""
        return sum(not member.is_twin for member in self.members) * self.seeds

    @property
    def worse(self) -> int:
        """How many of these ended above their twin."""
        return sum(member.worse for member in self.members)

    @property
    def diverged(self) -> int:
        """In how many of these the member or its twin diverged."""
        return sum(member.diverged for member in self.members)

    @property
    def at_equal_loss(self) -> bool:
        """Whether every member of every seed ended at or below its twin."""
        return not (self.worse or self.diverged)

    @property
    def deficit(self) -> float:
        """The largest mean difference to the twins of a grown size; NaN if one diverged."""
        found = [m.difference.mean for m in self.members if not m.is_twin]
        return math.nan if self.diverged else max(found)

    @property
    def sentences(self) -> list[str]:
        """The account in words."""
        first, last = self.members[0], self.members[-1]
        seconds = "" if self.seconds is None else f" and {self.seconds.mean:.0%} of their seconds"
        lines = [
            f"The series {first.size} ... {last.size} ({self.arm}) took {self.paid.mean:.0%} of "
            f"its twins' operations ({self.baseline}){seconds}: {self._verdict()}.",
            f"That is the whole series. {last.size} alone, with everything it grew out of, cost "
            f"{last.lineage_flops.mean:.2f} of its twin's operations, and its lineage has read "
            f"{last.lineage_tokens.mean:.2f} times its twin's tokens.",
        ]
        if self.efficiency is not None and self.efficiency.bound != BELOW:
            lines.append(
                f"A token of a parent's trunk was worth {self.efficiency:.2f} of a child's "
                f"(transfer efficiency e, at a growth factor of {self.growth_factor:.2f})."
            )
        seeds = count_seeds(self.seeds)
        if self.seeds < MIN_SEEDS:
            lines.append(f"An example, not a proof: {seeds}.")
        if self.left_out:
            lines.append(
                f"Only {seeds} of {self.seeds + self.left_out} have every member and twin."
            )
        return lines

    def _verdict(self) -> str:
        if self.diverged:
            return f"no saving is claimed, as {self.diverged} of {self.compared} pairs diverged"
        if self.worse:
            return (
                f"no saving is claimed, as this is at unequal loss, {self.worse} of "
                f"{self.compared} models end above their twins (largest mean difference "
                f"{self.deficit:+.4f} bits per byte)"
            )
        saving = self.saving.mean
        ends = f"all {self.compared} models compared end at or below their twins"
        if self.compared == 1:
            ends = "the one model compared ends at or below its twin"
        return f"{abs(saving):.0%} {'saved' if saving >= 0 else 'more'} at equal loss, {ends}"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A table: the header, a row a member, and the whole series."""
        rows: list[tuple[str, ...]] = [(
            "member", "parameters", "growth", "twin's loss", "its loss", "difference", "paid",
            "equal at", "with lineage",
        )]  # fmt: skip
        for m in self.members:
            rows.append((
                m.size,
                f"{m.params:,}",
                "from scratch" if m.growth_factor is None else f"x {m.growth_factor:.2f}",
                _bits(m.twin_loss, ".4f"),
                _bits(m.loss, ".4f"),
                "" if m.is_twin or m.diverged else m.difference.plus_minus("+.4f"),
                f"{m.paid.mean:.2f}",
                "" if m.is_twin or m.equal_steps is None else f"{m.equal_steps:.2f}",
                f"{m.lineage_flops.mean:.2f}",
            ))  # fmt: skip
        total = f"{self.paid.mean:.2f}"
        return [*rows, ("series", "", "", "", "", "", total, "", "")]

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        found: dict[str, Any] = without_nan({
            **asdict(self),
            "saving": asdict(self.saving),
            "at_equal_loss": self.at_equal_loss,
            "worse": self.worse,
            "compared": self.compared,
            "deficit": self.deficit,
        })  # fmt: skip
        return found


def _bits(loss: Estimate, form: str) -> str:
    return loss.plus_minus(form) if math.isfinite(loss.mean) else "diverged"


@dataclass(frozen=True)
class _Pair:
    """A member and its twin in one seed."""

    ours: Record
    twin: Cooled
    gives_efficiency: (
        bool  # the twin has its optimizer, and the chain's first member is its own twin
    )
    is_twin: bool
    params: int
    growth_factor: float | None
    cooldown: float
    lineage_tokens: int

    @classmethod
    def of(cls, ours: Record, parent: Record | None, theirs: Record | None) -> "_Pair | None":
        """``None`` where the twin is missing, or the records do not say enough."""
        twin = None if theirs is None else _in_full(theirs)
        params, inherited = ours.scaling_params, None if parent is None else parent.scaling_params
        if theirs is None or twin is None or (parent is not None and inherited is None):
            return None
        if not (params and ours.full_steps and ours.cooldown_steps and ours.lineage_tokens):
            return None
        same = (ours.name, ours.flops, ours.val_bpb) == (theirs.name, twin.flops, twin.val_bpb)
        return cls(
            ours=ours,
            twin=twin,
            gives_efficiency=theirs.arm == twin_of(ours.arm),
            is_twin=same,
            params=params,
            growth_factor=None if inherited is None else params / inherited,
            cooldown=ours.cooldown_steps / ours.full_steps,
            lineage_tokens=ours.lineage_tokens,
        )

    @property
    def difference(self) -> float:
        """Bits per byte above the twin; not finite if either diverged."""
        return self.ours.val_bpb - self.twin.val_bpb

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.difference)

    @property
    def equal_steps(self) -> Bounded | None:
        return self._equal([branch.share for branch in self.ours.cooled])

    @property
    def equal_flops(self) -> Bounded | None:
        extra = self.ours.own_flops - self.ours.flops
        return self._equal([(b.flops + extra) / self.twin.flops for b in self.ours.cooled])

    def _equal(self, shares: Sequence[float]) -> Bounded | None:
        if self.diverged:
            return None
        losses = [branch.val_bpb for branch in self.ours.cooled]
        return equal_share(list(zip(shares, losses, strict=True)), self.twin.val_bpb)

    @property
    def efficiency(self) -> Bounded | None:
        share = self.equal_steps
        if share is None or self.growth_factor is None or not self.gives_efficiency:
            return None
        # Of steps, so that what the method adds is not in it.
        e = transfer_efficiency(share.value, self.growth_factor, self.cooldown)
        return Bounded(e, _OF_EFFICIENCY[share.bound])


def _in_full(record: Record) -> Cooled | None:
    """The branch of a model from scratch that has all of its steps."""
    if record.full_steps is None or record.parent is not None:
        return None
    return next((branch for branch in record.cooled if branch.share == 1.0), None)


def account_of(
    arm: str, baseline: str, records: Sequence[Record], twins: Sequence[Record]
) -> SeriesAccount | None:
    """The account of one arm; ``None`` if no seed has all members and all twins.

    Args:
        arm: of the members; their ancestors of other arms are members too.
        baseline: arm of the twins.
        records: with the members of one or more seeds.
        twins: records with the twins of the same seeds, which may be the same ones.
    """
    by_size = {(r.size, r.seed): r for r in twins if r.arm == baseline}
    seeds = list(dict.fromkeys(r.seed for r in records if r.arm == arm))
    members = {seed: chain(records, arm, seed) for seed in seeds}
    sizes = sizes_of(r for found in members.values() for r in found)
    complete: list[list[_Pair]] = []
    for seed, found in members.items():
        by_name = {r.name: r for r in found}
        pairs = [
            _Pair.of(r, by_name.get(r.parent or ""), by_size.get((r.size, seed)))
            for r in sorted(found, key=lambda r: sizes.index(r.size))
        ]
        known = [pair for pair in pairs if pair is not None]
        if len(known) == len(sizes):
            if not known[0].is_twin:  # the formula takes parents for as good as their twins
                known = [replace(pair, gives_efficiency=False) for pair in known]
            complete.append(known)
    factors = [pair.growth_factor for pair in complete[0] if pair.growth_factor] if complete else []
    if not factors:
        return None
    return SeriesAccount(
        arm=arm,
        baseline=baseline,
        seeds=len(complete),
        left_out=len(seeds) - len(complete),
        members=tuple(map(_member, zip(*complete, strict=True))),
        paid=_paid(complete),
        seconds=_seconds(complete),
        tokens=_share(complete, lambda p: p.ours.tokens, lambda p: p.twin.tokens),
        growth_factor=math.prod(factors) ** (1 / len(factors)),
        efficiency=_mean([
            _mean([pair.efficiency for pair in pairs if pair.growth_factor is not None])
            for pairs in complete
        ]),
    )  # fmt: skip


def _share(
    seeds: Sequence[Sequence[_Pair]],
    ours: Callable[[_Pair], float],
    theirs: Callable[[_Pair], float],
) -> Estimate:
    """What the members add up to, as a share of what their twins do."""
    return Estimate.of([sum(map(ours, pairs)) / sum(map(theirs, pairs)) for pairs in seeds])


def _paid(seeds: Sequence[Sequence[_Pair]]) -> Estimate:
    return _share(seeds, lambda p: p.ours.own_flops, lambda p: p.twin.flops)


def _seconds(seeds: Sequence[Sequence[_Pair]]) -> Estimate | None:
    if not all(pair.twin.seconds for pairs in seeds for pair in pairs):
        return None
    return _share(seeds, lambda p: p.ours.seconds, lambda p: p.twin.seconds)


def _mean(numbers: Sequence[Bounded | None]) -> Bounded | None:
    """The mean of numbers that are all known."""
    known = [number for number in numbers if number is not None]
    return mean_of(known) if len(known) == len(numbers) else None


def _member(pairs: Sequence[_Pair]) -> MemberAccount:
    alone = [[pair] for pair in pairs]
    first = pairs[0]
    paid = _paid(alone)
    steps = [p.ours.tokens / p.twin.tokens for p in pairs]
    curves = [{branch.share: branch.val_bpb for branch in p.ours.cooled} for p in pairs]
    shares = [share for share in curves[0] if all(share in curve for curve in curves)]
    return MemberAccount(
        size=first.ours.size,
        params=first.params,
        is_twin=all(pair.is_twin for pair in pairs),
        growth_factor=first.growth_factor,
        loss=Estimate.of([p.ours.val_bpb for p in pairs]),
        twin_loss=Estimate.of([p.twin.val_bpb for p in pairs]),
        difference=Estimate.of([pair.difference for pair in pairs]),
        worse=sum(pair.difference > 0 for pair in pairs),
        diverged=sum(pair.diverged for pair in pairs),
        paid=paid,
        added=Estimate.of([p - s for p, s in zip(paid.values, steps, strict=True)]),
        seconds=_seconds(alone),
        tokens=Estimate.of(steps),
        lineage_flops=_share(alone, lambda p: p.ours.lineage_flops, lambda p: p.twin.flops),
        lineage_tokens=_share(alone, lambda p: p.lineage_tokens, lambda p: p.twin.tokens),
        twin_flops=Estimate.of([p.twin.flops for p in pairs]).mean,
        branches=tuple((s, Estimate.of([curve[s] for curve in curves])) for s in shares),
        equal_steps=_mean([pair.equal_steps for pair in pairs]),
        equal_flops=_mean([pair.equal_flops for pair in pairs]),
        efficiency=_mean([pair.efficiency for pair in pairs]),
    )


def find_accounts(records: Sequence[Record]) -> list[SeriesAccount]:
    """The account of every grown arm beside its twins, and beside those of plain AdamW.

    Args:
        records: of one or more seeds.
    """
    found = []
    for arm in dict.fromkeys(r.arm for r in records if r.parent is not None):
        for baseline in dict.fromkeys([twin_of(arm), PLAIN]):
            found.append(account_of(arm, baseline, records, records))
    return [account for account in found if account is not None]


def own_accounts(accounts: Sequence[SeriesAccount]) -> list[SeriesAccount]:
    """One account an arm: beside its own twins, or else beside those that are there."""
    found: dict[str, SeriesAccount] = {}
    for account in sorted(accounts, key=lambda account: not account.has_own_twins):
        found.setdefault(account.arm, account)
    return list(found.values())


def describe_account(records: Sequence[Record]) -> str:
    """All accounts as Markdown: what each says and its table; how to get one if there is none.

    Args:
        records: of one or more seeds.
    """
    accounts = find_accounts(records)
    if not accounts:
        return (
            "No series account: it takes a chain of grown models and, of each of their sizes, a "
            "model from scratch with the same optimizer, trained in full.\n"
        )
    parts = []
    for account in accounts:
        table = markdown(account.rows, "lrlr", padded=True)
        parts += [" ".join(account.sentences), table]
    return "\n\n".join([*parts, ACCOUNT_NOTE]) + "\n"
