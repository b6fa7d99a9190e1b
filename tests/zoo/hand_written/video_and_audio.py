"""Wan and Latte as their repositories write them, F5-TTS, Stable Audio."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat
from timm.layers import PatchEmbed
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.parts import _Attention, _DiTBlock, _mlp, _rotated, _Time, _waves, _zeroed

# --- video --------------------------------------------------------------------------------------------------------------------


def _wan_rope(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    c = x.size(3) // 2
    parts = freqs.split([c - 2 * (c // 3), c // 3, c // 3], dim=1)
    output = []
    for i, (f, h, w) in enumerate(grid_sizes.tolist()):
        length = f * h * w
        own = torch.view_as_complex(x[i, :length].to(torch.float64).reshape(length, x.size(2), -1, 2))
        turn = [
            parts[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
            parts[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
            parts[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ]
        turned = torch.view_as_real(own * torch.cat(turn, dim=-1).reshape(length, 1, -1)).flatten(2)
        output.append(torch.cat([turned, x[i, length:]]))
    return torch.stack(output).to(x.dtype)


class WanBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.norm3, self.cross_attn = nn.LayerNorm(dim), _Attention(dim, heads)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn = _mlp(dim, 2 * dim + 8)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def self_attn(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        q, k = _wan_rope(q, grid_sizes, freqs), _wan_rope(k, grid_sizes, freqs)
        real = torch.arange(x.shape[1], device=x.device)[None] < seq_lens[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, e: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor, context: Tensor, context_lens: Tensor | None
    ) -> Tensor:
        with torch.amp.autocast("cuda", dtype=torch.float32):
            m = (self.modulation + e).chunk(6, dim=1)
        y = self.self_attn(self.norm1(x).float() * (1 + m[1]) + m[0], seq_lens, grid_sizes, freqs)
        x = x + y * m[2]
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(self.norm2(x).float() * (1 + m[4]) + m[3]) * m[5]


class WanOriginal(nn.Module):
    """Video as published: a list of videos of their own sizes, padded tokens, positions worked out inside each block, `**kwargs` to all."""

    def __init__(self, dim: int, depth: int, heads: int, text: int, text_len: int) -> None:
        super().__init__()
        self.dim, self.text_len, self.patch_size = dim, text_len, (1, 2, 2)
        self.patch_embedding = nn.Conv3d(4, dim, self.patch_size, self.patch_size)
        self.text_embedding = _mlp(text, dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([WanBlock(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, 4 * 4)
        d = dim // heads
        angles = [
            torch.outer(torch.arange(32), 1e4 ** -(torch.arange(0, s, 2).double() / s)) for s in (d - 4 * (d // 6), *[2 * (d // 6)] * 2)
        ]
        self.freqs = torch.cat([torch.polar(torch.ones_like(a), a) for a in angles], dim=1)  # no buffer, so that it keeps its dtype

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        device = self.patch_embedding.weight.device
        if self.freqs.device != device:
            self.freqs = self.freqs.to(device)
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long, device=device)
        assert seq_lens.max() <= seq_len
        x = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.size(1), u.size(2))], dim=1) for u in x])
        e = self.time_embedding(_waves(t.double(), self.dim).float())
        e0 = self.time_projection(e).unflatten(1, (6, self.dim))
        context = self.text_embedding(torch.stack([torch.cat([u, u.new_zeros(self.text_len - u.size(0), u.size(1))]) for u in context]))
        kwargs = dict(e=e0, seq_lens=seq_lens, grid_sizes=grid_sizes, freqs=self.freqs, context=context, context_lens=None)
        for block in self.blocks:
            x = block(x, **kwargs)
        x = self.head(self.norm(x) + e[:, None])
        out = []
        for u, v in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: math.prod(v)].view(*v, *self.patch_size, 4)
            u = torch.einsum("fhwpqrc->cfphqwr", u)
            out.append(u.reshape(4, *[i * j for i, j in zip(v, self.patch_size, strict=True)]))
        return [u.float() for u in out]


@entry(
    "WanOriginal",
    dict(dim=36, depth=3, heads=3, text=20, text_len=9),
    into=OTHERS,
    module=__name__,
    timestep="t",
    warns=("CUDA is not available or torch_xla is imported",),
)
def wan_original(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": [torch.randn(4, 3 - i % 2, rows, 10) for i in range(batch)],
        "t": torch.randint(0, 1000, (batch,)),
        "context": [torch.randn(5 + i, 20) for i in range(batch)],
        "seq_len": 3 * (rows // 2) * 5 + 2,
    }


class Latte(nn.Module):
    """Video: one list, in which blocks over a frame and blocks over time take turns; einops folds frames or places into the batch."""

    def __init__(self, dim: int, depth: int, frames: int, classes: int) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(None, 2, 4, dim), _Time(dim), nn.Embedding(classes, dim)
        self.register_buffer("pos_embed", _waves(torch.arange(64), dim)[None])
        self.register_buffer("temp_embed", _waves(torch.arange(frames), dim)[None])
        self.blocks = nn.ModuleList([_DiTBlock(dim, 4) for _ in range(depth)])
        self.norm, self.modulation = nn.LayerNorm(dim, elementwise_affine=False), _zeroed(nn.Linear(dim, 2 * dim))
        self.linear = _zeroed(nn.Linear(dim, 16))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches, _, _, height, _ = x.shape
        x = rearrange(x, "b f c h w -> (b f) c h w")
        x = self.x_embedder(x)
        x = x + self.pos_embed[:, : x.shape[1]]
        t = self.t_embedder(t)
        timestep_spatial = repeat(t, "n d -> (n c) d", c=self.temp_embed.shape[1])
        timestep_temp = repeat(t, "n d -> (n c) d", c=x.shape[1])
        y = self.y_embedder(y)
        y_spatial, y_temp = (repeat(y, "n d -> (n c) d", c=c) for c in (self.temp_embed.shape[1], x.shape[1]))
        for i in range(0, len(self.blocks), 2):
            spatial_block, temp_block = self.blocks[i : i + 2]
            x = spatial_block(x, timestep_spatial + y_spatial)
            x = rearrange(x, "(b f) t d -> (b t) f d", b=batches)
            if i == 0:
                x = x + self.temp_embed
            x = temp_block(x, timestep_temp + y_temp)
            x = rearrange(x, "(b t) f d -> (b f) t d", b=batches)
        shift, scale = self.modulation(F.silu(timestep_spatial + y_spatial))[:, None].chunk(2, dim=-1)
        x = self.linear(self.norm(x) * (1 + scale) + shift)
        return rearrange(x, "(b f) (h w) (p q c) -> b f c (h p) (w q)", b=batches, h=height // 2, p=2, q=2)


@entry("Latte", dict(dim=32, depth=4, frames=7, classes=11), into=OTHERS, module=__name__, timestep="t")
def latte(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 7, 4, 2 * rows, 10),
        "t": torch.randint(0, 1000, (batch,)),
        "y": torch.randint(0, 11, (batch,)),
    }


# --- audio --------------------------------------------------------------------------------------------------------------------


class RotaryFromLength(nn.Module):
    """A module that makes the table, of a length or of positions, and gives it with a scale."""

    def __init__(self, dim: int, leading: bool) -> None:
        super().__init__()
        self.leading = leading
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, dim, 2).float() / dim))

    def forward_from_seq_len(self, length: int) -> tuple[Tensor, float]:
        return self.forward(torch.arange(length, device=self.inv_freq.device))

    def forward(self, t: Tensor) -> tuple[Tensor, float]:
        angles = torch.einsum("i,j->ij", t.float(), self.inv_freq)
        return (angles[None] if self.leading else angles), 1.0


class F5Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.linear = _zeroed(nn.Linear(dim, 6 * dim))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.ff = _mlp(dim, 2 * dim)

    def attn(self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, float]) -> Tensor:
        freqs, scale = rope
        query, key, value = (
            p(x).view(len(x), -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v)
        )
        query, key = _rotated(query, freqs[:, None]) * scale, _rotated(key, freqs[:, None]) * scale**-1.0
        attn_mask = None if mask is None else mask[:, None, None].expand(len(x), self.heads, query.shape[-2], key.shape[-2])
        x = self.to_out(F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask).transpose(1, 2).reshape(x.shape))
        return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None, rope: Any = None) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.linear(F.silu(t)).chunk(6, dim=1)
        norm = self.attn_norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        x = x + gate_msa.unsqueeze(1) * self.attn(norm, mask, rope)
        norm = self.ff_norm(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return x + gate_mlp.unsqueeze(1) * self.ff(norm)


class F5TTS(nn.Module):
    """Speech ``b n c``: text as channels, padded to the audio; rotary table and its scale as a pair, a mask, a long skip, flags."""

    def __init__(self, dim: int, depth: int, mel: int, vocabulary: int, text_dim: int) -> None:
        super().__init__()
        self.time_embed, self.text_embed = _Time(dim), nn.Embedding(vocabulary + 1, text_dim)  # 0 fills up
        self.proj = nn.Linear(2 * mel + text_dim, dim)
        self.conv_pos = nn.Sequential(nn.Conv1d(dim, dim, 7, groups=4, padding=3), nn.Mish())
        self.rotary_embed = RotaryFromLength(dim // 4, leading=True)
        self.transformer_blocks = nn.ModuleList([F5Block(dim, 4) for _ in range(depth)])
        self.long_skip_connection = nn.Linear(2 * dim, dim, bias=False)
        self.norm_out, self.proj_out = nn.LayerNorm(dim), _zeroed(nn.Linear(dim, mel))

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        text: Tensor,
        time: Tensor,
        drop_audio_cond: bool = False,
        drop_text: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        batch, seq_len = x.shape[:2]
        if time.ndim == 0:
            time = time.repeat(batch)
        t = self.time_embed(time * 1000)
        text = F.pad((text + 1)[:, :seq_len], (0, max(0, seq_len - text.shape[1])), value=0)
        if drop_text:
            text = torch.zeros_like(text)
        if drop_audio_cond:
            cond = torch.zeros_like(cond)
        x = self.proj(torch.cat((x, cond, self.text_embed(text)), dim=-1))
        x = self.conv_pos(x.permute(0, 2, 1)).permute(0, 2, 1) + x
        rope = self.rotary_embed.forward_from_seq_len(seq_len)
        residual = x
        for block in self.transformer_blocks:
            x = block(x, t, mask=mask, rope=rope)
        x = self.long_skip_connection(torch.cat((x, residual), dim=-1))
        return self.proj_out(self.norm_out(x))


@entry(
    "F5TTS",
    dict(dim=32, depth=3, mel=10, vocabulary=30, text_dim=12),
    into=OTHERS,
    module=__name__,
    timestep="time",
    timestep_range=(0.0, 1.0),
)
def f5_tts(batch: int, rows: int) -> dict[str, Any]:
    frames = 6 * rows
    return {
        "x": torch.randn(batch, frames, 10),
        "cond": torch.randn(batch, frames, 10),
        "text": torch.randint(0, 30, (batch, 9)),
        "time": torch.rand(batch),
        "mask": torch.arange(frames)[None] < frames - torch.arange(batch)[:, None],
    }


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("use_reentrant", False)
    return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)


class StableAudioBlock(nn.Module):
    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.pre_norm, self.cross_attend_norm, self.ff_norm = (nn.LayerNorm(dim, bias=False) for _ in range(3))
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.cross_attn = _Attention(dim, heads, context)
        self.ff_in, self.ff_out = nn.Linear(dim, 4 * dim), _zeroed(nn.Linear(2 * dim, dim))
        nn.init.zeros_(self.to_out.weight)

    def self_attn(self, x: Tensor, rotary_pos_emb: tuple[Tensor, float]) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        freqs = rotary_pos_emb[0][-q.shape[-2] :, :]
        q, k = (_rotated(t.float(), freqs).type(v.dtype) for t in (q, k))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        global_cond: Tensor | None = None,
        mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
    ) -> Tensor:
        x = x + self.self_attn(self.pre_norm(x), rotary_pos_emb)
        if context is not None:
            x = x + self.cross_attn(self.cross_attend_norm(x), context)
        value, gate = self.ff_in(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff_out(value * F.silu(gate))


class ContinuousTransformer(nn.Module):
    def __init__(self, dim: int, depth: int, channels: int, context: int) -> None:
        super().__init__()
        self.project_in, self.project_out = nn.Linear(channels, dim, bias=False), nn.Linear(dim, channels, bias=False)
        self.rotary_pos_emb = RotaryFromLength(dim // 4, leading=False)
        self.layers = nn.ModuleList([StableAudioBlock(dim, 4, context) for _ in range(depth)])

    def forward(self, x: Tensor, prepend_embeds: Tensor | None = None, global_cond: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = self.project_in(x)
        if prepend_embeds is not None:
            x = torch.cat((prepend_embeds, x), dim=-2)
        rotary_pos_emb = self.rotary_pos_emb.forward_from_seq_len(x.shape[1])
        for layer in self.layers:
            x = _checkpoint(layer, x, rotary_pos_emb=rotary_pos_emb, global_cond=global_cond, **kwargs)
        return self.project_out(x)


class StableAudio(nn.Module):
    """Audio ``b c n``: conditions as tokens in front, a wrapper that checkpoints every layer, `**kwargs` handed down two levels."""

    def __init__(self, channels: int, dim: int, depth: int, text: int, seconds: int) -> None:
        super().__init__()
        self.to_timestep_embed = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.to_global_embed = nn.Sequential(nn.Linear(seconds, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim, bias=False))
        self.to_prepend_embed = nn.Linear(text, dim, bias=False)
        self.preprocess_conv, self.postprocess_conv = (nn.Conv1d(channels, channels, 1, bias=False) for _ in range(2))
        for conv in (self.preprocess_conv, self.postprocess_conv):
            nn.init.zeros_(conv.weight)
        self.register_buffer("fourier", torch.randn(8))
        self.transformer = ContinuousTransformer(dim, depth, channels, text)

    def _forward(self, x: Tensor, t: Tensor, cross: Tensor, prepend: Tensor, global_embed: Tensor, **kwargs: Any) -> Tensor:
        angles = 2 * math.pi * t[:, None] * self.fourier
        time = self.to_timestep_embed(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.to_global_embed(global_embed)
        prepend_inputs = torch.cat([self.to_prepend_embed(prepend), time.unsqueeze(1)], dim=1)
        x = self.preprocess_conv(x) + x
        output = self.transformer(rearrange(x, "b c t -> b t c"), prepend_embeds=prepend_inputs, context=cross, **kwargs)
        output = rearrange(output, "b t c -> b c t")[:, :, prepend_inputs.shape[1] :]
        return self.postprocess_conv(output) + output

    def forward(self, x: Tensor, t: Tensor, cross_attn_cond: Tensor, prepend_cond: Tensor, global_embed: Tensor, **kwargs: Any) -> Tensor:
        return self._forward(x, t, cross_attn_cond, prepend_cond, global_embed, **kwargs)


@entry(
    "StableAudio",
    dict(channels=10, dim=32, depth=3, text=20, seconds=6),
    into=OTHERS,
    module=__name__,
    timestep="t",
    timestep_range=(0.0, 1.0),
)
def stable_audio(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 10, 6 * rows),
        "t": torch.rand(batch),
        "cross_attn_cond": torch.randn(batch, 7, 20),
        "prepend_cond": torch.randn(batch, 2, 20),
        "global_embed": torch.randn(batch, 6),
    }
