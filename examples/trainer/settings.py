"""Every setting of a run: its name, its default, what it may be and what it means, once."""

import dataclasses
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from common.command_line import (
    OptionError,
    check_fields,
    choice,
    integer,
    items,
    nearest,
    number,
    option,
    optional,
    path,
    shortened,
    text,
    word_or,
)  # fmt: skip
from common.errors import UsageError
from trainer.arms import parse_arm

__all__ = [
    "PEAK_FLOPS", "QUICK", "RULE", "Files", "Machine", "SeriesConfig", "Size", "peak_flops",
]  # fmt: skip

RULE = "rule"
ByRule = Literal["rule"]
Precision = Literal["fp32", "bf16", "fp16"]
CooldownShape = Literal["1-sqrt", "linear"]
Blocks = Literal["appended", "inserted"]
Size = int | str  # a depth, or layers x width as in "4x56"

# What --quick makes of the defaults.
QUICK: dict[str, Any] = {
    "out": Path("out/quick"),
    "depths": ("2x32", "3x32", "3x48"),
    "steps": (60,),
    "lineage": None,
    "shares": (0.3, 0.4, 0.5),
    "sequence_len": 64,
    "fisher_samples": 16,
    "eval_windows": 64,
}

# Dense bfloat16 operations a second of one device, by the manufacturers' data sheets.
PEAK_FLOPS = {
    "a100": 312e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx-4090": 165e12,
}

_LARGEST_DEPTH = 20
_LARGEST_WIDTH = 8192
_LARGEST_HEAD = 64
_LARGEST_BETA = 0.999999  # those beyond it come too close to 1 for float32


def _arms(given: Any) -> tuple[str, ...]:
    try:
        names = [parse_arm(str(word)).name for word in items(given)]
    except UsageError as error:
        raise OptionError(str(error).removeprefix("--arms ")) from None
    if not names:
        raise OptionError("no way to train is named, such as scratch")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise OptionError(f"{name} stands there twice; name it once")
    return tuple(names)


def _size(given: Any) -> Size:
    layers, width = integer(1, _LARGEST_DEPTH), integer(2, _LARGEST_WIDTH)
    if isinstance(given, str) and re.fullmatch(r"\d+x\d+", given):
        first, second = given.split("x")
        return f"{layers(first)}x{width(second)}"
    value: int = layers(given)
    return value


def _sizes(given: Any) -> tuple[Size, ...]:
    try:
        if isinstance(given, str) and re.fullmatch(r"\d+-\d+", given):
            first, last = (integer(1, _LARGEST_DEPTH)(part) for part in given.split("-"))
            found: tuple[Size, ...] = tuple(range(first, last + 1))
        else:
            found = tuple(_size(part) for part in items(given))
    except ValueError:
        found = ()
    if not found:
        raise OptionError(
            f"{_together(given)} is not a series: give ascending depths from 1 to "
            f"{_LARGEST_DEPTH}, such as 2-4 or 2,3,4, or layers x width, such as 3x48,4x48"
        )
    return found


def _shares(most: float) -> Any:
    share = number(0, most, above=True)

    def parse(given: Any) -> tuple[float, ...]:
        found = tuple(share(part) for part in items(given))
        if not found or any(a >= b for a, b in pairwise(found)):
            raise OptionError(f"{_together(given)} are not ascending shares, such as 0.2,0.3,0.4")
        return found

    return parse


def _steps(given: Any) -> tuple[int, ...]:
    found = tuple(integer(1, 10_000_000)(part) for part in items(given))
    if not found:
        raise OptionError("no number is named, such as 450,240,240")
    return found


def _betas(given: Any) -> tuple[float, float]:
    try:
        first, second = (number(0, _LARGEST_BETA)(part) for part in items(given))
    except ValueError:
        raise OptionError(
            f"{_together(given)} is not a pair of numbers from 0 to {_LARGEST_BETA}, such as "
            "0.9,0.95"
        ) from None
    return first, second


