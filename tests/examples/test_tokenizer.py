"""Byte-pair encoding: exact for every input, the same in pieces, the same everywhere."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus_helpers import content, ids, prepare
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from common.errors import UsageError
from corpus import Corpus, pieces, prepare_corpus
from corpus import tokenizer as tokenizer_module
from corpus.sources import library_source, open_source
from corpus.tokenizer import BPETokenizer, ByteTokenizer, choose_tokenizer, load_tokenizer

VOCABULARY = 400
TEXTS = [
    b"",
    b" ",
    b"plain words, twice: plain words",
    "räksmörgås A\u0308 \ufb01 日本語 🙂\u00a0\u3000x".encode(),
    b"\r\n\t  \n\n  \x00",
    b"a <|endoftext|> that is spelt out<|endoftext|>",
    bytes(range(256)),
    b"cut in the middle: " + "é".encode()[:1],
    "日".encode()[1:] + b" and at the front",
    b"\xed\xa0\x80 a surrogate",
    b"\xff" * 9,
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the standard library: prose, code and other scripts."""
    parts = [piece.content for piece in library_source().pieces()]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(parts)[:300_000] + "räksmörgås 日本語 ".encode() * 99)
    return path


@pytest.fixture(scope="module")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(text, tmp_path_factory.mktemp("cache"), tokenizer=f"bpe:{VOCABULARY}")


@pytest.fixture(scope="module")
def inner(corpus: Corpus) -> dict[str, Any]:
    """The trained tokenizer as the ``tokenizers`` library writes it."""
    assert isinstance(corpus.tokenizer, BPETokenizer)
    return json.loads(corpus.tokenizer._inner.to_str())


