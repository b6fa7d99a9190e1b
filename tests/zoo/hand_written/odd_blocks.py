"""Blocks that return tuples and dicts, mixtures of experts, linear attention, latents that read tokens, a Sequential of pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.parts import _Attention, _DiTBlock, _mlp, _Time


class AuxBlock(_DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(x, c)
        return x, x.square().mean((1, 2))


class TupleDiT(nn.Module):
    """Blocks that give the stream and a penalty for each sample, which the root sums up and gives too."""

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.into, self.time, self.out = nn.Linear(channels, dim), _Time(dim), nn.Linear(dim, channels)
        self.blocks = nn.ModuleList([AuxBlock(dim, 4) for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c, x, total = self.time(t), self.into(x), torch.zeros(x.shape[0], device=x.device)
        for block in self.blocks:
            x, penalty = block(x, c)
            total = total + penalty
        return self.out(x), total


@entry("TupleDiT", dict(channels=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def tuple_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class MapsBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = _mlp(dim, 3 * dim)

    def forward(self, x: Tensor, c: Tensor) -> dict[str, Tensor]:
        h = self.norm1(x) + c[:, None]
        h, weights = self.attn(h, h, h, need_weights=True)
        x = x + h
        return {"hidden_states": x + self.mlp(self.norm2(x)), "attention": weights}


class DictDiT(nn.Module):
    """Blocks that give a dict, attention maps in it; the maps are returned on demand only."""

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.into, self.time, self.out = nn.Linear(channels, dim), _Time(dim), nn.Linear(dim, channels)
        self.blocks = nn.ModuleList([MapsBlock(dim, 4) for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor, maps: bool = False) -> dict[str, Any]:
        c, x, seen = self.time(t), self.into(x), []
        for block in self.blocks:
            out = block(x, c)
            x = out["hidden_states"]
            if maps:
                seen.append(out["attention"])
        return {"sample": self.out(x), "maps": seen}


@entry("DictDiT", dict(channels=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def dict_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class Experts(nn.Module):
    def __init__(self, dim: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen, self.gate = chosen, nn.Linear(dim, experts, bias=False)
        self.experts, self.shared = nn.ModuleList([_mlp(dim, 40) for _ in range(experts)]), _mlp(dim, 24)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(dim=-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(index == number)
            if token.numel():
                out.index_add_(0, token, expert(flat[token]) * weights[token, rank, None])
        return (out + self.shared(flat)).view_as(x)


class MoEBlock(_DiTBlock):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.mlp = Experts(dim, 5, 2)


class MoEDiT(nn.Module):
    """Each token goes to two experts of five, chosen by itself; how many an expert gets is known in the run alone."""

    block: type[nn.Module] = MoEBlock

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patch, self.time, self.head = nn.Conv2d(4, dim, 2, 2), _Time(dim), nn.ConvTranspose2d(dim, 4, 2, 2)
        self.blocks = nn.ModuleList([self.block(dim, 4) for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x)
        grid, x, c = x.shape[-2:], rearrange(x, "b c h w -> b (h w) c"), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x.mT.unflatten(2, grid))


@entry("MoEDiT", dict(dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def moe_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class LinearAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).mT.unflatten(1, (3, self.heads, -1)).unbind(1)  # b h d n
        q, k = F.relu(q), F.relu(k).mT
        v = F.pad(v, (0, 0, 0, 1), value=1.0)  # a row of ones gathers the normaliser
        out = (v @ k) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + 1e-4)
        return self.proj(out.flatten(1, 2).mT)


class LinearBlock(_DiTBlock):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.attn = LinearAttention(dim, heads)


class LinearDiT(MoEDiT):
    """Attention with ReLU features, keys and values multiplied first."""

    block = LinearBlock


@entry("LinearDiT", dict(dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def linear_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class ReadWriteBlock(nn.Module):
    def __init__(self, dim: int, heads: int, context: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = _Attention(dim, heads, context), _mlp(dim, 2 * dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class LatentInterface(nn.Module):
    """Recurrent interface: learned latents read the tokens, work among themselves, and are read by the tokens; in rounds."""

    def __init__(self, dim: int, latent_dim: int, latents: int, rounds: int) -> None:
        super().__init__()
        self.into, self.time, self.out = nn.Linear(10, dim), _Time(latent_dim), nn.Linear(dim, 10)
        self.pos, self.latents = nn.Parameter(torch.randn(64, dim) * 0.1), nn.Parameter(torch.randn(latents, latent_dim) * 0.1)
        self.rounds = nn.ModuleList(
            [
                nn.ModuleList(
                    [
                        ReadWriteBlock(latent_dim, 4, dim),
                        nn.ModuleList([ReadWriteBlock(latent_dim, 4, None) for _ in range(2)]),
                        ReadWriteBlock(dim, 4, latent_dim),
                    ]
                )
                for _ in range(rounds)
            ]
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = self.into(x) + self.pos[:n]
        latents = torch.cat([repeat(self.latents, "m d -> b m d", b=b), self.time(time)[:, None]], dim=1)
        for read, work, write in self.rounds:
            latents = read(latents, x)
            for block in work:
                latents = block(latents)
            x = write(x, latents)
        return self.out(x)


@entry("LatentInterface", dict(dim=32, latent_dim=40, latents=6, rounds=2), into=OTHERS, module=__name__, timestep="time")
def latent_interface(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "time": torch.randint(0, 1000, (batch,))}


class PairBlock(_DiTBlock):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, c = pair
        return super().forward(x, c), c


class SequentialDiT(nn.Module):
    """Blocks in `nn.Sequential`, so that one argument has to do: a pair of stream and condition goes in and out."""

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.into, self.time, self.out = nn.Linear(channels, dim), _Time(dim), nn.Linear(dim, channels)
        self.blocks = nn.Sequential(*[PairBlock(dim, 4) for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, _ = self.blocks((self.into(x), self.time(t)))
        return self.out(x)


@entry("SequentialDiT", dict(channels=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="t")
def sequential_dit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "t": torch.randint(0, 1000, (batch,))}
