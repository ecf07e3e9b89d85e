"""From what the user named to tokens ready for training: the one entry point."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UsageError
from corpus.sources import open_source
from corpus.text_files import go_on
from corpus.token_cache import open_cache
from corpus.tokenizer import Tokenizer, choose_tokenizer
from corpus.tokens import Tokens

__all__ = ["Corpus", "prepare_corpus"]

_SHARD_TOKENS = 100_000_000
_SEQUENCES = 10  # the fewest a text must hold: the last tenth is then one


@dataclass(frozen=True)
class Corpus:
    """A training and a validation text as tokens.

    Args:
        train: N tokens.
        validation: M tokens, of other documents.
        tokenizer: made them.
        sha256: digest of the tokens of both splits and of the tokenizer.
        facts: what to record about it (JSON values; no path of this machine).
    """

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    sha256: str
    facts: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """V: tokens are 0, ..., V - 1."""
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> Tensor:
        """(V,) int64: bytes that each token stands for, 0 for special ones.

        Bits per byte are the nats of all targets / ln 2 / the sum of ``token_bytes`` over them.
        """
        return self.tokenizer.token_bytes


def prepare_corpus(
    source: str | None,
    *,
    column: str | None = None,
    tokenizer: str = "bytes",
    cache: Path,
    sequence_len: int,
    shard_tokens: int = _SHARD_TOKENS,
    progress: Callable[[int, int | None], None] = lambda done, size: None,
    between: Callable[[], None] = go_on,
) -> Corpus:
    """Tokenise a text into memory-mapped files, or find it tokenised.

    Args:
        source: what ``--data`` names, see `corpus.sources.open_source`; ``None`` for the built-in
            text.
        column: of tables, see there.
        tokenizer: see `corpus.tokenizer.choose_tokenizer`.
        cache: folder for the tokens; created if absent. Its content may be deleted at any time
            but during a run.
        sequence_len: tokens a sequence; the text must hold ten and their targets.
        shard_tokens: tokens a file at most.
        progress: called with the bytes of text done and the bytes of all files (``None`` if
            unknown) while tokenising; may raise to stop.
        between: called between the blocks of what is read besides, and while waiting for another
            process that tokenises the same; may raise to stop.

    Raises:
        UsageError: the text, the column, the tokenizer or the cache cannot be used, or the text
            is too short.
    """
    chosen = choose_tokenizer(tokenizer)
    text = open_source(source, column, between)
    if text.size == 0:
        raise UsageError(_too_short(text.label, "is empty", sequence_len))
    splits, used, manifest = open_cache(
        text, chosen, cache, shard_tokens=shard_tokens, progress=progress, between=between
    )
    unit = "bytes" if used.name == "bytes" else "tokens"
    count = sum(len(tokens) for tokens in splits.values())
    if count < _SEQUENCES * (sequence_len + 1):
        what = f"has {count} {unit}" if count else "is empty"
        raise UsageError(_too_short(text.label, what, sequence_len))
    for name, tokens in splits.items():
        if len(tokens) < sequence_len + 1:
            raise UsageError(
                f"{text.label} has {len(tokens)} {unit} in its {name} documents, but "
                f"--sequence-len {sequence_len} needs at least {sequence_len + 1}: "
                "give more documents, one text file, or a smaller --sequence-len"
            )
    facts = {**text.facts, "tokenizer": used.name, "vocab_size": used.vocab_size}
    for name, split in manifest["splits"].items():
        facts |= {f"{name}_{what}": split[what] for what in ("documents", "bytes", "tokens")}
    return Corpus(splits["train"], splits["validation"], used, manifest["sha256"], facts)


def _too_short(label: str, what: str, sequence_len: int) -> str:
    needed = _SEQUENCES * (sequence_len + 1)
    return (
        f"{label} {what}, but --sequence-len {sequence_len} needs at least {needed}: "
        "give a longer file or a smaller --sequence-len"
    )