def test_every_byte_is_in_exactly_one_token(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer
    generator = np.random.default_rng(0)
    texts = TEXTS + [generator.bytes(size) for size in range(1, 200, 7)]
    for text, tokens in zip(texts, tokenizer.encode_all(texts), strict=True):
        assert tokenizer.decode(tokens) == text
        assert tokenizer.separator not in tokens
        assert int(corpus.token_bytes[tokens.astype(np.int64)].sum()) == len(text)
        assert np.array_equal(tokenizer.encode(text), tokens)
    assert np.array_equal(tokenizer.encode("é日"), tokenizer.encode("é日".encode()))


def test_sizes_of_tokens_add_up_to_the_size_of_the_text(corpus: Corpus, text: Path) -> None:
    whole = content(corpus)
    assert whole["train"] + whole["validation"] == text.read_bytes()
    assert corpus.vocab_size == VOCABULARY == corpus.token_bytes.numel()
    for split, tokens in (("train", corpus.train), ("validation", corpus.validation)):
        sizes = corpus.token_bytes[torch.tensor(ids(tokens))]
        assert int(sizes.sum()) == len(whole[split]) == corpus.facts[f"{split}_bytes"]
        assert ids(tokens)[0] == corpus.tokenizer.separator
        assert (sizes == 0).sum() == 1
    assert corpus.token_bytes.dtype == torch.int64
    # Longer than bytes on average, or there would be nothing to gain.
    assert len(corpus.train) < 0.6 * len(whole["train"])


def test_every_document_begins_with_the_separator(tmp_path: Path) -> None:
    documents = {f"{i:03}.txt": f"document number {i} has words\n" for i in range(100)}
    for name, text in documents.items():
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    corpus = prepare(tmp_path / "texts", tmp_path / "cache", tokenizer="bpe:270")
    found = []
    for tokens in (ids(corpus.train), ids(corpus.validation)):
        borders = [i for i, token in enumerate(tokens) if token == corpus.tokenizer.separator]
        ends = [*borders[1:], len(tokens)]
        assert borders[0] == 0
        found += [corpus.tokenizer.decode(tokens[a:b]) for a, b in zip(borders, ends, strict=True)]
    assert sorted(found) == sorted(text.encode() for text in documents.values())


def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(
    corpus: Corpus, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 1000)
    parts = [piece.content for piece in pieces.document("train", text.read_bytes())]
    assert len(parts) > 200
    tokens = np.concatenate(corpus.tokenizer.encode_all(parts))
    assert np.array_equal(tokens, corpus.tokenizer.encode(text.read_bytes()))


def test_training_is_the_same_in_every_process(corpus: Corpus, text: Path) -> None:
    code = (
        "import sys; from corpus.tokenizer import choose_tokenizer; "
        "from corpus.sources import open_source; "
        f"print(choose_tokenizer('bpe:{VOCABULARY}').make(open_source(sys.argv[1], None)).sha256)"
    )
    for threads in ("1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", code, text],
            env={"PYTHONPATH": "examples", "PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == corpus.tokenizer.sha256


def test_the_sample_is_bounded_and_from_the_training_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:05}\n"}) + "\n" for i in range(20_000)))
    monkeypatch.setattr(tokenizer_module, "_SAMPLE_BYTES", 6000)
    source = open_source(str(path), "text")
    rows = [int(row) for row in tokenizer_module._sample(source)]
    assert rows == [int(row) for row in tokenizer_module._sample(source)]
    assert 200 < len(rows) <= 1000
    assert not [row for row in rows if pieces.split_of(f"{row}") == "validation"]
    assert min(rows) < 2_000
    assert max(rows) > 18_000


def test_saved_and_loaded_it_is_the_same(corpus: Corpus, tmp_path: Path) -> None:
    for tokenizer in (corpus.tokenizer, ByteTokenizer()):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(loaded) is type(tokenizer)
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.separator == tokenizer.separator
        assert all(np.array_equal(loaded.encode(t), tokenizer.encode(t)) for t in TEXTS)


def test_the_folder_of_a_tokenizer(corpus: Corpus, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    corpus.tokenizer.save(folder / "tokenizer.json")
    again = prepare(text, tmp_path / "cache", tokenizer=str(folder))
    assert again.tokenizer.separator == corpus.tokenizer.separator
    assert ids(again.train) == ids(corpus.train)
    assert torch.equal(again.token_bytes, corpus.token_bytes)


def test_what_a_file_says_beside_its_tokens_is_left_out(
    inner: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    other = Tokenizer.from_str(json.dumps(inner))
    other.enable_padding(length=100)
    other.enable_truncation(3)
    other.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    other.add_tokens(["plain words"])  # not special: it stands for its text
    other.save(str(tmp_path / "tokenizer.json"))
    tokenizer = choose_tokenizer(str(tmp_path / "tokenizer.json")).make(library_source())
    assert tokenizer.vocab_size == VOCABULARY + 1
    assert tokenizer.token_bytes[-1] == len("plain words")
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert (VOCABULARY in tokens) == (b"plain words" in text)


def write(path: Path, inner: dict[str, Any], **changes: Any) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(inner))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save(str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Strip()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ],
    ids=repr,
)
def test_a_tokenizer_that_changes_text_is_refused(
    inner: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "tokenizer.json"
    write(path, inner, **changes)
    with pytest.raises(UsageError, match=r"^--tokenizer .* cannot be used, it changes text"):
        choose_tokenizer(str(path))


def test_a_tokenizer_that_cannot_hold_or_separate_documents_is_refused(
    inner: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a")).save(str(path))
    with pytest.raises(UsageError, match=r"it has no special token <\|endoftext\|>"):
        choose_tokenizer(str(path))
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    words.add_special_tokens(["<s>"])
    words.save(str(path))
    with pytest.raises(UsageError, match="it is no byte-level BPE: some bytes have no token"):
        choose_tokenizer(str(path))
    more = json.loads(json.dumps(inner))
    more["model"]["vocab"]["日本"] = VOCABULARY
    path.write_text(json.dumps(more))
    with pytest.raises(UsageError, match="it is no byte-level BPE: some tokens are not bytes"):
        choose_tokenizer(str(path))


def test_a_tokenizer_that_loses_bytes_later_is_noticed(
    inner: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    write(tmp_path / "tokenizer.json", inner, normalizer=normalizers.Replace("import", "i"))
    with pytest.raises(UsageError, match="do not hold every byte: use bytes or bpe:N") as caught:
        prepare(text, tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bpe", "needs a number of tokens from 257 to 1048576"),
        ("bpe:99999999999", "needs a number of tokens from 257 to 1048576"),
        ("bpe:" + "9" * 5000, "needs a number of tokens from 257 to 1048576"),
        ("bpe:256", "needs a number of tokens from 257 to 1048576"),
        ("bpe:many", "needs a number of tokens from 257 to 1048576"),
        ("gpt2", "does not exist: use bytes, bpe:N, or a tokenizer.json"),
        ("empty.json", "is no tokenizer of the tokenizers library"),
        ("vocab.json", "is no tokenizer of the tokenizers library"),
        ("binary.json", "is not UTF-8 text"),
        ("folder", "is a folder without a tokenizer.json: name another"),
        ("broken", "is no tokenizer of the tokenizers library"),
    ],
)
def test_tokenizers_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").touch()
    Path("vocab.json").write_text('{"a": 0}')
    Path("binary.json").write_bytes(b"\xff\xfe")
    Path("folder").mkdir()
    Path("broken").mkdir()
    Path("broken/tokenizer.json").write_text("[")
    with pytest.raises(UsageError, match=reason) as caught:
        choose_tokenizer(name)
    assert str(caught.value).startswith(f"--tokenizer {name[:40]}")
    assert len(str(caught.value).splitlines()) == 1


def test_more_tokens_than_the_text_gives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 300)
    with pytest.raises(UsageError, match=r"^--tokenizer bpe:999 is too large for --data .* gives"):
        prepare_corpus(str(path), tokenizer="bpe:999", cache=tmp_path / "cache", sequence_len=8)
