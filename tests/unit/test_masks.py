"""The inpainting recipe's holes: how large they are, that they repeat, and which tokens are generated for them."""

from __future__ import annotations

import pytest
import torch
from parts.inpainting_model import add_tokens, hole_places, smooth_fill, take, to_tokens
from parts.masks import LEAST_SHARE, draw_mask, touched_tokens
from parts.photographs import Crops, bundled_photographs
from torch import Tensor

SIZE, PATCH = 48, 4


def masks(most: int, count: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([draw_mask(SIZE, PATCH, most, generator) for _ in range(count)])


@pytest.mark.parametrize("most", [1, 18, 72, 144])
def test_a_hole_is_about_as_large_as_wanted_and_never_larger(most: int) -> None:
    drawn = masks(most)
    assert drawn.shape == (32, 1, SIZE, SIZE) and set(drawn.unique().tolist()) == {0.0, 1.0}
    touched = torch.tensor([touched_tokens(mask, PATCH) for mask in drawn])
    assert int(touched.max()) <= most and int(touched.min()) >= 1
    assert float((touched >= LEAST_SHARE * most).float().mean()) > 0.9


def test_holes_differ_and_repeat() -> None:
    assert torch.equal(masks(36), masks(36)) and not torch.equal(masks(36), masks(36, seed=1))
    assert len(masks(36).flatten(1).unique(dim=0)) == 32


def test_every_token_of_the_hole_is_generated_and_then_its_neighbours() -> None:
    drawn = masks(36)
    places = hole_places(drawn, PATCH, 36)
    assert places.shape == (32, 36) and bool((places.diff(dim=1) > 0).all())
    for mask, row in zip(drawn, places, strict=True):
        touched = to_tokens(mask[None], PATCH)[0].amax(1).nonzero()[:, 0]
        assert set(touched.tolist()) <= set(row.tolist())
        centres = torch.stack([torch.arange(144) // 12, torch.arange(144) % 12], dim=1).float()
        distance = torch.cdist(centres, centres[touched]).amin(1)
        left = torch.ones(144, dtype=torch.bool).index_fill(0, row, False)
        assert float(distance[row].max()) <= float(distance[left].min())


def test_tokens_go_back_where_they_came_from() -> None:
    images, places = torch.randn(32, 3, SIZE, SIZE), hole_places(masks(36), PATCH, 36)
    tokens = take(to_tokens(images, PATCH), places)
    assert tokens.shape == (32, 36, 48)
    alone = add_tokens(torch.zeros_like(images), tokens, places, PATCH)
    assert torch.equal(alone[alone != 0], images[alone != 0]) and int((alone != 0).sum()) == tokens.numel()


def test_a_hole_is_smoothly_filled_from_around_it() -> None:
    drawn, images = masks(72), torch.rand(32, 3, SIZE, SIZE)
    filled = smooth_fill(images, drawn)
    hole = drawn.expand_as(images) > 0
    assert torch.equal(filled[~hole], images[~hole]) and not torch.equal(filled[hole], images[hole])
    assert 0 <= float(filled.min()) <= float(filled.max()) <= 1
    assert torch.equal(smooth_fill(torch.where(hole, 99.0, images), drawn), filled)  # what is in the hole has no say
    ramp = torch.linspace(0, 1, SIZE).expand(32, 3, SIZE, SIZE)
    assert float((smooth_fill(ramp, drawn) - ramp).square().mean().sqrt()) < 0.05
    torch.testing.assert_close(smooth_fill(torch.full_like(images, 0.3), drawn), torch.full_like(images, 0.3))


def test_crops_are_a_function_of_their_number() -> None:
    training, held_out = bundled_photographs(SIZE)
    assert len(training) == len(held_out) == 7
    crops = Crops(training, size=SIZE, patch=PATCH, holes=[18, 36], group=3, seed=5)
    assert len(crops) == 6 and [int(crops[i]["hole"]) for i in range(6)] == [18, 18, 18, 36, 36, 36]
    again, other = crops[4], crops[5]
    assert all(torch.equal(again[name], crops[4][name]) for name in again) and not torch.equal(again["image"], other["image"])
    assert again["image"].shape == (3, SIZE, SIZE) and -1 <= float(again["image"].min()) < float(again["image"].max()) <= 1
    assert touched_tokens(again["mask"], PATCH) <= 36


def test_no_held_out_pixel_is_trained_on() -> None:
    """Training and held-out parts are two sides of one border in each photograph."""
    for part, rest in zip(*bundled_photographs(SIZE), strict=True):
        assert part.shape[1] == rest.shape[1] == 5 * SIZE
        whole = part.shape[2] + rest.shape[2]
        assert rest.shape[2] == pytest.approx(0.3 * whole, abs=1) and rest.shape[2] > SIZE
