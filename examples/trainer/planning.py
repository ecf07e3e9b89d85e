"""What a series is before it is trained: its vocabulary and the settings of every depth."""

from collections.abc import Sequence

from corpus.choice import choose_tokenizer
from corpus.pieces import Source
from trainer.config import SeriesConfig
from trainer.rules import settings_of
from trainer.state import shape_of

__all__ = ["aligned", "settings_table", "vocabulary_of"]

_WIDTH_PER_DEPTH = 64
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


def settings_table(config: SeriesConfig, vocab_size: int) -> str:
    """What the depth of each model decides, by rule or as the user named it, a line a depth.

    Args:
        config: of the series.
        vocab_size: number of token values.
    """
    rows: list[Sequence[str]] = [(
        "depth", "width", "heads", "parameters", "in products", "sequences", "tokens a step",
        "lr", "Muon lr", "beside it", "decay",
    )]  # fmt: skip
    for depth in config.depths:
        shape = shape_of(depth, vocab_size, config.sequence_len)
        chosen = settings_of(depth, config)
        rows.append((
            f"d{depth}",
            f"{_WIDTH_PER_DEPTH * depth}",
            f"{depth}",
            f"{shape.params:,}",
            f"{shape.scaling_params:,}",
            f"{chosen.batch_size}",
            f"{chosen.batch_size * config.sequence_len:,}",
            f"{chosen.lr:.3g}",
            f"{chosen.muon_lr:.3g}",
            f"{chosen.muon_adamw_lr:.3g}",
            f"{chosen.weight_decay:.3g}",
        ))  # fmt: skip
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first column to the left and the others to the right.

    Args:
        rows: of equally many cells.

    Example:
        >>> print(aligned([("a", "b"), ("long", "22")]), end="")
        a      b
        long  22
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip() + "\n")
    return "".join(lines)
