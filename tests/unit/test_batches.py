"""Where the samples are: on which axis of what a block takes and returns, and which of them share a region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery import testing as dt
from diffcr_surgery.errors import NoRoutableBlockError

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


# --- blocks that mix neither samples nor tokens ----------------------------------------------------------------------
class Attend(nn.Module):
    """Attention over tokens that have the batch behind them or in front; to a text ``b m c``, if there is one."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.qkv, self.behind = nn.Linear(4, 12), behind

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x.transpose(0, 1) if self.behind else x).chunk(3, -1)
        if text is not None:
            _, k, v = self.qkv(text).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(0, 1) if self.behind else y


class Layers(nn.Module):
    """Halves of layers, each a site of its own, or whole layers."""

    def __init__(self, layout: str, *, whole: bool = False, feed_first: bool = False, turned: bool = True) -> None:
        super().__init__()
        self.behind, self.whole, self.feed_first = layout == "n b c", whole, feed_first
        self.turned = turned and self.behind
        halves = [
            nn.ModuleList([Attend(self.behind), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))])
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(map(Layer, halves) if whole else halves)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        for layer in self.layers:
            if self.whole:
                x = layer(x, text)
                continue
            attend, feed = layer  # type: ignore[misc]
            x = feed(x) + x if self.feed_first else x
            x = attend(x) + x
            x = x if self.feed_first else feed(x) + x
        return x.transpose(0, 1) if self.turned else x


class Layer(nn.Module):
    def __init__(self, halves: nn.ModuleList) -> None:
        super().__init__()
        self.attend, self.feed = halves

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, text)
        return x + self.feed(x)


def layouts(model: nn.Module, *inputs: Tensor) -> set[tuple[str, int]]:
    sites = dcs.plan(model, inputs).sites
    return {(*site.aligned.values(), site.tokens) for site in sites}


@pytest.mark.parametrize("feed_first", [False, True])
@pytest.mark.parametrize("layout", ["b n c", "n b c"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_mlp_by_itself_has_its_tokens_where_its_neighbours_have_theirs(batch: int, layout: str, feed_first: bool) -> None:
    """Its samples are as good a set as its tokens; taken for such, whole samples would bypass."""
    assert layouts(Layers(layout, feed_first=feed_first), draw(batch, 4, 4)) == {(layout, 4)}
    if layout == "n b c":
        assert layouts(Layers(layout, feed_first=feed_first, turned=False), draw(4, batch, 4)) == {(layout, 4)}


@pytest.mark.parametrize("layout", ["b n c", "n b c"])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_to_text_alone_has_its_tokens_where_the_samples_of_the_latent_are_not(batch: int, layout: str) -> None:
    assert layouts(Layers(layout, whole=True), draw(batch, 6, 4), draw(batch, 5, 4)) == {(layout, 6)}


def test_where_nothing_tells_samples_from_tokens_the_block_is_refused() -> None:
    with pytest.raises(NoRoutableBlockError, match=r"mixes nothing along either axis of its stream \(6, 3, 4\).*declare its axes"):
        layouts(Layers("n b c", whole=True, turned=False), draw(6, 3, 4), draw(3, 5, 4))


@pytest.mark.parametrize("turned", [False, True])
def test_a_single_token_is_not_taken_for_a_batch_of_tokens(turned: bool) -> None:
    x = draw(2, 1, 4)
    with pytest.raises(NoRoutableBlockError, match="a single token"):
        layouts(Layers("n b c", whole=True, turned=turned), x if turned else x.transpose(0, 1))


def test_a_call_with_a_single_token_keeps_the_layout_that_was_planned() -> None:
    model = Layers("n b c", whole=True).eval()
    dense = model(draw(2, 1, 4))
    dcs.convert_(model, (draw(2, 4, 4),), dcs.DiffCRConfig(initial_ratio=0.5, learn_ratios=False))
    assert torch.equal(model(draw(2, 1, 4)), dense)
