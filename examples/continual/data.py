"""The bundled digits of scikit-learn, and their permutations.

1797 images of 8 x 8 pixels, split once and for all, stratified by digit: 1437 to train on, 360 to
test. For choosing strengths the training images are split again, 1077 and 360, so that the test
images take no part in it.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["PIXELS", "Digits", "load", "permutations"]

PIXELS = 64
_TEST_IMAGES = 360


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
        torch.arange(PIXELS),
        *(torch.randperm(PIXELS, generator=generator) for _ in range(tasks - 1)),
    ]