def peak_flops(given: Any) -> float:
    """Operations a second, or the name of a device."""
    if isinstance(given, str) and given.lower() in PEAK_FLOPS:
        return PEAK_FLOPS[given.lower()]
    try:
        value: float = number(1, 1e18)(given)
    except OptionError as error:
        raise OptionError(f"{error}, nor a device; {nearest(str(given), PEAK_FLOPS)}") from None
    return value


def _together(given: Any) -> str:
    return shortened(given if isinstance(given, str) else ",".join(map(str, items(given))))


_SHARE = number(0, 1, above=True)
_RATE = word_or(RULE, _SHARE)
_MOST_OF_A_TWIN = 10.0
_STRENGTH = number(0, 1e12)
_WINDOWS = integer(1, 10_000_000)


@dataclass(frozen=True)
class Files:
    """What a series reads and writes.

    Args:
        out: output folder.
        data: text, CSV or parquet file or folder, or hf:NAME; ``None``: the Python files of the
            standard library.
        column: column of a table that is the text; ``None``: text for hf:NAME, a table's has to be
            named.
        tokenizer: bytes, bpe:N to train one of N tokens, or a file.
        cache: folder for the text as tokens; ``None``: data/ in the output folder.
    """

    out: Path = option(Path("out/demo"), path)
    data: str | None = option(None, optional(text))
    column: str | None = option(None, optional(text))
    tokenizer: str = option("bytes", text)
    cache: Path | None = option(None, optional(path))


