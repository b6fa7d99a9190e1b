"""Law 7: what the search finds is the truth, whatever the sizes, and what stays is never dropped.

A denoiser is drawn with text before or after the image, registers, rotary tables, masks and modulation, at sizes small enough that tokens,
text, batch and channels are often as many. The truth is known from the drawing alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery.tokens import kept_count
from tests.property.scenarios import few


@dataclass(frozen=True)
class Drawing:
    """A denoiser and the sizes of a call.

    Attributes:
        batch: b.
        tokens: Tokens of the image.
        text: Words; they stand in the stream where `place` says, and are read by cross-attention if it says "beside".
        place: "before", "after" or "beside".
        registers: Learned tokens in front of everything.
        width: c.
        table: Rotary table "none", "shared" by the samples, or one a "sample".
        mask: Attention mask "none", over "keys", or over "pairs".
        modulated: Whether every token of the stream has a modulation of its own.
        outside: Whether the residual is added by the root.
    """

    batch: int
    tokens: int
    text: int
    place: str
    registers: int
    width: int
    table: str
    mask: str
    modulated: bool
    outside: bool

    @property
    def staying(self) -> int:
        return self.registers + (self.text if self.place != "beside" else 0)

    @property
    def length(self) -> int:
        return self.tokens + self.staying

    @property
    def moving_arguments(self) -> set[str]:
        wanted = {"x": True, "table": self.table != "none", "mask": self.mask != "none", "shift": self.modulated}
        return {name for name, moves in wanted.items() if moves}


SIZES = st.integers(2, 6)
drawings = st.builds(
    Drawing,
    batch=st.integers(1, 4),
    tokens=SIZES,
    text=SIZES,
    place=st.sampled_from(["before", "after", "beside"]),
    registers=st.integers(0, 2),
    width=st.sampled_from([4, 6]),
    table=st.sampled_from(["none", "shared", "sample"]),
    mask=st.sampled_from(["none", "keys", "pairs"]),
    modulated=st.booleans(),
    outside=st.booleans(),
)


class Block(nn.Module):
    def __init__(self, width: int, outside: bool) -> None:
        super().__init__()
        self.outside = outside
        self.qkv, self.read = nn.Linear(width, 3 * width), nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, words: Tensor | None, table: Tensor | None, mask: Tensor | None, shift: Tensor | None) -> Tensor:
        h = x if shift is None else x + shift
        q, k, v = self.qkv(h).chunk(3, -1)
        if table is not None:
            q, k = q * table, k * table
        y = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]
        if words is not None:
            y = y + functional.scaled_dot_product_attention(y, *self.read(words).chunk(2, -1))
        return y + self.mlp(y) if self.outside else x + y + self.mlp(x + y)


class Denoiser(nn.Module):
    def __init__(self, drawing: Drawing) -> None:
        super().__init__()
        self.drawing = drawing
        width = drawing.width
        self.embed, self.text, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.registers = nn.Parameter(torch.randn(1, drawing.registers, width))
        self.table = nn.Parameter(torch.randn(drawing.length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, drawing.outside) for _ in range(2))

    def forward(self, latent: Tensor, words: Tensor, mask: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        d = self.drawing
        parts = [self.registers.expand(len(latent), -1, -1)] if d.registers else []
        image, text = self.embed(latent), self.text(words)
        parts += {"before": [text, image], "after": [image, text], "beside": [image]}[d.place]
        x = torch.cat(parts, 1) if len(parts) > 1 else image
        table = {"none": None, "shared": self.table, "sample": self.table.expand(len(x), -1, -1) * words.mean((1, 2))[:, None, None]}[
            d.table
        ]
        for block in self.blocks:
            y = block(self.norm(x) if d.outside else x, text if d.place == "beside" else None, table, mask, shift)
            x = x + y if d.outside else y
        start = d.registers + (d.text if d.place == "before" else 0)
        return self.head(x[:, start : start + d.tokens])


def call(d: Drawing) -> tuple[Denoiser, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = {"latent": torch.randn(d.batch, d.tokens, d.width), "words": torch.randn(d.batch, d.text, d.width)}
        if d.mask != "none":
            inputs["mask"] = torch.randn(d.batch, 1, 1 if d.mask == "keys" else d.length, d.length)
        if d.modulated:
            inputs["shift"] = torch.randn(d.batch, d.length, d.width)
        return Denoiser(d).eval(), inputs


@few
@given(drawing=drawings)
def test_the_search_finds_what_moves_and_what_stays(drawing: Drawing) -> None:
    model, inputs = call(drawing)
    plan = dcs.plan(model, inputs)
    assert [site.path for site in plan.routed_sites] == ["blocks.0", "blocks.1"]
    for site in plan.routed_sites:
        assert (site.tokens, site.staying) == (drawing.tokens, drawing.staying)
        assert set(site.aligned) == drawing.moving_arguments


@few
@given(drawing=drawings, ratio=st.sampled_from([0.3, 0.5, 0.9]))
def test_kept_tokens_see_each_other_alone_and_the_rest_goes_round(drawing: Drawing, ratio: float) -> None:
    model, inputs = call(drawing)
    dcs.convert_(model, inputs, dcs.DiffCRConfig(initial_ratio=ratio, learn_ratios=False, gate="straight_through"))
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.normal_(generator=torch.Generator().manual_seed(1))
        model(**inputs)
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [block.register_forward_hook(lambda _, args, output: seen.append((args[0], output))) for block in model.blocks]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    first = [pair for pair in seen if pair[0].shape == seen[0][0].shape][: len(seen) // 2]  # one call, or one a sample
    entered, left = (torch.cat(tensors) for tensors in zip(*first, strict=True))
    kept = kept_count(ratio, drawing.length, drawing.staying)
    assert entered.shape == left.shape == (drawing.batch, kept, drawing.width)
    assert all(pair[0].shape[1] == kept for pair in seen)
    # All that stays is among the kept, in its place before or after the image.
    words = model.text(inputs["words"]) if drawing.place != "beside" else None
    for row in range(drawing.batch):
        if words is not None:
            wanted = model.norm(words[row]) if drawing.outside else words[row]
            at = (
                slice(drawing.registers, drawing.registers + drawing.text)
                if drawing.place == "before"
                else slice(kept - drawing.text, kept)
            )
            assert torch.allclose(entered[row, at], wanted, atol=1e-6)
