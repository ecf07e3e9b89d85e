"""Which tokenizer: what ``--tokenizer`` names, and what a run has kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Inner
from tokenizers import models

from corpus.bpe import SMALLEST_VOCABULARY, BPETokenizer, byte_level, train_bpe
from corpus.pieces import Source
from corpus.tokenizer import BYTES, ByteTokenizer, Tokenizer
from trainer.errors import UsageError

__all__ = ["TokenizerChoice", "choose_tokenizer", "load_tokenizer"]

_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer that may not have been made yet.

    Args:
        identity: JSON value that, with the source, decides which tokenizer it is.
        make: makes it, given the source.
    """

    identity: Any
    make: Callable[[Source], Tokenizer]


def choose_tokenizer(name: str) -> TokenizerChoice:
    """The tokenizer that ``--tokenizer`` names.

    Args:
        name: ``"bytes"``; ``"bpe:N"`` to train one of N tokens on the text; a ``tokenizer.json``;
            or a folder with one, or with GPT-2's ``vocab.json`` and ``merges.txt``
            (``encoder.json`` and ``vocab.bpe``).

    Raises:
        UsageError: there is no such tokenizer, or it cannot be used.
    """
    if name == "bytes":
        return TokenizerChoice("bytes", lambda _: ByteTokenizer())
    if name == "bpe" or name.startswith("bpe:"):
        size = name[len("bpe:") :]
        if not (size.isascii() and size.isdigit() and int(size) >= SMALLEST_VOCABULARY):
            raise UsageError(
                f"--tokenizer {name} needs a number of tokens of at least {SMALLEST_VOCABULARY}: "
                "use bpe:4096, for example"
            )
        return TokenizerChoice({"bpe": int(size)}, partial(train_bpe, vocab_size=int(size)))
    tokenizer = _read(Path(name), f"--tokenizer {name}")
    return TokenizerChoice({"file": tokenizer.sha256}, lambda _: tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that its ``save`` wrote.

    Args:
        path: the file.

    Raises:
        UsageError: the file is missing or holds no tokenizer.
    """
    try:
        is_bytes = path.read_bytes() == BYTES.encode()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): name another") from None
    return ByteTokenizer() if is_bytes else _read(path, str(path))


def _read(path: Path, label: str) -> BPETokenizer:
    if not path.exists():
        raise UsageError(
            f"{label} does not exist: use bytes, bpe:N, a tokenizer.json, or a folder with "
            "vocab.json and merges.txt"
        )
    try:
        inner = _read_folder(path, label) if path.is_dir() else _read_file(path)
    except UsageError:
        raise
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{label} is no tokenizer of the tokenizers library ({reason}): name a tokenizer.json, "
            "or the folder with vocab.json and merges.txt"
        ) from None
    try:
        return BPETokenizer(inner)
    except ValueError as error:
        raise UsageError(f"{label} cannot be used, {error}: use one like GPT-2's") from None


def _read_file(path: Path) -> Inner:
    return Inner.from_str(path.read_text(encoding="utf-8"))


def _read_folder(folder: Path, label: str) -> Inner:
    if (folder / "tokenizer.json").exists():
        return _read_file(folder / "tokenizer.json")
    for vocabulary, merges in _GPT2_FILES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return byte_level(models.BPE.from_file(str(folder / vocabulary), str(folder / merges)))
    raise UsageError(
        f"{label} is a folder without a tokenizer: it must hold tokenizer.json, vocab.json and "
        "merges.txt, or encoder.json and vocab.bpe"
    )