@dataclass(frozen=True)
class SeriesConfig:
    """What decides the numbers of a series: equal settings and data give equal numbers.

    The defaults are the demonstration's, for two CPU cores.

    Args:
        arms: ways to train that are compared: scratch or grown, then +muon, +ewc, +subspace,
            +distill (the last three of grown); +ars or +paper, the controllers.
        depths: the sizes of the models, ascending: depths, as 2-4 or 2,3,4, or layers x width, as
            3x48,4x48,4x56.
        width_per_depth: width of a model that is named by its depth, per layer.
        head_dim: channels of an attention head, even, a divisor of every width; ``None``: the
            largest up to 64.
        parents: sizes that larger ones are grown out of, each out of the largest below it;
            ``None``: all.
        steps: of a model from scratch, trunk and cooled branch, one number for all sizes or one
            for each; ``None``: by the ratio.
        ratio: instead of steps: tokens per parameter in matrix products of a model from scratch, 8
            if neither is named; about 10 is optimal for a single model.
        cooldown: steps of a cooled branch, as a share of those of the model from scratch of the
            same size.
        cooldown_shape: how the learning rate falls to 0 in it: 1-sqrt or linear.
        lineage: cooled branches of a grown model where it and its ancestors have read so many times
            the tokens of the model from scratch of its size, the branch included. The largest is
            the model; the trunk goes on until there. The others are measured, and nothing depends
            on them. The first model of a chain is one of its own, trained as long.
        shares: instead of lineage: the same branches as shares of the steps of the model from
            scratch, its own trunk up to there and the branch. The first model of a chain is the one
            from scratch.
        scratch_shares: the same of models from scratch; the last is 1.
        grow_at: where in its parent's trunk a model grows, as a share of that trunk.
        blocks: where growing puts new blocks: appended, after the last; inserted, between the old
            ones as copies whose writes are 0.
        batch_size: sequences a step over all processes, or rule: by the size.
        sequence_len: tokens a sequence.
        lr: learning rate of the trunk, or rule.
        muon_lr: the same of Muon, for the matrices of the blocks, or rule.
        muon_adamw_lr: the same of the AdamW beside Muon, for the embedding and the head, or rule.
        rate_exponent: a named rate is that of the first of depths; of a model with N times its
            parameters in matrix products it is divided by N to this power. 0: one rate for all.
        weight_decay: decoupled, on every matrix, or rule.
        betas: of Adam.
        max_grad_norm: the norm of the gradients is clipped to it; 0 clips none.
        warmup_steps: of models that are not grown.
        ewc_strength: weight of ewc; 0 spares its Fisher pass.
        subspace_strength: weight of subspace.
        distill_strength: weight of distill.
        distill_temperature: softens what distill compares.
        fisher_samples: sequences that the Fisher information is averaged over.
        precision: fp32, bf16 or fp16, of the passes; weights and moments are fp32.
        seed: of weights, batches and Fisher sketch.
        eval_windows: validation sequences of the reported number at most.
        curve_windows: the same for the points of the validation curve.
        curve_points: points of the validation curve.

    Raises:
        OptionError: a setting is none; the message begins with its name.
    """

    arms: tuple[str, ...] = option(("scratch+ars", "grown+ars"), _arms)
    depths: tuple[Size, ...] = option(("2x40", "3x40", "3x48", "4x48"), _sizes)
    width_per_depth: int = option(64, integer(2, 1024))
    head_dim: int | None = option(None, optional(integer(2, 1024)))
    parents: tuple[Size, ...] | None = option(None, optional(_sizes))
    steps: tuple[int, ...] | None = option(None, optional(_steps))
    ratio: float = option(8.0, optional(number(0, 1000, above=True)))
    cooldown: float = option(0.1, number(0, 0.9, above=True))
    cooldown_shape: CooldownShape = option("1-sqrt", choice("1-sqrt", "linear"))
    lineage: tuple[float, ...] | None = option((1.4, 1.5), optional(_shares(_MOST_OF_A_TWIN)))
    shares: tuple[float, ...] | None = option(None, optional(_shares(_MOST_OF_A_TWIN)))
    scratch_shares: tuple[float, ...] = option((1.0,), _shares(1.0))
    grow_at: float = option(1.0, _SHARE)
    blocks: Blocks = option("appended", choice("appended", "inserted"))
    batch_size: int | ByRule = option(4, word_or(RULE, integer(1, 4096)))
    sequence_len: int = option(128, integer(8, 8192))
    lr: float | ByRule = option(3e-3, _RATE)
    muon_lr: float | ByRule = option(0.02, _RATE)
    muon_adamw_lr: float | ByRule = option(0.012, _RATE)
    rate_exponent: float = option(0.0, number(0, 1))
    weight_decay: float | ByRule = option(0.05, word_or(RULE, number(0, 10)))
    betas: tuple[float, float] = option((0.9, 0.95), _betas)
    max_grad_norm: float = option(1.0, _STRENGTH)
    warmup_steps: int = option(20, integer(0, 10_000_000))
    # Weak: both models read the same kind of text, so there is nothing to forget, and every
    # strength that was tried from 0.01 on costs (docs/equal_budgets.md).
    ewc_strength: float = option(1e-4, _STRENGTH)
    subspace_strength: float = option(1e-4, _STRENGTH)
    distill_strength: float = option(0.03, _STRENGTH)
    distill_temperature: float = option(2.0, number(0.01, 1000))
    fisher_samples: int = option(64, integer(1, 1_000_000))
    precision: Precision = option("fp32", choice("fp32", "bf16", "fp16"))
    seed: int = option(0, integer(0, 2**32 - 1))
    eval_windows: int = option(256, _WINDOWS)
    curve_windows: int = option(32, _WINDOWS)
    curve_points: int = option(10, integer(1, 100_000))

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_sizes()
        if self.steps is not None and len(self.steps) != len(self.depths):
            raise OptionError(
                f"steps: {len(self.steps)} numbers for {len(self.depths)} sizes: give one for all "
                "or one for each"
            )
        if self.steps is None and self.ratio is None:
            raise OptionError("ratio: none, and no steps: name one of them")
        self._check_branches()

    def _check_branches(self) -> None:
        if (self.lineage is None) == (self.shares is None):
            both = "none, and no shares" if self.shares is None else "beside shares, its rival"
            raise OptionError(f"lineage: {both}: name one of them")
        grows = any(arm.startswith("grown") for arm in self.arms)
        for name in ("lineage", "shares", "scratch_shares") if grows else ("scratch_shares",):
            values = getattr(self, name)
            least = math.inf if values is None else values[0]
            if least <= self.cooldown:
                raise OptionError(
                    f"{name}: {least:g} is not above the cooldown, {self.cooldown:g}, which is a "
                    "part of it: name a larger share or a shorter cooldown"
                )
        if self.scratch_shares[-1] != 1.0:
            raise OptionError(
                f"scratch_shares: the last is {self.scratch_shares[-1]:g}, not 1, the whole model "
                "from scratch: add 1"
            )

    def _check_sizes(self) -> None:
        shown = ",".join(map(str, self.depths))
        sizes = [self.layers_and_width(size) for size in self.depths]
        for before, after in pairwise(sizes):
            if before == after or before[0] > after[0] or before[1] > after[1]:
                raise OptionError(
                    f"depths: {shown} are not ascending: {after[0]} layers of width {after[1]} do "
                    f"not grow out of {before[0]} of width {before[1]}"
                )
        for _, width in sizes:
            if width % self.width_of_heads or self.width_of_heads % 2:
                raise OptionError(
                    f"head_dim: {self.width_of_heads} is no even divisor of the width {width} in "
                    f"--depths {shown}: name one, or widths that have one"
                )
        if self.parents is not None:
            strangers = [size for size in self.parents if size not in self.depths]
            if strangers:
                raise OptionError(f"parents: {strangers[0]} is not among --depths {shown}")
            if self.parents[0] != self.depths[0]:
                raise OptionError(f"parents: the first size, {self.depths[0]}, has to be there: "
                                  "every chain begins with it")  # fmt: skip

    def layers_and_width(self, size: Size) -> tuple[int, int]:
        """Of a size of the series.

        Example:
            >>> config = SeriesConfig(depths=(2, "3x192"))
            >>> [config.layers_and_width(size) for size in config.depths], config.width_of_heads
            ([(2, 128), (3, 192)], 64)
        """
        if isinstance(size, str):
            layers, width = size.split("x")
            return int(layers), int(width)
        return size, size * self.width_per_depth

    @property
    def width_of_heads(self) -> int:
        """Channels of a head, of every model: it cannot grow."""
        if self.head_dim is not None:
            return self.head_dim
        common = math.gcd(*(self.layers_and_width(size)[1] for size in self.depths))
        divisors = (n for n in range(min(common, _LARGEST_HEAD), 1, -1) if common % n == n % 2 == 0)
        return next(divisors, 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them (lists for tuples)."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class Machine:
    """What a run is done with; a run may go on with another.

    It changes rounding at most, and the device the signs of the Fisher sketch.

    Args:
        device: cpu, cuda or cuda:N.
        threads: CPU threads; numbers repeat bit by bit for one choice; ``None``: one where all
            models are narrower than 128 channels, as more hardly help there, else torch's choice.
        device_batch_size: sequences a process differentiates at a time; a step's batch is
            accumulated; ``None``: all at once.
        fsdp: divide weights, gradients, moments and penalties among the processes of torchrun, by
            torch's fully_shard; else each holds all of them, by DistributedDataParallel.
        compile: compile the models with torch.compile; the first step, in which it does, counts as
            no time.
        recompute: keep only the inputs of blocks and compute them twice: less memory, a third more
            work.
        keep: states of a model in training that are kept.
        checkpoint_seconds: between two of these: what a kill can cost at most.
        peak_flops: operations a second of one device, for the MFU, or its name, such as h100;
            ``None``: unknown, no MFU.
        tensorboard: write event files to tensorboard/ in the output folder.

    Raises:
        OptionError: a setting is none; the message begins with its name.
    """

    device: str = option("cpu", text)
    threads: int | None = option(None, optional(integer(1, 1024)))
    device_batch_size: int | None = option(None, optional(integer(1, 4096)))
    fsdp: bool = False
    compile: bool = False
    recompute: bool = False
    keep: int = option(2, integer(1, 1000))
    checkpoint_seconds: float = option(15.0, number(0, 86400))
    peak_flops: float | None = option(None, optional(peak_flops))
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
