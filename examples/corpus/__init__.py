"""From any text to memory-mapped token shards, and from a cursor to a batch."""

from corpus.order import batch, rows_per_epoch, validation_windows
from corpus.prepare import Corpus, prepare_corpus
from corpus.tokens import Tokens

__all__ = [
    "Corpus",
    "Tokens",
    "batch",
    "prepare_corpus",
    "rows_per_epoch",
    "validation_windows",
]
