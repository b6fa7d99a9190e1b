"""Residuals added by the root, blocks that hang in odd places or come round again, registers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.image_parts import DiTBlock, FinalLayer, PatchEmbed, TimestepEmbedder, ada, unpatchify, zeros
from tests.zoo.hand_written.llama_and_grids import FeedForward

# Blocks without a residual of their own ---------------------------------------------------------------------------------------------


class ParallelBlock(nn.Module):
    """Attention and MLP from one projection, side by side."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.fused, self.out = nn.Linear(dim, 3 * dim + 4 * dim), zeros(nn.Linear(dim + 4 * dim, dim))
        self.to_gain = nn.Linear(dim, dim)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = h * (1 + self.to_gain(F.silu(c)))[:, None]
        qkv, wide = self.fused(h).split([3 * self.dim, 4 * self.dim], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        mixed = torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)
        return self.out(torch.cat([mixed, F.gelu(wide)], dim=-1))


class ParallelDiT(nn.Module):
    """Norms in a list of their own, and the residual added in the root forward."""

    def __init__(self, dim: int = 24, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patch, self.time = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.place = nn.Parameter(0.1 * torch.randn(40, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim, bias=False) for _ in range(depth)])
        self.blocks = nn.ModuleList([ParallelBlock(dim, heads) for _ in range(depth)])
        self.head = FinalLayer(dim, 4 * 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.patch(x) + self.place[: h * w]
        c = self.time(t)
        x = self.layers(x, c)
        return unpatchify(self.head(x, c), 4, h, w)

    def layers(self, x: Tensor, c: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x), c)
        return x


class AddcmulDiT(ParallelDiT):
    """The same with the gate and the residual in one call."""

    def layers(self, x: Tensor, c: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = torch.addcmul(x, torch.sigmoid(c)[:, None], block(norm(x), c))
        return x


class PostNormDiT(ParallelDiT):
    """The same with the norm after the block, before the residual is added."""

    def layers(self, x: Tensor, c: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + norm(block(x, c))
        return x


class TwinDiT(ParallelDiT):
    """Two blocks side by side on the same normed tokens, both added to the residual stream."""

    def layers(self, x: Tensor, c: Tensor) -> Tensor:
        for norm, one, two in zip(self.norms, self.blocks[::2], self.blocks[1::2], strict=False):
            y = norm(x)
            x = x + one(y, c) + two(y, c)
        return x


@entry("ParallelDiT", dict(dim=24), into=OTHERS, module=__name__, timestep="t")
def parallel_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


for _name in ("AddcmulDiT", "PostNormDiT", "TwinDiT"):
    entry(_name, dict(dim=24), into=OTHERS, module=__name__, timestep="t")(parallel_dit.example)


# Blocks elsewhere than in one list --------------------------------------------------------------------------------------------------


class NestedDiT(nn.Module):
    """Blocks in lists of lists, in a dict, and as attributes that are looked up by name."""

    def __init__(self, dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patch, self.time = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.place = nn.Parameter(0.1 * torch.randn(1, 40, dim))
        self.stages = nn.ModuleList([nn.ModuleList([DiTBlock(dim, heads) for _ in range(n)]) for n in (1, 2)])
        self.extra = nn.ModuleDict({"mid": DiTBlock(dim, heads)})
        self.block1, self.block2 = DiTBlock(dim, heads), DiTBlock(dim, heads)
        self.head = FinalLayer(dim, 4 * 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.patch(x) + self.place[:, : h * w]
        c = self.time(t)
        for stage in self.stages:
            for block in stage:
                x = block(x, c)
        x = self.extra["mid"](x, c=c)
        for i in (1, 2):
            x = getattr(self, f"block{i}")(x=x, c=c)
        return unpatchify(self.head(x, c), 4, h, w)


@entry("NestedDiT", dict(dim=24), into=OTHERS, module=__name__, timestep="t")
def nested_dit(batch: int, rows: int) -> dict[str, Any]:
    return parallel_dit.example(batch, rows)


class SharedDiT(nn.Module):
    """One block that runs several times, told apart by an embedding of the step, with the input added anew each time."""

    def __init__(self, dim: int = 24, heads: int = 3, loops: int = 4) -> None:
        super().__init__()
        self.patch, self.time = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.place = nn.Parameter(0.1 * torch.randn(1, 40, dim))
        self.first, self.block = DiTBlock(dim, heads), DiTBlock(dim, heads)
        self.loop_embed = nn.Parameter(torch.randn(loops, dim))
        self.inject = nn.Linear(2 * dim, dim)
        self.head = FinalLayer(dim, 4 * 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.patch(x) + self.place[:, : h * w]
        c = self.time(t)
        x = start = self.first(x, c)
        for step in self.loop_embed:
            x = self.block(self.inject(torch.cat([x, start], dim=-1)), c + step)
        return unpatchify(self.head(x, c), 4, h, w)


@entry("SharedDiT", dict(dim=24), into=OTHERS, module=__name__, timestep="t")
def shared_dit(batch: int, rows: int) -> dict[str, Any]:
    return parallel_dit.example(batch, rows)


# Registers --------------------------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([-two, one], dim=-1)


class RotaryBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.proj, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), FeedForward(dim, 64)
        self.gates = ada(dim, 2)

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rope
        gate1, gate2 = self.gates(c)[:, None].chunk(2, dim=-1)
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        attn = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate1 * self.proj(attn)
        return x + gate2 * self.mlp(self.norm2(x))


class RegisterDiT(nn.Module):
    """Learned registers after the image, which the rotary table (shared by all samples, a tuple) does not turn."""

    def __init__(self, dim: int = 32, depth: int = 3, heads: int = 4, registers: int = 5) -> None:
        super().__init__()
        self.patch, self.time = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.registers = nn.Parameter(torch.randn(registers, dim))
        self.half = dim // heads // 2
        self.blocks = nn.ModuleList([RotaryBlock(dim, heads) for _ in range(depth)])
        self.head = FinalLayer(dim, 4 * 4)

    def rotary(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        places = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).float()
        angles = (places[:, :, None] / 100 ** torch.arange(0, 1, 2 / self.half, device=device)).flatten(1)
        angles = F.pad(torch.cat([angles, angles], dim=-1), (0, 0, 0, len(self.registers)))
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.patch(x)
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)
        c, rope = self.time(t), self.rotary(h, w, x.device)
        for block in self.blocks:
            x = block(x, c, rope)
        return unpatchify(self.head(x[:, : h * w], c), 4, h, w)


@entry("RegisterDiT", dict(dim=32), into=OTHERS, module=__name__, timestep="t")
def register_dit(batch: int, rows: int) -> dict[str, Any]:
    return parallel_dit.example(batch, rows)
