"""Permuted digits, learned one permutation after another by one network.

The 1797 images of 8 x 8 pixels come with scikit-learn. They are split once and for all, stratified
by digit: 1437 to train on, 360 to test. For choosing strengths the training images are split again,
1077 and 360, so that the test images take no part in it.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ars import ARSAdamW
from common.program import StopRequest
from continual.memory_methods import JOINT, METHODS

__all__ = ["Digits", "Run", "Settings", "load", "permutations", "run_tasks"]

_PIXELS = 64
_TEST_IMAGES = 360
_FISHER_BATCH = 256  # images; changes the memory and the speed, not the result


@dataclass(frozen=True)
class Settings:
    """Everything that holds for all runs of one output folder.

    Args:
        epochs: passes over the training images for each permutation.
        batch_size: images a step.
        width: units of each of the two hidden layers.
        lr: Adam's learning rate, constant; the optimizer starts afresh with each permutation.
        validation: train on three quarters of the training images and measure on the other quarter,
            never on the test images: for choosing strengths.
    """

    epochs: int = 20
    batch_size: int = 64
    width: int = 256
    lr: float = 1e-3
    validation: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One sequence of permutations, learned by one method.

    Args:
        method: a name in ``METHODS``.
        strength: of its penalty; 0 where there is none.
        tasks: how many permutations; the first is the identity.
        seed: of the other permutations, the weights and the order of the images.
    """

    method: str
    strength: float
    tasks: int
    seed: int

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        strength = f" {self.strength:g}" if self.strength else ""
        return f"{self.method}{strength}, {self.tasks} tasks, seed {self.seed}"


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], (n, 64) float32, and their digits, (n,) int64.

    Args:
        train_images: to learn from.
        train_labels: theirs.
        test_images: to measure on.
        test_labels: theirs.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(*, validation: bool = False) -> Digits:
    """Load and split the digits, the same way every time.

    Args:
        validation: measure on a part of the training images in place of the test images.
    """
    bundle = load_digits()
    labels = bundle.target
    train, test = train_test_split(
        range(len(labels)), test_size=_TEST_IMAGES, random_state=0, stratify=labels
    )
    if validation:
        train, test = train_test_split(
            train, test_size=_TEST_IMAGES, random_state=1, stratify=labels[train]
        )
    images = torch.tensor(bundle.data / 16.0, dtype=torch.float32)
    digits = torch.tensor(labels, dtype=torch.int64)
    return Digits(images[train], digits[train], images[test], digits[test])


def permutations(tasks: int, seed: int) -> list[Tensor]:
    """Return one order of the pixels a task; the first leaves them as they are.

    Args:
        tasks: how many.
        seed: a sequence with more tasks begins with the same permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.arange(_PIXELS),
        *(torch.randperm(_PIXELS, generator=generator) for _ in range(tasks - 1)),
    ]


def run_tasks(run: Run, stop: StopRequest, settings: Settings, digits: Digits) -> dict[str, Any]:
    """Train a new model on all tasks of a run, in turn (``joint``: on all at once).

    Args:
        run: what to do.
        stop: asked after every epoch.
        settings: of all runs.
        digits: the images.

    Returns:
        A record for JSON: the run, ``accuracy`` in %, row t after learning task t and column s on
        task s (``joint``: one row), and ``cpu_seconds``.
    """
    start = time.process_time()
    generator = torch.Generator().manual_seed(run.seed)
    orders = permutations(run.tasks, run.seed)
    model = _network(settings.width, generator)
    train = [digits.train_images[:, order] for order in orders]
    labels = digits.train_labels
    method = METHODS[run.method]
    memory = None if method.memory is None else method.memory(run.strength)
    penalty, accuracy = None, []
    if run.method == JOINT:
        train, labels = [torch.cat(train)], labels.repeat(run.tasks)
    for images in train:
        optimizer = ARSAdamW(
            model.parameters(), lr=settings.lr, weight_decay=0.0, ars=None, penalty=penalty
        )
        for _ in range(settings.epochs):
            _epoch(model, optimizer, images, labels, settings.batch_size, generator)
            stop.check()
        accuracy.append([_accuracy(model, digits.test_images[:, o], digits) for o in orders])
        if memory is not None and len(accuracy) < run.tasks:
            batches = images.split(_FISHER_BATCH), labels.split(_FISHER_BATCH)
            penalty = memory(model, list(zip(*batches, strict=True)))
    return {
        "method": run.method,
        "strength": run.strength,
        "tasks": run.tasks,
        "seed": run.seed,
        "accuracy": accuracy,
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def _network(width: int, generator: torch.Generator) -> nn.Module:
    """Build a network with two hidden layers, its weights drawn as torch's default draws them."""
    layers = nn.Linear(_PIXELS, width), nn.Linear(width, width), nn.Linear(width, 10)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    with torch.no_grad():
        for layer in layers:
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
    return model


def _epoch(
    model: nn.Module,
    optimizer: ARSAdamW,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    for batch in torch.randperm(len(images), generator=generator).split(batch_size):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, digits: Digits) -> float:
    logits = model(images)
    if not logits.isfinite().all():
        return 0.0  # a model that has left the numbers knows nothing, whatever argmax says
    return 100.0 * float((logits.argmax(1) == digits.test_labels).double().mean())
