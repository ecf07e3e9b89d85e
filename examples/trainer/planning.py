"""What a series is before it is trained: its vocabulary, its settings and its models."""

import os
from collections.abc import Sequence

from ars.models import miniseries_config
from common.errors import UsageError
from common.tables import aligned
from corpus.choice import choose_tokenizer
from corpus.pieces import Source
from trainer.plan import ModelPlan
from trainer.series import plans_of
from trainer.settings import RULE, Machine, SeriesConfig
from trainer.state import shape_of

__all__ = ["checked_plans", "models_table", "settings_table", "vocabulary_of"]

_NO_TEXT = Source("no text", {}, {}, lambda: iter(()))


def vocabulary_of(tokenizer: str) -> int:
    """Number of tokens of a tokenizer, without reading any text.

    Args:
        tokenizer: as --tokenizer takes it.

    Raises:
        UsageError: there is no such tokenizer.

    Example:
        >>> vocabulary_of("bytes"), vocabulary_of("bpe:4096")
        (256, 4096)
    """
    choice = choose_tokenizer(tokenizer)
    if isinstance(choice.identity, dict) and "bpe" in choice.identity:
        return int(choice.identity["bpe"])
    return choice.make(_NO_TEXT).vocab_size  # neither bytes nor a file look at the text


def checked_plans(config: SeriesConfig, machine: Machine, vocab_size: int) -> tuple[ModelPlan, ...]:
    """The models of a series, whose batches the processes of the run can share.

    Args:
        config: of the series.
        machine: that it is trained with.
        vocab_size: number of token values.

    Raises:
        UsageError: the settings make no series, or a batch cannot be divided.
    """
    plans = plans_of(config, vocab_size)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    part = machine.device_batch_size
    for plan in plans:
        batch = plan.settings.batch_size
        by_rule = f", d{plan.depth}'s by rule," if config.batch_size == RULE else ""
        if batch % world:
            raise UsageError(
                f"--batch-size {batch}{by_rule} is not divisible by the {world} processes of the "
                "run: name a multiple of them"
            )
        share = batch // world
        if part is not None and share % part:
            raise UsageError(
                f"--device-batch-size {part} does not divide the {share} sequences a step"
                f"{by_rule} of a process: name one that does"
            )
    return plans


def settings_table(plans: Sequence[ModelPlan], vocab_size: int, sequence_len: int) -> str:
    """What the depth of each model decides, by rule or as the user named it, a line a depth.

    Args:
        plans: of the series.
        vocab_size: number of token values.
        sequence_len: tokens a sequence.
    """
    rows: list[Sequence[str]] = [(
        "depth", "width", "heads", "parameters", "in products", "sequences", "tokens a step",
        "lr", "Muon lr", "beside it", "decay",
    )]  # fmt: skip
    for depth, chosen in {plan.depth: plan.settings for plan in plans}.items():
        shape = shape_of(depth, vocab_size, sequence_len)
        rows.append((
            f"d{depth}",
            f"{miniseries_config(depth).n_embd}",
            f"{depth}",
            f"{shape.params:,}",
            f"{shape.scaling_params:,}",
            f"{chosen.batch_size}",
            f"{chosen.batch_size * sequence_len:,}",
            f"{chosen.lr:.3g}",
            f"{chosen.muon_lr:.3g}",
            f"{chosen.muon_adamw_lr:.3g}",
            f"{chosen.weight_decay:.3g}",
        ))  # fmt: skip
    return aligned(rows)


def models_table(
    plans: Sequence[ModelPlan],
    sequence_len: int,
    header: Sequence[str] = (),
    cells: Sequence[Sequence[str]] | None = None,
) -> str:
    """What each model is trained on and costs, a line a model.

    Args:
        plans: of the series.
        sequence_len: tokens a sequence.
        header: of more columns.
        cells: of these, for each model.
    """
    rows = [["model", "trunk", "cooled", "tokens", "Fisher", "growth", "FLOPs", "lineage FLOPs",
             *header]]  # fmt: skip
    for plan, more in zip(plans, cells or [()] * len(plans), strict=True):
        rows.append([
            plan.name,
            f"{plan.trunk}",
            f"{plan.cooldown}",
            f"{plan.steps * plan.settings.batch_size * sequence_len:,}",
            f"{plan.fisher_flops:.2e}" if plan.fisher_flops else "-",
            f"{plan.growth_flops:.2e}" if plan.growth_flops else "-",
            f"{plan.flops + plan.fisher_flops + plan.growth_flops:.2e}",
            f"{plan.lineage_flops:.2e}",
            *more,
        ])  # fmt: skip
    return aligned(rows)
