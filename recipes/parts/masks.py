"""Random holes, as inpainting is trained with in the literature: free-form brush strokes (DeepFill v2) and boxes (LaMa)."""

import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

__all__ = ["draw_mask", "touched_tokens"]

MAX_SHAPES = 64  # tried for a mask; small ones always fit, so the least share is all but always reached
LEAST_SHARE = 0.75  # of the tokens a hole may touch, those it touches at least


def draw_mask(size: int, patch: int, most: int, generator: torch.Generator) -> Tensor:
    """Draw a hole of about a given size.

    Strokes and boxes are added as long as the hole touches few tokens; one that would touch too many is left out again.

    Args:
        size: Height and width of the image, in pixels.
        patch: Height and width of a token, in pixels.
        most: Tokens the hole may touch.
        generator: Source of randomness.

    Returns:
        `1 size size`, 1 in the hole.
    """
    hole = torch.zeros(1, size, size)
    reach = patch * math.sqrt(most)  # the side of a box that touches them all
    for _ in range(MAX_SHAPES):
        shape = _stroke if torch.rand((), generator=generator) < 0.5 else _box
        larger = torch.maximum(hole, shape(size, reach, generator))
        if touched_tokens(larger, patch) <= most:
            hole = larger
        if touched_tokens(hole, patch) >= LEAST_SHARE * most:
            break
    return hole


def touched_tokens(mask: Tensor, patch: int) -> int:
    """Count the tokens that hold a masked pixel."""
    return int(functional.max_pool2d(mask, patch).sum())


def _stroke(size: int, reach: float, generator: torch.Generator) -> Tensor:
    """Draw a brush stroke: a few straight pieces, each turned a little from the one before, with round joints."""
    picture = Image.new("L", (size, size))
    pen = ImageDraw.Draw(picture)
    width = _uniform(0.15, 0.35, generator) * reach
    x, y, angle = size * _uniform(0, 1, generator), size * _uniform(0, 1, generator), _uniform(0, 2 * math.pi, generator)
    for _ in range(int(_uniform(2, 6, generator))):
        length = _uniform(0.3, 0.8, generator) * reach
        end = x + length * math.cos(angle), y + length * math.sin(angle)
        pen.line([(x, y), end], fill=255, width=max(1, round(width)))
        for cx, cy in ((x, y), end):
            pen.ellipse([cx - width / 2, cy - width / 2, cx + width / 2, cy + width / 2], fill=255)
        (x, y), angle = end, angle + _uniform(-1.2, 1.2, generator)
    return pil_to_tensor(picture).float() / 255


def _box(size: int, reach: float, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(1, size, size)
    height, width = (max(1, round(_uniform(0.2, 0.7, generator) * reach)) for _ in range(2))
    top, left = (int(_uniform(0, size - side + 1, generator)) for side in (min(height, size), min(width, size)))
    mask[:, top : top + height, left : left + width] = 1
    return mask


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
