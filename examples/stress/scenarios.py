"""The text, ordinary training on it, and three ways to lose a run half-way."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ars.models import GPT, GPTConfig
from common.errors import UsageError
from corpus import Corpus, Tokens
from corpus.pieces import SPLITS, split_of
from corpus.sources import library_source, text_source
from corpus.tokenizer import ByteTokenizer
from stress.faults import FAULTS

__all__ = [
    "EDGE_FACTOR", "SCENARIOS", "SIZES", "Scenario", "Size", "Stream", "load_file",
    "load_standard_library", "random_windows", "scenario_settings",
]  # fmt: skip

EDGE_FACTOR = 100.0
_PROMPT = 8  # bytes of real text that a sample begins with
_POOL = 8  # samples at a time
_POOL_STEPS = 20  # steps that train on a pool before the model samples the next one
_WARMUP = 0.1  # of the run
_MAIN_ARMS = (
    "adamw", "adamw-clip", "adamw-betas", "paper", "default", "default-clip", "default-betas",
)  # fmt: skip
_OTHER_OPTIMIZERS = ("sgd", "sgd-default", "muon", "muon-default")


@dataclass(frozen=True)
class Scenario:
    """A kind of run.

    Args:
        title: of its figure.
        begins: what happens half-way.
        arms: names of `arms.ARMS` that are run unless others are asked for; all if empty.
        rates: learning rates, as multiples of the best.
    """

    title: str
    begins: str
    arms: tuple[str, ...] = ()
    rates: tuple[float, ...] = (1.0,)


SCENARIOS = {
    "ordinary": Scenario(
        "Ordinary training",
        "nothing",
        (*_MAIN_ARMS, "default-norm", *_OTHER_OPTIMIZERS),
        (0.3, 1.0, 3.0),
    ),
    "bytes": Scenario("Abrupt shift: bytes permuted", "every byte value is replaced by another"),
    "reversal": Scenario("Abrupt shift: text reversed", "the text runs backwards", _MAIN_ARMS),
    "loop": Scenario("Feedback loop", "the model trains on its own samples"),
    "edge": Scenario(
        "Learning rate beyond the edge", f"the learning rate is multiplied by {EDGE_FACTOR:g}"
    ),
}


def scenario_settings() -> dict[str, Any]:
    """Every setting that the scenarios have in common."""
    return {
        "edge_factor": EDGE_FACTOR, "warmup": _WARMUP, "prompt": _PROMPT, "pool": _POOL,
        "pool_steps": _POOL_STEPS,
    }  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Model and length of a run.

    Args:
        layers: of the GPT.
        width: of its residual stream; heads have 32 channels.
        sequence_len: bytes a sequence.
        batch_size: sequences a step.
        steps: updates; a stress begins half-way.
        device: where it runs.
    """

    layers: int
    width: int
    sequence_len: int
    batch_size: int
    steps: int
    device: str = "cpu"

    def model(self) -> GPTConfig:
        """The model's settings."""
        return GPTConfig(
            vocab_size=256,
            sequence_len=self.sequence_len,
            n_layer=self.layers,
            n_head=self.width // 32,
            n_embd=self.width,
        )


SIZES = {
    "tiny": Size(1, 32, 32, 4, 80),  # 29 thousand parameters
    "small": Size(2, 64, 64, 8, 200),  # 131 thousand
    "medium": Size(3, 128, 128, 8, 400),  # 655 thousand
    "large": Size(3, 256, 128, 16, 600),  # 2.5 million
    "gpu": Size(8, 512, 256, 32, 2000, "cuda"),  # 25 million
}


