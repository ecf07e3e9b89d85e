"""Data sets of the hub, with stand-ins for the two libraries that reach it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from corpus_helpers import content

from common.errors import UsageError
from corpus import Corpus, prepare_corpus
from corpus.pieces import split_of
from corpus.sources import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]
TEXTS = [f"row {i}, " for i in range(100)]
TEXTS[3] = ""


class Hub:
    """One data set and its newest commit."""

    def __init__(self) -> None:
        self.commit = COMMIT
        self.rows: list[dict[str, Any]] = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
        self.calls: list[tuple[Any, ...]] = []
        self.fails_at = len(self.rows)

    def load_dataset(self, name: str, config: str | None, **options: Any) -> Iterator[Any]:
        self.calls.append((name, config, options))
        return self._stream()

    def _stream(self) -> Iterator[Any]:
        for i, row in enumerate(self.rows):
            if i == self.fails_at:
                raise ConnectionError("the network\nis down")
            yield row

    def dataset_info(self, name: str) -> SimpleNamespace:
        if name == "nowhere":
            raise LookupError(name)
        return SimpleNamespace(sha=self.commit)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: hub))
    return hub


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Corpus]:
    def run(name: str, column: str | None = None) -> Corpus:
        return prepare_corpus(name, column=column, cache=tmp_path / "cache", sequence_len=2)

    return run


def test_the_rows_of_a_data_set_are_its_documents(hub: Hub, prepare: Callable[..., Corpus]) -> None:
    corpus = prepare("hf:owner/name:config")
    for split, text in content(corpus).items():
        assert text.decode() == "".join(t for i, t in enumerate(TEXTS) if split_of(f"{i}") == split)
    assert corpus.facts["commit"] == COMMIT
    assert corpus.facts["train_documents"] + corpus.facts["validation_documents"] == 99
    options = {"split": "train", "streaming": True, "revision": COMMIT}
    assert hub.calls == [("owner/name", "config", options)]


def test_it_is_streamed_again_for_another_commit_only(
    hub: Hub, prepare: Callable[..., Corpus]
) -> None:
    first = prepare("hf:name")
    assert prepare("hf:name").sha256 == first.sha256
    assert len(hub.calls) == 1
    hub.commit = OTHER
    hub.rows = hub.rows[:80]
    assert prepare("hf:name").sha256 != first.sha256
    assert [options["revision"] for _, _, options in hub.calls] == [COMMIT, OTHER]


def test_a_named_commit_needs_no_network(
    hub: Hub, prepare: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(f"hf:name@{COMMIT}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert prepare(f"hf:name@{COMMIT}").sha256 == first.sha256
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    ("name", "column", "reason"),
    [
        ("hf:", None, "names no data set: use hf:HuggingFaceFW/fineweb-edu:sample-10BT"),
        ("hf:name@0123", None, "has an incomplete commit: give all of its 40 digits"),
        ("hf:nowhere", None, "was not found (LookupError): check the name and the network"),
        ("hf:name", "body", "is not in --data hf:name, which has id, text: name one"),
        ("hf:name", "id", "holds int in row 0, not text"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_cannot_be_read_is_one_line(
    prepare: Callable[..., Corpus], name: str, column: str | None, reason: str
) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(name, column)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"--data {name} " if column is None else f"--column {column} ")
    assert len(message.splitlines()) == 1


def test_a_network_that_fails_half_way_leaves_nothing(
    hub: Hub, prepare: Callable[..., Corpus], tmp_path: Path
) -> None:
    hub.fails_at = 50
    with pytest.raises(UsageError, match=r"\(ConnectionError: the network is down\): check"):
        prepare("hf:name")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"^--data hf:name needs the datasets library: run pip"):
        open_source("hf:name", None)
