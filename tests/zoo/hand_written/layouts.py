"""Packed sequences, dataclasses and nested inputs, blocks that work in place, a modulation for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.parts import _Attention, _DiTBlock, _mlp, _rotated, _Time, _zeroed
from tests.zoo.hand_written.video_and_audio import RotaryFromLength

# --- layouts and containers ---------------------------------------------------------------------------------------------------


class PackedBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj, self.mlp = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), _mlp(dim, 3 * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.modulation = nn.Sequential(nn.SiLU(), _zeroed(nn.Linear(dim, 3 * dim)))

    def forward(self, x: Tensor, c: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        scale, gate1, gate2 = self.modulation(c).chunk(3, dim=-1)
        q, k, v = rearrange(self.qkv(self.norm1(x) * (1 + scale)), "n (three h d) -> three h n d", three=3, h=self.heads)
        q, k = _rotated(q, rope), _rotated(k, rope)
        x = x + gate1 * self.proj(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "h n d -> n (h d)"))
        return x + gate2 * self.mlp(self.norm2(x))


class PackedDiT(nn.Module):
    """All samples in one row of tokens ``n c``, their bounds in `cu_seqlens`, a mask of blocks; the time of each sample at its tokens."""

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.into, self.time, self.rotary = nn.Linear(channels, dim), _Time(dim), RotaryFromLength(dim // 4, leading=False)
        self.blocks = nn.ModuleList([PackedBlock(dim, 4) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, channels)

    def forward(self, x: Tensor, timestep: Tensor, cu_seqlens: Tensor) -> Tensor:
        place = torch.arange(x.shape[0], device=x.device)
        segment = torch.bucketize(place, cu_seqlens[1:], right=True)
        rope, _ = self.rotary(place - cu_seqlens[segment])
        mask = segment[:, None] == segment[None]
        x, c = self.into(x), self.time(timestep)[segment]
        for block in self.blocks:
            x = block(x, c, rope, mask)
        return self.out(self.norm(x))


@entry("PackedDiT", dict(channels=10, dim=32, depth=3), into=OTHERS, module=__name__)
def packed_dit(batch: int, rows: int) -> dict[str, Any]:
    lengths = torch.tensor([2 * rows + 3 * i for i in range(batch)])
    return {
        "x": torch.randn(int(lengths.sum()), 10),
        "timestep": torch.full((batch,), 400),  # one row of tokens has one region
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)),
    }


@dataclass
class Noised:
    latent: Tensor
    timestep: Tensor
    labels: Tensor | None = None


@dataclass
class Denoised:
    sample: Tensor
    logvar: Tensor
    hidden: Tensor | None = None


class DataclassDiT(nn.Module):
    """A dataclass in, a dataclass out; the timestep is one of its fields."""

    def __init__(self, dim: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patch, self.time, self.label = nn.Conv2d(4, dim, 2, 2), _Time(dim), nn.Embedding(classes, dim)
        self.blocks = nn.ModuleList([_DiTBlock(dim, 4) for _ in range(depth)])
        self.head, self.logvar = nn.ConvTranspose2d(dim, 4, 2, 2), nn.Linear(dim, 1)

    def forward(self, batch: Noised) -> Denoised:
        x = self.patch(batch.latent)
        grid = x.shape[-2:]
        x, c = x.flatten(2).mT, self.time(batch.timestep)
        if batch.labels is not None:
            c = c + self.label(batch.labels)
        for block in self.blocks:
            x = block(x, c)
        return Denoised(sample=self.head(x.mT.unflatten(2, grid)), logvar=self.logvar(c).squeeze(-1))


@entry("DataclassDiT", dict(dim=32, depth=3, classes=11), into=OTHERS, module=__name__, timestep=None)
def dataclass_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"batch": Noised(torch.randn(batch, 4, 2 * rows, 10), torch.randint(0, 1000, (batch,)), torch.randint(0, 11, (batch,)))}


class CrossBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])
        self.attn, self.cross, self.mlp = _Attention(dim, heads), _Attention(dim, heads), _mlp(dim, 3 * dim)

    def forward(self, x: Tensor, cond: dict[str, Any]) -> Tensor:
        x = x + self.attn(self.norms[0](x) + cond["t"][:, None])
        x = x + self.cross(self.norms[1](x), cond["text"]["tokens"], mask=cond["text"]["mask"][:, None, None])
        return x + self.mlp(self.norms[2](x))


class NestedInputsDiT(nn.Module):
    """A tuple of latents, a dict of dicts of conditions that every block gets whole, a list out: one latent each, and features."""

    def __init__(self, dim: int, depth: int, text: int) -> None:
        super().__init__()
        self.image_in, self.depth_in, self.text_in, self.time = nn.Linear(4, dim), nn.Linear(2, dim), nn.Linear(text, dim), _Time(dim)
        self.blocks = nn.ModuleList([CrossBlock(dim, 4) for _ in range(depth)])
        self.heads = nn.ModuleList([nn.Linear(dim, 4), nn.Linear(dim, 2)])

    def forward(self, latents: tuple[Tensor, Tensor], conditions: dict[str, Any]) -> list[Any]:
        image, depth = latents
        shape = image.shape[-2:]
        x = self.image_in(image.flatten(2).mT) + self.depth_in(depth.flatten(2).mT)
        text = conditions["text"]
        cond = {"t": self.time(conditions["timestep"]), "text": {"tokens": self.text_in(text["tokens"]), "mask": text["mask"]}}
        features = []
        for block in self.blocks:
            x = block(x, cond)
            features.append(x.mean(1))
        return [*(head(x).mT.unflatten(2, shape) for head in self.heads), features]


@entry("NestedInputsDiT", dict(dim=32, depth=3, text=20), into=OTHERS, module=__name__, timestep=None)
def nested_dit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "latents": (torch.randn(batch, 4, rows, 5), torch.randn(batch, 2, rows, 5)),
        "conditions": {
            "timestep": torch.randint(0, 1000, (batch,)),
            "text": {"tokens": torch.randn(batch, 7, 20), "mask": torch.arange(7)[None] < 7 - torch.arange(batch)[:, None]},
        },
    }


class InPlaceBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp, self.modulation = _Attention(dim, heads), _mlp(dim, 3 * dim), nn.Linear(dim, 2 * dim)

    def forward(self, hidden: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)
        residual = hidden
        hidden = self.norm1(hidden)
        hidden *= 1 + scale
        hidden += shift
        hidden = self.attn(hidden)
        hidden += residual
        residual = hidden
        hidden = self.mlp(self.norm2(hidden))
        hidden += residual
        return hidden


class InPlaceDiT(nn.Module):
    """Everything is added in place, in the blocks and between them, to tensors the block before has returned."""

    block: type[nn.Module] = InPlaceBlock

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.into, self.time, self.out = nn.Linear(channels, dim), _Time(dim), nn.Linear(dim, channels)
        self.pos = nn.Parameter(torch.randn(1, 64, dim) * 0.1)
        self.blocks = nn.ModuleList([self.block(dim, 4) for _ in range(depth)])
        self.extra = nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, x = self.time(t), self.into(x)
        x += self.pos[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x, c)
            x.add_(self.extra(c)[:, None])
        return self.out(x)


@entry("InPlaceDiT", dict(channels=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def in_place_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class OverwritingBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.attn, self.mlp = _Attention(dim, heads), _mlp(dim, 3 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x += self.attn(self.norm1(x.clone()) + c[:, None])  # the clone is what backward reads
        x += self.mlp(self.norm2(x.clone()))
        return x


class OverwritingDiT(InPlaceDiT):
    """The blocks write into the very tensor they are given."""

    block = OverwritingBlock


@entry("OverwritingDiT", dict(channels=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def overwriting_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class TokenwiseBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = _Attention(dim, heads), _mlp(dim, 3 * dim)
        self.modulation = nn.Sequential(nn.SiLU(), _zeroed(nn.Linear(dim, 6 * dim)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class TokenwiseDiT(nn.Module):
    """Modulation for each token ``b n c``: the time joined with a condition that lies on the same grid."""

    def __init__(self, channels: int, local: int, dim: int, depth: int) -> None:
        super().__init__()
        self.into, self.local_in, self.time, self.out = (
            nn.Linear(channels, dim),
            nn.Linear(local, dim),
            _Time(dim),
            nn.Linear(dim, channels),
        )
        self.blocks = nn.ModuleList([TokenwiseBlock(dim, 4) for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor, local: Tensor) -> Tensor:
        c = self.time(t).unsqueeze(1) + self.local_in(local)
        x = self.into(x)
        for block in self.blocks:
            x = block(x, c)
        return self.out(x)


@entry("TokenwiseDiT", dict(channels=10, local=6, dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def tokenwise_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "t": torch.randint(0, 1000, (batch,)), "local": torch.randn(batch, 5 * rows, 6)}


class DiffusionForcing(TokenwiseDiT):
    """A noise level for each frame, ``b n``; no sample has a timestep of its own."""

    def forward(self, x: Tensor, k: Tensor) -> Tensor:  # type: ignore[override]
        c = self.time(k) + self.local_in(torch.zeros(6, device=x.device))
        x = self.into(x)
        for block in self.blocks:
            x = block(x, c)
        return self.out(x)


@entry("DiffusionForcing", dict(channels=10, local=6, dim=32, depth=3), into=OTHERS, module=__name__, timestep=None)
def diffusion_forcing(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "k": torch.randint(0, 1000, (batch, 5 * rows))}
