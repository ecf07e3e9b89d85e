"""Tokenizers: bytes, and byte-level byte-pair encodings by the ``tokenizers`` library.

The library takes text and gives tokens; bits per byte need more: every byte of any input, valid
UTF-8 or not, in exactly one token, so that sizes of tokens add up to sizes of documents. Tokenizers
that cannot do that, because they normalise text or know only some bytes, are refused.

References:
    Radford et al., "Language models are unsupervised multitask learners", 2019 (the encoding).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from common.errors import UsageError
from common.plain_files import read_text
from corpus.pieces import Source
from corpus.text_files import go_on, reading

__all__ = [
    "BPETokenizer", "ByteTokenizer", "TokenArray", "Tokenizer", "TokenizerChoice",
    "choose_tokenizer", "load_tokenizer", "token_dtype", "train_bpe", "vocabulary_of",
]  # fmt: skip

TokenArray = npt.NDArray[Any]  # one-dimensional, of `token_dtype`
BYTES = '{"type": "bytes"}\n'  # the whole file of a byte tokenizer
SEPARATOR = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte and the separator
LARGEST_VOCABULARY = 1 << 20  # four times the largest in use; far beyond, tables take all memory
_SEPARATORS = (SEPARATOR, "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>")
_SAMPLE_BYTES = 64 << 20
_POLL_SECONDS = 0.2
# What normalizers and pre-tokenizers change: case, compositions, widths, spaces, line ends.
_PROBES = (
    " \u00c4 A\u0308 \ufb01 \uff21 It's 123 \t\r\n\n  x",
    "\u00a0\u200b\u3000 \u65e5\u672c \U0001f642 \x00 ",
    "a  b",
)
_INVALID = re.compile("([\udc80-\udcff]+)")  # what "surrogateescape" makes of undecodable bytes


class Tokenizer(Protocol):
    """Text to tokens and back, without loss: every byte belongs to exactly one token."""

    @property
    def name(self) -> str:
        """For records: ``"bytes"`` or ``"bpe"``."""

    @property
    def vocab_size(self) -> int:
        """V: tokens are 0, ..., V - 1."""

    @property
    def separator(self) -> int | None:
        """Token before every document, or ``None``; no text encodes to it."""

    @property
    def token_bytes(self) -> Tensor:
        """(V,) int64: bytes that each token stands for, 0 for special ones."""

    @property
    def sha256(self) -> str:
        """Digest of all that decides which tokens a text has."""

    def encode(self, text: bytes | str) -> TokenArray:
        """Tokens of a text, without any special ones."""

    def encode_all(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """The same of several texts, on all cores where that helps."""

    def decode(self, tokens: Sequence[int] | TokenArray | Tensor) -> bytes:
        """The bytes that tokens stand for; special ones stand for none."""

    def save(self, path: Path) -> None:
        """Write it to a file that `corpus.tokenizer.load_tokenizer` reads."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type for tokens below ``vocab_size``.

    Example:
        >>> [token_dtype(size).str for size in (256, 257, 65536, 65537)]
        ['|u1', '<u2', '<u2', '<u4']
    """
    for code, limit in (("<u1", 1 << 8), ("<u2", 1 << 16)):
        if vocab_size <= limit:
            return np.dtype(code)
    return np.dtype("<u4")


class ByteTokenizer:
    r"""A token a byte. There is no separator, so that every target is a byte of the text.

    Example:
        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
        >>> ByteTokenizer().decode([110, 195, 169])
        b'n\xc3\xa9'
    """

    name = "bytes"
    vocab_size = 256
    separator = None
    sha256 = hashlib.sha256(BYTES.encode()).hexdigest()

    @property
    def token_bytes(self) -> Tensor:
        """All ones."""
        return torch.ones(self.vocab_size, dtype=torch.int64)

    def encode(self, text: bytes | str) -> TokenArray:
        """The bytes of a text, UTF-8 if it is a ``str``."""
        content = text.encode() if isinstance(text, str) else text
        return np.frombuffer(bytearray(content), dtype=np.uint8)  # writable, as torch wants it

    def encode_all(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """The bytes of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | TokenArray | Tensor) -> bytes:
        """The tokens as bytes."""
        return bytes(np.asarray(tokens).tolist())

    def save(self, path: Path) -> None:
        """Write a file that says that tokens are bytes."""
        path.write_text(BYTES, encoding="utf-8")


