"""Parts that the image models share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoid(t: Tensor, dim: int, factor: float = 1.0) -> Tensor:
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = factor * t.float()[:, None] * freqs[None]
    return torch.cat([args.cos(), args.sin()], dim=-1)


def zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def plain_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def ada(dim: int, parts: int, cond: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), zeros(nn.Linear(cond or dim, parts * dim)))


def grid_table(dim: int, h: int, w: int) -> Tensor:
    """Sine-cosine table ``(h w) dim``."""
    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sinusoid(ys.flatten(), dim // 2), sinusoid(xs.flatten(), dim // 2)], dim=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, freq: int = 20, factor: float = 1.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(freq, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.freq, self.factor = freq, factor

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.freq, self.factor))


class LabelEmbedder(nn.Module):
    """Drops labels at random in training, for guidance."""

    def __init__(self, classes: int, dim: int, drop: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)
        self.classes, self.drop = classes, drop

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train and self.drop > 0:
            labels = torch.where(torch.rand(labels.shape[0], device=labels.device) < self.drop, self.classes, labels)
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class DiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, cond: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, 4 * dim)
        self.adaLN_modulation = ada(dim, 6, cond)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int, cond: int | None = None) -> None:
        super().__init__()
        self.norm_final, self.linear, self.adaLN_modulation = plain_norm(dim), zeros(nn.Linear(dim, out)), ada(dim, 2, cond)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, channels: int, h: int, w: int, p: int = 2) -> Tensor:
    x = x.reshape(x.shape[0], h, w, p, p, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], channels, h * p, w * p)
