"""Learn one sequence of tasks, and measure every task after each of them."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ars import ARSAdamW
from continual.config import Run, Settings
from continual.data import PIXELS, Digits, permutations
from continual.memories import MEMORIES
from continual.methods import JOINT

__all__ = ["run_tasks"]

_FISHER_BATCH = 256  # images; changes the memory and the speed, not the result


def run_tasks(run: Run, settings: Settings, digits: Digits, tick: Callable[[], None]) -> Any:
    """Train a new model on all tasks of a run, in turn (``joint``: on all at once).

    Args:
        run: what to do.
        settings: of all runs.
        digits: the images.
        tick: called after each of ``tasks * epochs`` epochs; may raise to stop.

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
    memory = MEMORIES[run.method](run.strength) if run.method in MEMORIES else None
    penalty, accuracy = None, []
    if run.method == JOINT:
        train, labels = [torch.cat(train)], labels.repeat(run.tasks)
    for images in train:
        optimizer = ARSAdamW(
            model.parameters(), lr=settings.lr, weight_decay=0.0, ars=None, penalty=penalty
        )
        for _ in range(settings.epochs):
            _epoch(model, optimizer, images, labels, settings.batch_size, generator)
            for _ in range(run.tasks // len(train)):
                tick()
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
    layers = nn.Linear(PIXELS, width), nn.Linear(width, width), nn.Linear(width, 10)
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
