"""Parts that the models of library blocks, video, audio and odd layouts share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

# --- shared parts ------------------------------------------------------------------------------------------------------


def _waves(t: Tensor, dim: int) -> Tensor:
    angles = t.float()[..., None] * torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _mlp(dim: int, hidden: int, out: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out or dim))


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of channels of ``b h n d`` by ``n d/2`` angles."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1).flatten(-2)


class _Time(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.mlp = dim, nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(_waves(t, self.dim))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(context or dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (self.q(x), k, v))
        if rope is not None:
            q, k = _rotated(q, rope), _rotated(k, rope)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)"))


class _DiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = _Attention(dim, heads), _mlp(dim, 3 * dim)
        self.modulation = nn.Sequential(nn.SiLU(), _zeroed(nn.Linear(dim, 6 * dim)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
