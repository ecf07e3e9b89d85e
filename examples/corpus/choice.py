"""Which tokenizer: what ``--tokenizer`` names, and what a run has kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Inner
from tokenizers import models

from common.errors import UsageError
from common.plain_files import read_text
from corpus.bpe import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, BPETokenizer, byte_level, train_bpe
from corpus.files import reading
from corpus.tokenizer import BYTES, ByteTokenizer, Tokenizer

__all__ = ["TokenizerChoice", "choose_tokenizer", "load_tokenizer"]

_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer that may not have been made yet.

    Args:
        identity: JSON value that, with the source, decides which tokenizer it is.
        make: makes it, given the source and, if that may be stopped, what to call meanwhile.
    """

    identity: Any
    make: Callable[..., Tokenizer]


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
        return TokenizerChoice("bytes", lambda *_: ByteTokenizer())
    if name == "bpe" or name.startswith("bpe:"):
        size = _vocabulary_size(name)
        return TokenizerChoice({"bpe": size}, partial(train_bpe, vocab_size=size))
    tokenizer = _read(Path(name), f"--tokenizer {name}")
    return TokenizerChoice({"file": tokenizer.sha256}, lambda *_: tokenizer)


def _vocabulary_size(name: str) -> int:
    """The number of tokens that ``bpe:N`` asks for.

    Raises:
        UsageError: it is none, or is too small or too large.
    """
    digits = name.partition(":")[2]
    # Of more digits than the largest has, Python itself may refuse to make a number.
    shown = name if len(name) < 40 else f"{name[:40]}..."
    is_number = digits.isascii() and digits.isdigit() and len(digits) < 20
    if not (is_number and SMALLEST_VOCABULARY <= int(digits) <= LARGEST_VOCABULARY):
        raise UsageError(
            f"--tokenizer {shown} needs a number of tokens from {SMALLEST_VOCABULARY} to "
            f"{LARGEST_VOCABULARY}: use bpe:4096, for example"
        )
    return int(digits)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that its ``save`` wrote.

    Args:
        path: the file.

    Raises:
        UsageError: the file is missing or holds no tokenizer.
    """
    content = read_text(path, remedy="name another")
    return ByteTokenizer() if content == BYTES else _read(path, str(path))


def _read(path: Path, label: str) -> BPETokenizer:
    with reading(label):
        is_folder, exists = path.is_dir(), path.exists()
    if not exists:
        raise UsageError(
            f"{label} does not exist: use bytes, bpe:N, a tokenizer.json, or a folder with "
            "vocab.json and merges.txt"
        )
    try:
        inner = _read_folder(path, label) if is_folder else _read_file(path, label)
    except UsageError:
        raise
    except BaseException as error:  # the library raises nothing more specific, and may panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{label} is no tokenizer of the tokenizers library ({reason}): name a tokenizer.json, "
            "or the folder with vocab.json and merges.txt"
        ) from None
    try:
        return BPETokenizer(inner)
    except ValueError as error:
        raise UsageError(f"{label} cannot be used, {error}: use one like GPT-2's") from None


def _read_file(path: Path, label: str) -> Inner:
    return Inner.from_str(read_text(path, remedy="name a tokenizer.json", label=label))


def _read_folder(folder: Path, label: str) -> Inner:
    if (folder / "tokenizer.json").exists():
        return _read_file(folder / "tokenizer.json", label)
    for vocabulary, merges in _GPT2_FILES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            for name in (vocabulary, merges):  # which the library opens by itself
                read_text(folder / name, remedy="name a folder with both", label=label)
            return byte_level(models.BPE.from_file(str(folder / vocabulary), str(folder / merges)))
    raise UsageError(
        f"{label} is a folder without a tokenizer: it must hold tokenizer.json, vocab.json and "
        "merges.txt, or encoder.json and vocab.bpe"
    )