class BPETokenizer:
    """A byte-level BPE of the ``tokenizers`` library.

    Args:
        inner: it; copied.

    Raises:
        ValueError: it does not keep every byte of a text, or has no token to separate documents.
    """

    name = "bpe"

    def __init__(self, inner: Inner) -> None:
        self._inner = inner = Inner.from_str(inner.to_str())
        inner.no_padding()
        inner.no_truncation()
        if inner.token_to_id(SEPARATOR) is not None:
            inner.add_special_tokens([SEPARATOR])  # some files do not say that it is special
        inner.encode_special_tokens = True  # a text that spells one out does not contain it
        added = inner.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        found = [special[content] for content in _SEPARATORS if content in special]
        if not found:
            raise ValueError(f"it has no special token {SEPARATOR} to put between documents")
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.separator = found[0]
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"it has tokens up to {self.vocab_size}, beyond {LARGEST_VOCABULARY}")
        self.sha256 = hashlib.sha256(inner.to_str().encode()).hexdigest()
        self._dtype = token_dtype(self.vocab_size)
        self._table = [b""] * self.vocab_size
        alphabet = _byte_alphabet()
        if not alphabet.keys() <= vocabulary.keys():
            raise ValueError("it is no byte-level BPE: some bytes have no token")
        try:
            for content, i in vocabulary.items():
                if i not in added:
                    self._table[i] = bytes(alphabet[character] for character in content)
                elif not added[i].special:
                    self._table[i] = content.encode()
        except KeyError:
            raise ValueError("it is no byte-level BPE: some tokens are not bytes") from None
        self._byte_tokens = np.empty(256, dtype=self._dtype)
        for character, byte in alphabet.items():
            self._byte_tokens[byte] = vocabulary[character]
        self._sizes = np.array([len(content) for content in self._table], dtype=np.int64)
        if any(self.decode(self._encode_text(probe)) != probe.encode() for probe in _PROBES):
            raise ValueError("it changes text (by a normalizer or an added space)")

    @property
    def token_bytes(self) -> Tensor:
        """(V,) int64: bytes of each token, 0 for special ones."""
        return torch.from_numpy(self._sizes.copy())

    def encode(self, text: bytes | str) -> TokenArray:
        """Tokens of a text, without any special ones; bytes that are no UTF-8 are one each."""
        return self.encode_all([text.encode() if isinstance(text, str) else text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Tokens of several texts, on all cores.

        Raises:
            ValueError: the tokens do not hold the bytes of the text.
        """
        decoded = [_decoded(text) for text in texts]
        valid = [text for text in decoded if text is not None]
        encodings = iter(self._inner.encode_batch_fast(valid, add_special_tokens=False))
        result = []
        for content, text in zip(texts, decoded, strict=True):
            if text is None:
                tokens = self._encode_invalid(content)
            else:
                tokens = np.array(next(encodings).ids, dtype=self._dtype)
            if self._sizes[tokens].sum() != len(content):
                raise ValueError(f"its tokens of {content[:40]!r}... do not hold every byte")
            result.append(tokens)
        return result

    def _encode_text(self, text: str) -> TokenArray:
        ids = self._inner.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=self._dtype)

    def _encode_invalid(self, content: bytes) -> TokenArray:
        parts = _INVALID.split(content.decode("utf-8", "surrogateescape"))
        tokens = []
        for text, invalid in zip_longest(parts[::2], parts[1::2], fillvalue=""):
            tokens.append(self._encode_text(text))
            surplus = np.frombuffer(invalid.encode("utf-8", "surrogateescape"), dtype=np.uint8)
            tokens.append(self._byte_tokens[surplus])
        return np.concatenate(tokens)

    def decode(self, tokens: Sequence[int] | TokenArray | Tensor) -> bytes:
        """The bytes that tokens stand for; special ones stand for none."""
        return b"".join(self._table[token] for token in np.asarray(tokens).tolist())

    def save(self, path: Path) -> None:
        """Write the ``tokenizer.json`` that the ``tokenizers`` library reads."""
        path.write_text(self._inner.to_str(pretty=True), encoding="utf-8")


def train_bpe(
    source: Source, between: Callable[[], None] = go_on, *, vocab_size: int
) -> BPETokenizer:
    """Train a BPE on a sample of the training documents, at most 64 MB that depend on them alone.

    Args:
        source: the text.
        between: called again and again meanwhile; may raise to stop.
        vocab_size: V, every byte and ``<|endoftext|>`` (token 0) included.

    Raises:
        UsageError: the text is too short for so many tokens.
    """
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's words
    inner.decoder = decoders.ByteLevel()
    inner.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _in_thread(lambda: inner.train_from_iterator(_sample(source), trainer), between)
    if inner.get_vocab_size() < vocab_size:
        raise UsageError(
            f"--tokenizer bpe:{vocab_size} is too large for {source.label}, which gives "
            f"{inner.get_vocab_size()} tokens: choose at most that many, or give more text"
        )
    return BPETokenizer(inner)


def _in_thread(work: Callable[[], None], between: Callable[[], None]) -> None:
    """Do what the library does in one call, which hears no signal, while this thread hears them."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        between()
    if failed:
        raise failed[0]


def _sample(source: Source) -> Iterator[str]:
    # Spread over the whole source by the hash of the position, where its size is known.
    share = 1.0 if not source.size else _SAMPLE_BYTES / source.size
    left = _SAMPLE_BYTES
    for index, piece in enumerate(source.pieces()):
        digest = hashlib.sha256(f"sample {index}".encode()).digest()
        if piece.split == "train" and int.from_bytes(digest[:8], "big") < share * 2**64:
            yield piece.content.decode("utf-8", "ignore")
            left -= len(piece.content)
            if left <= 0:
                return


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte: itself, or the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


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
        name: ``"bytes"``; ``"bpe:N"`` to train one of N tokens on the text; a ``tokenizer.json``,
            or the folder of one.

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
        is_folder = path.is_dir()
        path = path / "tokenizer.json" if is_folder else path
        exists = path.exists()
    if is_folder and not exists:
        raise UsageError(f"{label} is a folder without a tokenizer.json: name another")
    if not exists:
        raise UsageError(f"{label} does not exist: use bytes, bpe:N, or a tokenizer.json")
    content = read_text(path, remedy="name a tokenizer.json", label=label)
    try:
        inner = Inner.from_str(content)
    except BaseException as error:  # the library raises nothing more specific, and may panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{label} is no tokenizer of the tokenizers library ({reason}): name a tokenizer.json"
        ) from None
    try:
        return BPETokenizer(inner)
    except ValueError as error:
        raise UsageError(f"{label} cannot be used, {error}: use one like GPT-2's") from None


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
    no_text = Source("no text", {}, {}, lambda: iter(()))
    choice = choose_tokenizer(tokenizer)
    if isinstance(choice.identity, dict) and "bpe" in choice.identity:
        return int(choice.identity["bpe"])
    return choice.make(no_text).vocab_size  # neither bytes nor a file look at the text
