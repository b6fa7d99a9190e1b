"""Where the samples are: on which axis of what a block takes and returns, and which of them share a region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery import testing as dt

FORM = dt.Architecture


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_tokens_in_front_of_the_batch_are_seen_to_mix_behind_a_norm(batch: int) -> None:
    """A norm takes what all channels have in common off again, so a plain shift of some tokens is not heard by the others."""
    plan = dcs.plan(dt.Denoiser(FORM(layout="n b c")), {"latent": draw(batch, 4, 4)})
    assert [dict(site.aligned) for site in plan.routed_sites] == [{"x": "n b c"}]


def test_a_table_is_not_cut_along_channels_that_are_as_many_as_the_samples() -> None:
    model = dt.Denoiser(FORM(width=6, heads=3, rotary="shared", residual="outside", layout="n b c"), seed=1236)
    (site,) = dcs.plan(model, {"latent": draw(2, 4, 6)}).routed_sites
    assert set(site.aligned) == {"x", "rotary.0", "rotary.1"}
    assert site.aligned["rotary.0"].split()[0] == "n" and "b" not in site.aligned["rotary.0"]


def test_text_with_the_batch_in_front_is_cut_there_next_to_tokens_that_have_it_behind() -> None:
    model = dt.Denoiser(FORM(block="cross", rotary="sample", bias="pairs", layout="n b c", condition="sample"))
    dt.check_bypass(model, {"latent": draw(4, 6, 4), "text": draw(4, 4, 4), "timestep": torch.tensor([1.0, 400.0, 600.0, 999.0])})


@pytest.mark.parametrize("tokens, words", [(6, 4), (4, 4), (2, 4), (5, 3)])
def test_text_and_tokens_of_a_joint_block_are_blended_along_their_own_batch_axes(tokens: int, words: int) -> None:
    """Two regions between the same bins run together, and every sample has a weight of its own."""
    model = dt.Denoiser(FORM(block="joint", depth=2, condition="sample", text_last=True, layout="n b c"))
    inputs = {"latent": draw(4, tokens, 4), "timestep": torch.tensor([695.0, 750.0, 0.0, 0.0]), "text": draw(4, words, 4)}
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_regions=4, timestep_range=(0, 1000)))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(torch.tensor([[0.12, 0.13, 0.14, 0.15]] * 2))
        for router in model.diffcr.routers.values():
            router.weight.normal_()
    dt.check_mixed_timesteps(model, inputs)
    dt.check_conversion(dcs.restore_(model), inputs, dcs.DiffCRConfig(timestep_regions=4, timestep_range=(0, 1000)))


class Frames(nn.Module):
    """Attends within each frame, so that its blocks see more samples than the call has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = dt.Denoiser(FORM(depth=2, condition="sample")).blocks

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        c = (timestep / 1000).cos()[:, None].expand(-1, 4).repeat_interleave(x.shape[1], 0)
        for block in self.blocks:
            frames = block(frames, c=c)
        return frames.unflatten(0, x.shape[:2])


def test_samples_of_one_region_share_their_weight_where_blocks_see_other_samples() -> None:
    model: Any = Frames().eval()
    inputs = {"x": draw(3, 2, 6, 4), "timestep": torch.tensor([900.0, 100.0, 900.0])}
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000)))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(torch.tensor([[0.15, 0.35]] * 2))
        for router in model.diffcr.routers.values():
            router.weight.normal_()
    model.diffcr.train()
    together = model(**inputs)
    alone = [model(**{name: value[i : i + 1] for name, value in inputs.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
