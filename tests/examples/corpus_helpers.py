"""What the tests of the corpus share."""

from pathlib import Path

import torch

from corpus import Corpus, Tokens, prepare_corpus


def ids(tokens: Tokens) -> list[int]:
    return tokens.windows(torch.tensor([0]), len(tokens))[0].tolist()


def content(corpus: Corpus) -> dict[str, bytes]:
    """The text of both splits."""
    decode = corpus.tokenizer.decode
    return {
        "train": decode(ids(corpus.train)),
        "validation": decode(ids(corpus.validation)),
    }


def prepare(
    source: Path, cache: Path, column: str | None = None, tokenizer: str = "bytes"
) -> Corpus:
    return prepare_corpus(
        str(source), column=column, tokenizer=tokenizer, cache=cache, sequence_len=8
    )