class Stream:
    """The batches, the learning rate and the measured text of one run.

    Args:
        scenario: a name of `SCENARIOS` or of `FAULTS`.
        seed: of batches, permutation and samples.
        size: of the run.
        text: bytes to train on.
    """

    def __init__(self, scenario: str, seed: int, size: Size, text: Tokens) -> None:
        self.scenario, self.seed, self.size, self._text = scenario, seed, size, text
        self.half = size.steps // 2
        self._fault = FAULTS.get(scenario)
        self._permutation = torch.randperm(256, generator=_generator(seed, "permutation", "cpu"))
        self._samples = _generator(seed, "samples", size.device)
        self._pool = torch.empty(0)

    def rate(self, step: int) -> float:
        """Factor of the base learning rate: a warm-up, then constant, then the stress if any."""
        if self.scenario == "edge" and step >= self.half:
            return EDGE_FACTOR
        if self._fault is not None:
            if step >= self.half and self._fault.rate != 1.0:
                return self._fault.rate
            if not self._fault.warmup:
                return 1.0
        return min(1.0, (step + 1) / max(1, round(_WARMUP * self.size.steps)))

    def training(self, step: int, model: GPT) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, each (B, T).

        Args:
            step: from 0; called once for each, in order.
            model: in the feedback loop, whose samples they are.
        """
        size = self.size
        windows = random_windows(
            self._text, f"narcissus {self.seed}", step, size.batch_size, size.sequence_len + 1
        ).to(size.device)
        if step >= self.half and self.scenario == "loop":
            windows = self._own_samples(step, model, windows)
        else:
            windows = self.shifted(windows, step)
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if self._fault is None:
            return inputs, targets
        generator = _generator(self.seed, f"fault {step}", "cpu")
        return self._fault.spoil(inputs, targets, step - self.half, generator)

    def shifted(self, windows: Tensor, step: int) -> Tensor:
        """The text as a model sees it in this step: to train on, and to be measured on."""
        if step >= self.half and self.scenario == "bytes":
            return self._permutation.to(windows.device)[windows]
        return windows.flip(1) if step >= self.half and self.scenario == "reversal" else windows

    def _own_samples(self, step: int, model: GPT, windows: Tensor) -> Tensor:
        if (step - self.half) % _POOL_STEPS == 0:
            rows = torch.arange(_POOL, device=windows.device) % len(windows)
            length = self.size.sequence_len + 1 - _PROMPT
            self._pool = model.generate(windows[rows, :_PROMPT], length, generator=self._samples)
        chosen = torch.randint(
            0, _POOL, (len(windows),), generator=self._samples, device=windows.device
        )
        return self._pool[chosen]


def random_windows(text: Tokens, stream: str, step: int, count: int, length: int) -> Tensor:
    """Windows of one step: a function of the stream and the step, so a cursor is one number.

    Args:
        text: N bytes.
        stream: names the sequence of batches, such as ``"narcissus 0"`` for seed 0.
        step: index in that sequence.
        count: B.
        length: bytes of a window.

    Returns:
        (B, length) int64.
    """
    generator = _generator(stream, step, "cpu")
    starts = torch.randint(0, len(text) - length + 1, (count,), generator=generator)
    return text.windows(starts, length)


def _generator(name: object, purpose: object, device: str) -> torch.Generator:
    digest = hashlib.sha256(f"{name} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def load_standard_library(root: Path | None = None) -> Corpus:
    """Read the Python files of the standard library.

    Args:
        root: folder to read; ``None`` for where the standard library lies.

    Raises:
        UsageError: the folder holds no Python source (some distributions ship only byte code).
    """
    source = library_source(root)
    texts: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS}
    for identity, path in zip(source.identity["files"], source.files, strict=True):
        texts[split_of(identity["name"])].append((identity["name"], path.read_bytes()))
    facts = {
        "source": source.facts["source"],
        "train_files": len(texts["train"]),
        "validation_files": [name for name, _ in texts["validation"]],
    }
    return _corpus(texts, facts)


def load_file(path: Path, sequence_len: int) -> Corpus:
    """Read one file and keep its last tenth for validation.

    Args:
        path: any file of text; its bytes are the tokens.
        sequence_len: bytes a sequence; each split must hold at least one sequence and its target.

    Raises:
        UsageError: the file is missing, unreadable, a folder, no text, empty or too short.
    """
    source = text_source(path, f"--data {path}")
    size, needed = source.size or 0, 10 * (sequence_len + 1)
    if size < needed:
        what = f"has {size} bytes" if size else "is empty"
        raise UsageError(
            f"{source.label} {what}, but sequences of {sequence_len} need at least {needed}: "
            "give a longer file or a smaller --size"
        )
    pieces = [*source.pieces()]
    texts = {s: [(s, b"".join(p.content for p in pieces if p.split == s))] for s in SPLITS}
    facts = {"source": path.name, "train_files": 1, "validation_files": [path.name]}
    return _corpus(texts, facts)


def _corpus(texts: dict[str, list[tuple[str, bytes]]], facts: dict[str, Any]) -> Corpus:
    digest, tokens = hashlib.sha256(), {}
    for split, files in texts.items():
        for name, content in files:
            # Lengths are hashed too, so that no two different corpora share one byte stream.
            digest.update(f"{split} {name} {len(content)}\n".encode())
            digest.update(content)
        whole = b"".join(content for _, content in files)
        tokens[split] = Tokens([ByteTokenizer().encode(whole)])
        facts = {**facts, f"{split}_bytes": len(whole)}
    train, validation = tokens["train"], tokens["validation"]
    return Corpus(train, validation, ByteTokenizer(), digest.hexdigest(), facts)
