"""Denoisers to test on: one small class that can be built in the forms transformer denoisers really have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TIMESTEPS", "Architecture", "Block", "Denoiser"]

TIMESTEPS = (0.0, 1000.0)


@dataclass(frozen=True, repr=False)
class Architecture:
    """The form of a denoiser; its `repr` names what differs from the simplest one, so that a counterexample can be pasted.

    Attributes:
        block: ``"plain"`` (DiT), ``"cross"`` (reads the text by cross-attention, as PixArt), ``"joint"`` (two streams with weights of their
            own that attend together, as SD3), ``"single"`` (text and image in one stream, as FLUX's later blocks), or ``"parallel"`` (the
            same with attention next to the MLP).
        depth: Number of blocks.
        width: c, even.
        heads: Attention heads, each of an even width.
        condition: What the timestep modulates: ``"none"`` (no timestep argument), every ``"sample"``, or every ``"token"`` of its own.
        rotary: Rotary tables: ``"none"``, ``"shared"`` by all samples (``n d``), or one for each ``"sample"`` (``b n d``).
        bias: Attention bias: ``"none"``, over ``"keys"`` (``b 1 1 n``), or over ``"pairs"`` (``n n``).
        registers: Learned tokens in front of the stream.
        text_last: Whether the text stands behind the image, where it shares a stream or attention with it.
        skips: Whether later blocks read what earlier ones were given, as in U-ViT.
        residual: Whether the residual is added ``"inside"`` the block or ``"outside"``, by the model.
        layout: Layout of the stream: ``"b n c"``, ``"n b c"``, or packed ``"n c"`` (one sample, text-free).
        asleep: Whether modulation begins at zero (adaLN-zero), so that no block does anything yet.
    """

    block: Literal["plain", "cross", "joint", "single", "parallel"] = "plain"
    depth: int = 1
    width: int = 4
    heads: int = 1
    condition: Literal["none", "sample", "token"] = "none"
    rotary: Literal["none", "shared", "sample"] = "none"
    bias: Literal["none", "keys", "pairs"] = "none"
    registers: int = 0
    text_last: bool = False
    skips: bool = False
    residual: Literal["inside", "outside"] = "inside"
    layout: Literal["b n c", "n b c", "n c"] = "b n c"
    asleep: bool = False

    def __repr__(self) -> str:
        named = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Architecture({', '.join(named)})"

    @property
    def reads_text(self) -> bool:
        """Whether the model takes text at all."""
        return self.block != "plain"

    @property
    def text_inside(self) -> bool:
        """Whether the text stands in the routed stream."""
        return self.block in ("single", "parallel")

    @property
    def moving(self) -> dict[str, str]:
        """Arguments of a block that move with the tokens, and their axes, the stream first: what a plan has to find."""
        words = "m+n" if self.block == "joint" and not self.text_last else "n+m" if self.block == "joint" else "n"
        found: dict[str, str] = {"x": self.layout}
        if self.skips:
            found["skip"] = self.layout
        if self.condition == "token":
            found["c"] = "b n c"
        if self.rotary != "none":
            axes = f"{words} d" if self.rotary == "shared" else f"b {words} d"
            found |= {"rotary.0": axes, "rotary.1": axes}
        if self.bias != "none":
            found["bias"] = f"b 1 1 {words}" if self.bias == "keys" else f"{words} {words}"
        return found


class Block(nn.Module):
    """A transformer block of an :class:`Architecture`: attention and an MLP, with what its form adds."""

    def __init__(self, form: Architecture, *, skip: bool = False) -> None:
        super().__init__()
        c = form.width
        self.form = form
        self.norm1, self.norm2 = nn.LayerNorm(c, elementwise_affine=False), nn.LayerNorm(c, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))
        if form.condition != "none":
            self.modulation = nn.Linear(c, 3 * c)
        if form.block == "cross":
            self.cross_q, self.cross_kv = nn.Linear(c, c), nn.Linear(c, 2 * c)
        if form.block == "joint":
            self.text_qkv, self.text_out = nn.Linear(c, 3 * c), nn.Linear(c, c)
            self.text_mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))
        if skip:
            self.merge = nn.Linear(2 * c, c)

    def forward(
        self,
        x: Tensor,
        c: Tensor | None = None,
        text: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return what becomes of the stream (its update alone where the residual is outside), after the text in a joint block.

        Args:
            x: The stream, in the layout of the form.
            c: Modulation, ``b c`` or ``b n c``.
            text: ``b m c``.
            rotary: Cosines and sines, ``n d`` or ``b n d``, over the text too where attention is joint.
            bias: Attention bias, ``b 1 1 n`` or ``n n``.
            skip: What an earlier block was given, like ``x``.
        """
        if skip is not None:
            x = self.merge(torch.cat([x, skip], -1))
        form, stream = self.form, x
        x = _plain(x, form.layout)
        h, gate = self.norm1(x), 1.0
        if c is not None:
            shift, scale, gate = self.modulation(c if c.ndim == 3 else c[:, None]).chunk(3, -1)
            h = h * (1 + scale) + shift
        words = None
        if form.block == "joint" and text is not None:
            y, words = self._joint(h, text, rotary, bias)
        else:
            y = self._attend(self.qkv(h), rotary, bias)
        if form.block == "cross" and text is not None:
            y = y + functional.scaled_dot_product_attention(self.cross_q(x + y), *self.cross_kv(text).chunk(2, -1))
        update = gate * (y + self.mlp(h if form.block == "parallel" else self.norm2(x + gate * y)))
        update = _laid_out(update, form.layout)
        result = update if form.residual == "outside" else stream + update
        return result if words is None else (words, result)

    def _attend(self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.form.heads)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        mixed: Tensor = self.out(rearrange(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h n d -> b n (h d)"))
        return mixed

    def _joint(self, h: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend over text and image together; returns the image's part, and the text as the block leaves it."""
        parts = [self.text_qkv(text), self.qkv(h)]
        lengths = [text.shape[1], h.shape[1]]
        if self.form.text_last:
            parts, lengths = parts[::-1], lengths[::-1]
        split = torch.split(self._attend(torch.cat(parts, 1), rotary, bias), lengths, 1)
        words, y = split[::-1] if self.form.text_last else split
        text = text + self.text_out(words)
        return y, text + self.text_mlp(text)


def _plain(x: Tensor, layout: str) -> Tensor:
    """Bring a stream into ``b n c``."""
    if layout == "n b c":
        return x.transpose(0, 1)
    return x[None] if layout == "n c" else x


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """Bring a stream ``b n c`` into its layout."""
    if layout == "n b c":
        return x.transpose(0, 1)
    return x[0] if layout == "n c" else x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of ``b h n d`` by the angles of a table ``n d`` or ``b n d``."""
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


class Denoiser(nn.Module):
    """A transformer denoiser of a given form.

    Args:
        form: Its architecture.
        seed: Seed of its weights; the global random state is left alone.

    Example:
        >>> model = Denoiser(Architecture(block="joint", depth=2, rotary="shared"))
        >>> model
        Denoiser(Architecture(block='joint', depth=2, rotary='shared'))
        >>> model(torch.randn(2, 5, 4), text=torch.randn(2, 3, 4)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, form: Architecture, seed: int = 0) -> None:
        super().__init__()
        self.form, self.seed, c = form, seed, form.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.norm, self.head = nn.Linear(c, c), nn.LayerNorm(c), nn.Linear(c, c)
            if form.condition != "none":
                self.time = nn.Sequential(nn.Linear(4, c), nn.SiLU(), nn.Linear(c, c))
            if form.condition == "token":
                self.place = nn.Linear(2, c)
            if form.reads_text:
                self.text = nn.Linear(c, c)
            if form.bias == "keys":
                self.bias = nn.Linear(c, 1)
            if form.registers:
                self.registers = nn.Parameter(torch.randn(1, form.registers, c))
            later = form.depth - form.depth // 2
            self.blocks = nn.ModuleList(Block(form, skip=form.skips and i >= later) for i in range(form.depth))
            for name, parameter in self.blocks.named_parameters() if form.asleep else ():
                if ".modulation." in name:
                    nn.init.zeros_(parameter)
        self.eval()

    def __repr__(self) -> str:
        return f"Denoiser({self.form}{f', seed={self.seed}' if self.seed else ''})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis prints failing examples by this
        printer.text(repr(self))

    def forward(self, latent: Tensor, timestep: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            latent: ``b n c``, or ``n c`` where packed.
            timestep: ``b``, within :data:`TIMESTEPS`.
            text: ``b m c``.

        Returns:
            Like ``latent``.
        """
        form, image = self.form, self.embed(latent if latent.ndim == 3 else latent[None])
        words = self.text(text) if form.reads_text and text is not None else None
        parts = [image]
        if words is not None and form.text_inside:
            parts = [image, words] if form.text_last else [words, image]
        if form.registers:
            parts = [self.registers.expand(len(image), -1, -1), *parts]
        x = torch.cat(parts, 1) if len(parts) > 1 else image
        start = form.registers + (words.shape[1] if words is not None and form.text_inside and not form.text_last else 0)
        own = x.shape[1]
        length = own + (words.shape[1] if words is not None and form.block == "joint" else 0)
        c, rotary, bias = self._modulation(timestep, own), self._rotary(image, length), self._bias(x, words)
        x = _laid_out(x, form.layout)
        kept: list[Tensor] = []
        for block in self.blocks:
            skip = None
            if hasattr(block, "merge"):
                skip = kept.pop()
            else:
                kept.append(x)
            given = self.norm(x) if form.residual == "outside" else x
            y = block(given, c=c, text=None if form.text_inside else words, rotary=rotary, bias=bias, skip=skip)
            if form.block == "joint" and words is not None:
                words, y = y
            x = x + y if form.residual == "outside" else y
        x = _plain(x, form.layout)
        noise: Tensor = self.head(self.norm(x[:, start : start + image.shape[1]]))
        return noise if latent.ndim == 3 else noise[0]

    def _modulation(self, timestep: Tensor | None, tokens: int) -> Tensor | None:
        if self.form.condition == "none" or timestep is None:
            return None
        angle = timestep.to(self.embed.weight.dtype)[:, None] / torch.tensor([10.0, 1000.0]).to(self.embed.weight)
        c: Tensor = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        if self.form.condition == "sample":
            return c
        places = torch.arange(tokens, device=c.device, dtype=c.dtype)[:, None]
        own: Tensor = self.place(torch.cat([places.cos(), places.sin()], -1))
        return c[:, None] + own

    def _rotary(self, image: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
        if self.form.rotary == "none":
            return None
        half = self.form.width // self.form.heads // 2
        speeds = 0.5 ** torch.arange(half, device=image.device, dtype=image.dtype).repeat(2)
        angles = torch.arange(length, device=image.device, dtype=image.dtype)[:, None] * speeds
        if self.form.rotary == "sample":  # the grid of each sample has a scale of its own
            angles = angles * (1.5 + image.mean((1, 2)).sin())[:, None, None]
        return angles.cos(), angles.sin()

    def _bias(self, x: Tensor, words: Tensor | None) -> Tensor | None:
        if self.form.bias == "none":
            return None
        keys = x
        if words is not None and self.form.block == "joint":
            keys = torch.cat([x, words] if self.form.text_last else [words, x], 1)
        if self.form.bias == "keys":
            weights: Tensor = self.bias(keys)
            return rearrange(weights, "b n 1 -> b 1 1 n")
        places = torch.arange(keys.shape[1], device=x.device, dtype=x.dtype)
        return -(places[:, None] - places).abs() / 4  # nearer tokens count more
