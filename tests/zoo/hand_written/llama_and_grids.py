"""Lumina-Next in the style of LLaMA, and HDiT, whose streams are grids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.image_parts import FinalLayer, TimestepEmbedder, ada, modulate, sinusoid, zeros

# Lumina-Next, LLaMA style -----------------------------------------------------------------------------------------------------------


class LlamaAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, y_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.wk_y, self.wv_y = (nn.Linear(y_dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros([heads]))
        self.q_norm, self.k_norm, self.ky_norm = nn.LayerNorm(dim), *(nn.LayerNorm(kv_heads * self.head_dim) for _ in range(2))

    @staticmethod
    def apply_rotary_emb(x_in: Tensor, freqs_cis: Tensor) -> Tensor:
        x = torch.view_as_complex(x_in.float().reshape(*x_in.shape[:-1], -1, 2))
        return torch.view_as_real(x * freqs_cis.unsqueeze(2)).flatten(3).type_as(x_in)

    def spread(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(self.heads // self.kv_heads, dim=2).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, x_mask: Tensor, freqs_cis: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq = self.q_norm(self.wq(x)).view(bsz, seqlen, self.heads, self.head_dim)
        xk = self.k_norm(self.wk(x)).view(bsz, seqlen, self.kv_heads, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, self.kv_heads, self.head_dim)
        xq = self.apply_rotary_emb(xq, freqs_cis=freqs_cis).permute(0, 2, 1, 3)
        xk = self.apply_rotary_emb(xk, freqs_cis=freqs_cis)
        mask = x_mask.bool().view(bsz, 1, 1, seqlen).expand(-1, self.heads, seqlen, -1)
        output = F.scaled_dot_product_attention(xq, self.spread(xk), self.spread(xv), attn_mask=mask).permute(0, 2, 1, 3)
        yk = self.ky_norm(self.wk_y(y)).view(bsz, -1, self.kv_heads, self.head_dim)
        yv = self.wv_y(y).view(bsz, -1, self.kv_heads, self.head_dim)
        y_mask = y_mask.view(bsz, 1, 1, -1).expand(bsz, self.heads, seqlen, -1)
        output_y = F.scaled_dot_product_attention(xq, self.spread(yk), self.spread(yv), y_mask).permute(0, 2, 1, 3)
        output = output + output_y * self.gate.tanh().view(1, 1, -1, 1)
        return self.wo(output.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim), (dim, hidden)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class NextDiTBlock(nn.Module):
    def __init__(self, layer_id: int, dim: int, heads: int, kv_heads: int, y_dim: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention, self.feed_forward = LlamaAttention(dim, heads, kv_heads, y_dim), FeedForward(dim, 64)
        self.attention_norm, self.attention_norm1, self.ffn_norm, self.ffn_norm1 = (nn.RMSNorm(dim, eps=1e-5) for _ in range(4))
        self.attention_y_norm = nn.RMSNorm(y_dim, eps=1e-5)
        self.adaLN_modulation = ada(dim, 6)

    def forward(self, x: Tensor, x_mask: Tensor, freqs_cis: Tensor, y: Tensor, y_mask: Tensor, adaln_input: Tensor | None = None) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).chunk(6, dim=1)
        normed = modulate(self.attention_norm(x), shift_msa, scale_msa)
        attn = self.attention(normed, x_mask, freqs_cis, self.attention_y_norm(y), y_mask)
        x = x + self.attention_norm1(gate_msa.unsqueeze(1) * attn)
        return x + self.ffn_norm1(gate_mlp.unsqueeze(1) * self.feed_forward(modulate(self.ffn_norm(x), shift_mlp, scale_mlp)))


class NextDiT(nn.Module):
    """A list of images of several sizes, padded inside with a learned token; complex rotary table, sandwich norms, grouped keys."""

    def __init__(self, dim: int = 32, depth: int = 3, heads: int = 4, kv_heads: int = 2, cap_dim: int = 20) -> None:
        super().__init__()
        self.channels = 3
        self.x_embedder, self.t_embedder = nn.Linear(2 * 2 * 3, dim), TimestepEmbedder(dim)
        self.cap_embedder = nn.Sequential(nn.LayerNorm(cap_dim), zeros(nn.Linear(cap_dim, dim)))
        self.layers = nn.ModuleList([NextDiTBlock(i, dim, heads, kv_heads, cap_dim) for i in range(depth)])
        self.final_layer = FinalLayer(dim, 2 * 2 * 6)
        self.freqs_cis = self.precompute_freqs_cis(dim // heads, 16)  # not a buffer
        self.pad_token = nn.Parameter(0.02 * torch.randn(dim))

    @staticmethod
    def precompute_freqs_cis(dim: int, end: int) -> Tensor:
        freqs = torch.outer(torch.arange(end).float(), 1.0 / 10000 ** (torch.arange(0, dim, 4).float() / dim))
        freqs_cis = torch.polar(torch.ones_like(freqs), freqs)
        high, wide = freqs_cis[:, None, :, None].repeat(1, end, 1, 1), freqs_cis[None, :, :, None].repeat(end, 1, 1, 1)
        return torch.cat([high, wide], dim=-1).flatten(2)

    def patchify_and_embed(self, x: list[Tensor]) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
        self.freqs_cis = self.freqs_cis.to(x[0].device)
        embedded, freqs, img_size = [], [], []
        for img in x:
            C, H, W = img.size()
            freqs.append(self.freqs_cis[: H // 2, : W // 2].flatten(0, 1))
            img_size.append((H, W))
            img = img.view(C, H // 2, 2, W // 2, 2).permute(1, 3, 0, 2, 4).flatten(2)
            embedded.append(self.x_embedder(img).flatten(0, 1))
        lengths = [len(item) for item in embedded]
        longest = max(lengths)
        mask = torch.zeros(len(x), longest, dtype=torch.int32, device=x[0].device)
        for i, n in enumerate(lengths):
            embedded[i] = torch.cat([embedded[i], self.pad_token.view(1, -1).expand(longest - n, -1)], dim=0)
            freqs[i] = torch.cat([freqs[i], freqs[i][-1:].expand(longest - n, -1)], dim=0)
            mask[i][:n] = 1
        return torch.stack(embedded, dim=0), mask, img_size, torch.stack(freqs, dim=0)

    def unpatchify(self, x: Tensor, img_size: list[tuple[int, int]]) -> list[Tensor]:
        imgs = []
        for i, (H, W) in enumerate(img_size):
            own = x[i][: (H // 2) * (W // 2)].view(H // 2, W // 2, 2, 2, 2 * self.channels)
            imgs.append(own.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2))
        return imgs

    def forward(self, x: list[Tensor], t: Tensor, cap_feats: Tensor, cap_mask: Tensor) -> list[Tensor]:
        x, mask, img_size, freqs_cis = self.patchify_and_embed(x)
        cap_mask_float = cap_mask.float().unsqueeze(-1)
        pooled = (cap_feats * cap_mask_float).sum(dim=1) / cap_mask_float.sum(dim=1)
        adaln_input = self.t_embedder(t) + self.cap_embedder(pooled.to(cap_feats))
        cap_mask = cap_mask.bool()
        for layer in self.layers:
            x = layer(x, mask, freqs_cis, cap_feats, cap_mask, adaln_input=adaln_input)
        images = self.unpatchify(self.final_layer(x, adaln_input), img_size)
        return [image.chunk(2, dim=0)[0] for image in images]


@entry("NextDiT", dict(dim=32), into=OTHERS, module=__name__, timestep="t", timestep_range=(0.0, 1.0))
def next_dit(batch: int, rows: int) -> dict[str, Any]:
    lengths = torch.arange(9, 9 - batch, -1)
    return {
        "x": [torch.randn(3, 2 * rows, 10 - 2 * i) for i in range(batch)],
        "t": torch.rand(batch),
        "cap_feats": torch.randn(batch, 9, 20),
        "cap_mask": (torch.arange(9) < lengths[:, None]).long(),
    }


class NextDiTBatch(NextDiT):
    """The same given one tensor: a mask of ones that a block cannot do without, and one rotary table ``1 n d`` for all samples."""

    def patchify_and_embed(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
        B, C, H, W = x.size()
        x = self.x_embedder(x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)).flatten(1, 2)
        mask = torch.ones(x.shape[0], x.shape[1], dtype=torch.int32, device=x.device)
        return x, mask, [(H, W)] * B, self.freqs_cis[: H // 2, : W // 2].flatten(0, 1).unsqueeze(0)


@entry("NextDiTBatch", dict(dim=32), into=OTHERS, module=__name__, timestep="t", timestep_range=(0.0, 1.0))
def next_dit_batch(batch: int, rows: int) -> dict[str, Any]:
    return {**next_dit.example(batch, rows), "x": torch.randn(batch, 3, 2 * rows, 10)}


# HDiT -------------------------------------------------------------------------------------------------------------------------------


class AdaRMSNorm(nn.Module):
    def __init__(self, dim: int, cond: int) -> None:
        super().__init__()
        self.linear = zeros(nn.Linear(cond, dim, bias=False))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (self.linear(cond)[:, None, None, :] + 1)


class GEGLU(nn.Linear):
    """A linear layer that is its own activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, 2 * hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = super().forward(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class HDiTAttention(nn.Module):
    def __init__(self, dim: int, head: int, cond: int) -> None:
        super().__init__()
        self.head, heads = head, dim // head
        self.norm, self.scale = AdaRMSNorm(dim, cond), nn.Parameter(torch.full([heads], 3.0))
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), zeros(nn.Linear(dim, dim, bias=False))
        self.register_buffer("freqs", torch.linspace(1.0, 6.0, heads * head // 8).view(head // 8, heads).T.contiguous())

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        skip = x
        qkv = self.qkv_proj(self.norm(x, cond))
        q, k, v = rearrange(qkv, "n h w (t nh e) -> t n nh (h w) e", t=3, e=self.head)
        q, k = (F.normalize(t, dim=-1) * self.scale[:, None, None].abs().sqrt() for t in (q, k))
        angles = (pos.flatten(0, 1)[:, None, :, None] * self.freqs[:, None, :]).flatten(-2).movedim(-2, -3)
        cos, sin = torch.cos(angles).to(q), torch.sin(angles).to(q)
        q, k = (self.turn(t, cos, sin) for t in (q, k))
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out_proj(rearrange(x, "n nh (h w) e -> n h w (nh e)", h=skip.shape[-3], w=skip.shape[-2])) + skip

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        d = cos.shape[-1]
        one, two, rest = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


class HDiTFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, cond: int) -> None:
        super().__init__()
        self.norm, self.up_proj, self.down_proj = AdaRMSNorm(dim, cond), GEGLU(dim, hidden), zeros(nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(self.norm(x, cond))) + x


class HDiTLayer(nn.Module):
    def __init__(self, dim: int, cond: int) -> None:
        super().__init__()
        self.self_attn, self.ff = HDiTAttention(dim, 8, cond), HDiTFeedForward(dim, 3 * dim, cond)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        return self.ff(self.self_attn(x, pos, cond), cond)


class Level(nn.ModuleList):
    """A list that can be called."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self:
            x = layer(x, *args, **kwargs)
        return x


class HDiT(nn.Module):
    """An hourglass of levels over tokens that stay a grid ``b h w c``, merged and split between levels, with scaled skips."""

    def __init__(self, widths: tuple[int, int] = (16, 32), depth: int = 2, cond: int = 20) -> None:
        super().__init__()
        outer, inner = widths
        self.patch_in, self.patch_out = nn.Linear(4 * 3, outer, bias=False), zeros(nn.Linear(outer, 4 * 3, bias=False))
        self.time_in_proj, self.class_emb, self.cond = nn.Linear(cond, cond, bias=False), nn.Embedding(10, cond), cond
        self.mapping = nn.Sequential(nn.RMSNorm(cond), GEGLU(cond, 44), nn.Linear(44, cond, bias=False))
        self.down_level, self.up_level = (Level([HDiTLayer(outer, cond) for _ in range(depth)]) for _ in range(2))
        self.mid_level = Level([HDiTLayer(inner, cond) for _ in range(depth)])
        self.merge, self.split = nn.Linear(4 * outer, inner, bias=False), nn.Linear(inner, 4 * outer, bias=False)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.out_norm = nn.RMSNorm(outer)

    def forward(self, x: Tensor, sigma: Tensor, class_cond: Tensor | None = None) -> Tensor:
        x = self.patch_in(rearrange(x.movedim(-3, -1), "b (h nh) (w nw) e -> b h w (nh nw e)", nh=2, nw=2))
        ys, xs = torch.linspace(-1, 1, x.shape[-3], device=x.device), torch.linspace(-1, 1, x.shape[-2], device=x.device)
        pos = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1)
        cond = self.time_in_proj(sinusoid(torch.log(sigma) / 4, self.cond, 100.0)) + self.class_emb(class_cond)
        cond = cond + self.mapping(cond)
        x = self.down_level(x, pos, cond)
        skip = x
        x = self.merge(rearrange(x, "... (h nh) (w nw) e -> ... h w (nh nw e)", nh=2, nw=2))
        coarse = rearrange(pos, "(h nh) (w nw) e -> h w (nh nw) e", nh=2, nw=2).mean(dim=-2)
        x = self.mid_level(x, coarse, cond)
        x = rearrange(self.split(x), "... h w (nh nw e) -> ... (h nh) (w nw) e", nh=2, nw=2)
        x = torch.lerp(skip, x, self.skip_scale)
        x = self.up_level(x, pos, cond)
        x = rearrange(self.patch_out(self.out_norm(x)), "b h w (nh nw e) -> b (h nh) (w nw) e", nh=2, nw=2)
        return x.movedim(-1, -3)


@entry("HDiT", dict(depth=2), into=OTHERS, module=__name__, timestep="sigma", timestep_range=(0.01, 80.0))
def hdit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 3, 2 * rows, 12),
        "sigma": 0.01 + 10 * torch.rand(batch),
        "class_cond": torch.randint(0, 10, (batch,)),
    }
