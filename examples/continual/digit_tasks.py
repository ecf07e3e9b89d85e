"""Digits, learned task after task by one network: permuted, or a few classes at a time.

The 1797 images of 8 x 8 pixels come with scikit-learn. They are split once and for all, stratified
by digit: 1437 to train on, 360 to test. For choosing strengths the training images are split again,
1077 and 360, so that the test images take no part in it.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ars import ARSAdamW
from common.program import StopRequest
from continual.memory_methods import JOINT, METHODS, REPLAY

__all__ = ["CLASSES", "Digits", "Run", "Settings", "load", "run_tasks", "tasks_of"]

CLASSES = 10
_PIXELS = 64
_TEST_IMAGES = 360
_FISHER_BATCH = 256  # images; changes the memory and the speed, not the result


@dataclass(frozen=True)
class Settings:
    """Everything that holds for all runs of one output folder.

    Args:
        epochs: passes over the training images of each task.
        batch_size: images a step.
        width: units of each of the two hidden layers.
        lr: Adam's learning rate, constant; the optimizer starts afresh with each task.
        by_class: tasks are classes of their own, in place of all classes with other pixels.
        validation: train on three quarters of the training images and measure on the other quarter,
            never on the test images: for choosing strengths.
    """

    epochs: int = 20
    batch_size: int = 64
    width: int = 256
    lr: float = 1e-3
    by_class: bool = False
    validation: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One sequence of tasks, learned by one method.

    Args:
        method: a name in ``METHODS``.
        strength: of its penalty, or the images of each task that it keeps; 0 where it has neither.
        tasks: how many; classes are divided evenly among them.
        seed: of the tasks, the weights and the order of the images.
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


def tasks_of(digits: Digits, tasks: int, seed: int, *, by_class: bool) -> list[Digits]:
    """Return the images and labels of each task.

    Args:
        digits: all images.
        tasks: how many.
        seed: of the orders of the pixels, the first of which leaves them as they are, and of which
            a sequence with more tasks begins with the same; or of the order of the classes.
        by_class: each task has classes of its own, in place of all with other pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    if not by_class:
        orders = [torch.randperm(_PIXELS, generator=generator) for _ in range(tasks - 1)]
        return [
            replace(
                digits,
                train_images=digits.train_images[:, order],
                test_images=digits.test_images[:, order],
            )
            for order in (torch.arange(_PIXELS), *orders)
        ]
    found = []
    for own in torch.randperm(CLASSES, generator=generator).chunk(tasks):
        train, test = torch.isin(digits.train_labels, own), torch.isin(digits.test_labels, own)
        found.append(
            Digits(
                digits.train_images[train],
                digits.train_labels[train],
                digits.test_images[test],
                digits.test_labels[test],
            )
        )
    return found


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
    of_memory = torch.Generator().manual_seed(run.seed)  # so that all methods see one order
    tasks = tasks_of(digits, run.tasks, run.seed, by_class=settings.by_class)
    model = _network(settings.width, generator)
    train = [(task.train_images, task.train_labels) for task in tasks]
    method = METHODS[run.method]
    memory = None if method.memory is None else method.memory(run.strength)
    penalty, accuracy = None, []
    kept: list[tuple[Tensor, Tensor]] = []
    if run.method == JOINT:
        train = [_joined(train)]
    for images, labels in train:
        optimizer = ARSAdamW(
            model.parameters(), lr=settings.lr, weight_decay=0.0, ars=None, penalty=penalty
        )
        old = _joined(kept) if kept else None
        for _ in range(settings.epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(
                settings.batch_size
            ):
                batch = [(images[chosen], labels[chosen])]
                if old is not None:
                    drawn = torch.randint(len(old[0]), (len(chosen),), generator=of_memory)
                    batch.append((old[0][drawn], old[1][drawn]))
                _step(model, optimizer, *_joined(batch))
            stop.check()
        accuracy.append([_accuracy(model, task.test_images, task.test_labels) for task in tasks])
        if memory is not None and len(accuracy) < run.tasks:
            batches = images.split(_FISHER_BATCH), labels.split(_FISHER_BATCH)
            penalty = memory(model, list(zip(*batches, strict=True)))
        if run.method == REPLAY:
            chosen = torch.randperm(len(images), generator=of_memory)[: int(run.strength)]
            kept.append((images[chosen], labels[chosen]))
    return {
        "method": run.method,
        "strength": run.strength,
        "tasks": run.tasks,
        "seed": run.seed,
        "accuracy": accuracy,
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _network(width: int, generator: torch.Generator) -> nn.Module:
    """Build a network with two hidden layers, its weights drawn as torch's default draws them."""
    layers = nn.Linear(_PIXELS, width), nn.Linear(width, width), nn.Linear(width, CLASSES)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    with torch.no_grad():
        for layer in layers:
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
    return model


def _step(model: nn.Module, optimizer: ARSAdamW, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    logits = model(images)
    if not logits.isfinite().all():
        return 0.0  # a model that has left the numbers knows nothing, whatever argmax says
    return 100.0 * float((logits.argmax(1) == labels).double().mean())
