"""From any text to memory-mapped token shards, and from a cursor to a batch."""

from corpus.prepare import Corpus, prepare_corpus
from corpus.tokens import Tokens, batch, rows_per_epoch, validation_windows

__all__ = [
    "Corpus", "Tokens", "batch", "prepare_corpus", "rows_per_epoch", "validation_windows",
]  # fmt: skip
