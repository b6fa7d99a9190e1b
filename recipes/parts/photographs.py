"""Crops of photographs with holes in them.

The photographs are those that come inside scikit-image and scikit-learn, so that nothing is downloaded, or a folder of one's own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from parts.masks import draw_mask
from skimage import data as scikit_image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as images

__all__ = ["Crops", "bundled_photographs", "folder_of_photographs"]

HELD_OUT_SHARE = 0.3  # of the width of a bundled photograph; of a folder, every tenth photograph
LARGEST_CROP = 1.5  # in units of the size it is then scaled to
SHORTER_SIDE = 5  # of a bundled photograph, in the same units: so much scaled down that a crop shows something


def bundled_photographs(size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return seven photographs for training and, cut off their right sides, as many to test on; each `3 h w` in [0, 1].

    Args:
        size: Height and width of the crops that will be taken.
    """
    china, flower = load_sample_images().images
    pictures = [china, flower, scikit_image.stereo_motorcycle()[0]]
    pictures += [getattr(scikit_image, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    training, held_out = [], []
    for picture in pictures:  # copied, since some are arrays that must not be written to
        photograph = images.resize(_to_tensor(picture.copy()), SHORTER_SIDE * size, antialias=True)
        border = round((1 - HELD_OUT_SHARE) * photograph.shape[2])
        training.append(photograph[:, :, :border])
        held_out.append(photograph[:, :, border:])
    return training, held_out


class _Folder(Sequence[Tensor]):
    """Photographs that are read when they are needed."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return _to_tensor(self.rows[index]["image"].convert("RGB"))


def folder_of_photographs(folder: Path) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the photographs below a folder for training, and every tenth of them, at least one, to test on."""
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train", drop_labels=True)
    if len(rows) < 2:
        raise SystemExit(f"--data {folder} holds {len(rows)} image; expected at least two, one of them to test on")
    held_out = range(0, len(rows), 10)
    training = [index for index in range(len(rows)) if index % 10]
    return _Folder(rows.select(training)), _Folder(rows.select(held_out))


def _to_tensor(picture: Any) -> Tensor:
    return images.to_dtype(images.to_image(picture), torch.float32, scale=True).as_subclass(Tensor)


class Crops(Dataset[dict[str, Tensor]]):
    """Random crops with random holes: sample i is a function of i alone, so a run that was resumed sees what it would have seen.

    Args:
        photographs: To crop.
        size: Height and width of a crop.
        patch: Height and width of a token, in pixels.
        holes: Tokens of the holes, one number for each group of samples.
        group: Samples that have holes of one size.
        seed: Of all samples.
    """

    def __init__(self, photographs: Sequence[Tensor], *, size: int, patch: int, holes: Sequence[int], group: int, seed: int) -> None:
        self.photographs, self.size, self.patch, self.seed = photographs, size, patch, seed
        self.holes, self.group = holes, group

    def __len__(self) -> int:
        return len(self.holes) * self.group

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `image`, `3 h w` in [-1, 1], its `mask`, `1 h w`, 1 in the hole, and `hole`, the tokens to generate."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + index)
        photograph = self.photographs[int(torch.randint(len(self.photographs), (), generator=generator))]
        height, width = photograph.shape[1:]
        zoom, down, right, flip = torch.rand(4, generator=generator).tolist()
        side = min(round((1 + zoom * (LARGEST_CROP - 1)) * self.size), height, width)
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        crop = images.resized_crop(photograph, top, left, side, side, [self.size, self.size], antialias=True)
        crop = crop.flip(2) if flip < 0.5 else crop
        hole = self.holes[index // self.group]
        return {"image": crop * 2 - 1, "mask": draw_mask(self.size, self.patch, hole, generator), "hole": torch.tensor(hole)}
