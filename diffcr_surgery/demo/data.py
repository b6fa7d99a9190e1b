"""The digits: 1,797 scanned 8x8 images that ship with scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

IMAGE_SIZE = 8
CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images with their classes.

    Attributes:
        images: `b 1 8 8`, floats in [-1, 1].
        labels: `b`, whole numbers from 0 to 9.
    """

    images: Tensor
    labels: Tensor


def load_splits(seed: int, held_out: int = 297) -> tuple[Split, Split]:
    """Load the digits and split them, every class in equal shares on both sides.

    Args:
        seed: decides which images are held out.
        held_out: how many images are held out.

    Returns:
        The training split and the held-out split.
    """
    digits = load_digits()
    # Grey levels are whole numbers from 0 to 16.
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    train, test = train_test_split(range(len(labels)), test_size=held_out, stratify=digits.target, random_state=seed)
    return Split(images[train], labels[train]), Split(images[test], labels[test])
