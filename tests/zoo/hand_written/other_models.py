"""Denoisers and encoders the way people write them outside diffusers: library blocks, research repositories, odd containers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat
from timm.layers import PatchEmbed, RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry

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


# --- timm --------------------------------------------------------------------------------------------------------------


@entry(
    "VisionTransformer",
    dict(img_size=(16, 20), patch_size=4, num_classes=7, embed_dim=48, depth=3, num_heads=4, dynamic_img_size=True),
    into=OTHERS,
    module="timm.models.vision_transformer",
    timestep=None,
)
def timm_vit(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, 4 * rows, 20)}


class ViTWithRegisters(VisionTransformer):
    """timm's encoder as DINOv2 sets it up: class token, registers, layer scale, dense features out."""


@entry(
    "ViTWithRegisters",
    dict(
        img_size=(16, 20),
        patch_size=4,
        num_classes=0,
        global_pool="",
        embed_dim=48,
        depth=3,
        num_heads=4,
        reg_tokens=3,
        no_embed_class=True,
        init_values=0.1,
        qk_norm=True,
        dynamic_img_size=True,
    ),
    into=OTHERS,
    module=__name__,
    timestep=None,
)
def timm_vit_registers(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, 4 * rows, 20)}


class TimmBlockDenoiser(nn.Module):
    """Plain ViT blocks of timm; the time is a token in front, its place in the position table too."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patch = PatchEmbed(None, 2, 4, dim)
        self.time = _Time(dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 64, dim) * 0.02)
        self.blocks = nn.ModuleList([TimmBlock(dim, 4, mlp_ratio=3.0, qkv_bias=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 16)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.patch(x)
        x = torch.cat([self.time(timesteps).unsqueeze(1), x], dim=1)
        x = x + self.pos_embed[:, : x.size(1)]
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x))[:, 1:, :]
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)


@entry("TimmBlockDenoiser", dict(dim=32, depth=3), into=OTHERS, module=__name__, timestep="timesteps")
def timm_block_denoiser(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "timesteps": torch.randint(0, 1000, (batch,))}


@entry(
    "Eva",
    dict(
        img_size=(16, 20),
        patch_size=4,
        num_classes=7,
        embed_dim=48,
        depth=3,
        num_heads=4,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        dynamic_img_size=True,
    ),
    into=OTHERS,
    module="timm.models.eva",
    timestep=None,
)
def timm_eva(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, 4 * rows, 20)}


class EvaBlockDenoiser(nn.Module):
    """timm's EVA blocks, rotary table by keyword from a module of the root, no prefix tokens, time added to the tokens."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, dim, 2, 2), _Time(dim)
        self.rope = RotaryEmbeddingCat(dim // heads, in_pixels=False, feat_shape=None, ref_feat_shape=(4, 5))
        self.blocks = nn.ModuleList(
            [EvaBlock(dim, heads, mlp_ratio=2.0, swiglu_mlp=True, num_prefix_tokens=0, init_values=0.1) for _ in range(depth)]
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.time(t)[:, None]
        rope = self.rope.get_embed(shape=[height, width])
        for block in self.blocks:
            x = block(x, rope=rope)
        return self.head(self.norm(x)).transpose(1, 2).unflatten(2, (height, width))


@entry("EvaBlockDenoiser", dict(dim=48, depth=3, heads=4), into=OTHERS, module=__name__, timestep="t")
def eva_block_denoiser(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


class EvaPrefixDenoiser(EvaBlockDenoiser):
    """The same with the time and two registers in front: the blocks know them by number and leave them unturned."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__(dim, depth, heads)
        self.registers = nn.Parameter(torch.randn(1, 2, dim) * 0.02)
        self.blocks = nn.ModuleList([EvaBlock(dim, heads, swiglu_mlp=True, num_prefix_tokens=3) for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x)
        height, width = x.shape[-2:]
        rope = self.rope.get_embed(shape=[height, width])
        x = torch.cat([self.time(t)[:, None], self.registers.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x, rope=rope)
        return self.head(self.norm(x[:, 3:])).transpose(1, 2).unflatten(2, (height, width))


@entry("EvaPrefixDenoiser", dict(dim=48, depth=3, heads=4), into=OTHERS, module=__name__, timestep="t")
def eva_prefix_denoiser(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "t": torch.randint(0, 1000, (batch,))}


# --- torch's own transformer layers --------------------------------------------------------------------------------------


class MDM(nn.Module):
    """Motion: `nn.TransformerEncoder`, frames first ``n b c``, one token of time and text in front, a dict of conditions."""

    def __init__(self, joints: int, features: int, dim: int, depth: int, text: int) -> None:
        super().__init__()
        self.joints, self.features, self.dim = joints, features, dim
        self.pose_in, self.pose_out = nn.Linear(joints * features, dim), nn.Linear(dim, joints * features)
        self.embed_text, self.embed_timestep = nn.Linear(text, dim), _Time(dim)
        self.register_buffer("pe", _waves(torch.arange(80), dim)[:, None])
        layer = nn.TransformerEncoderLayer(dim, nhead=4, dim_feedforward=72, dropout=0.1, activation="gelu")
        self.seqTransEncoder = nn.TransformerEncoder(layer, num_layers=depth, enable_nested_tensor=False)

    def forward(self, x: Tensor, timesteps: Tensor, y: dict[str, Any]) -> Tensor:
        bs, joints, features, frames = x.shape
        emb = self.embed_timestep(timesteps)[None] + self.embed_text(y["text_embed"])[None]
        x = self.pose_in(x.permute(3, 0, 1, 2).reshape(frames, bs, joints * features))
        xseq = torch.cat((emb, x), dim=0)
        xseq = xseq + self.pe[: xseq.shape[0]]
        output = self.seqTransEncoder(xseq)[1:]
        return self.pose_out(output).reshape(frames, bs, joints, features).permute(1, 2, 3, 0)


@entry("MDM", dict(joints=7, features=6, dim=32, depth=3, text=20), into=OTHERS, module=__name__, timestep="timesteps")
def mdm(batch: int, rows: int) -> dict[str, Any]:
    y = {"text_embed": torch.randn(batch, 20)}
    return {"x": torch.randn(batch, 7, 6, 5 * rows), "timesteps": torch.randint(0, 1000, (batch,)), "y": y}


class MDMBatchFirst(nn.Module):
    """Motion again, ``b n c``: without gradients torch runs each layer as one fused kernel."""

    def __init__(self, features: int, dim: int, depth: int) -> None:
        super().__init__()
        self.dim, self.into, self.out, self.time = dim, nn.Linear(features, dim), nn.Linear(dim, features), _Time(dim)
        self.pos = nn.Parameter(torch.randn(1, 80, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(dim, nhead=4, dim_feedforward=72, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=depth)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        x = torch.cat([self.time(timesteps).unsqueeze(1), self.into(x)], dim=1)
        x = self.encoder(x + self.pos[:, : x.shape[1]])
        return self.out(x[:, 1:])


@entry("MDMBatchFirst", dict(features=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="timesteps")
def mdm_batch_first(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5 * rows, 10), "timesteps": torch.randint(0, 1000, (batch,))}


class MDMPadded(MDMBatchFirst):
    """And with motions of several lengths: a padding mask, which torch turns into nested tensors when it may."""

    def forward(self, x: Tensor, timesteps: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        frames = x.shape[1]
        padding = torch.arange(1 + frames, device=x.device)[None] > lengths[:, None]  # the time token is real
        x = torch.cat([self.time(timesteps).unsqueeze(1), self.into(x)], dim=1)
        x = self.encoder(x + self.pos[:, : x.shape[1]], src_key_padding_mask=padding)
        return self.out(x[:, 1:])


@entry("MDMPadded", dict(features=10, dim=32, depth=3), into=OTHERS, module=__name__, timestep="timesteps")
def mdm_padded(batch: int, rows: int) -> dict[str, Any]:
    lengths = 5 * rows - torch.arange(batch)  # torch's nested tensors come back as long as the longest
    return {"x": torch.randn(batch, 5 * rows, 10), "timesteps": torch.randint(0, 1000, (batch,)), "lengths": lengths}


class DiffusionPolicy(nn.Module):
    """Actions: `nn.TransformerDecoder`, causal mask, observations and time as memory behind a mask of its own, masks as buffers."""

    def __init__(self, actions: int, horizon: int, steps: int, observation: int, dim: int, depth: int) -> None:
        super().__init__()
        self.input_emb, self.cond_obs_emb, self.time_emb = nn.Linear(actions, dim), nn.Linear(observation, dim), _Time(dim)
        self.pos_emb = nn.Parameter(torch.randn(1, horizon, dim) * 0.1)
        self.cond_pos_emb = nn.Parameter(torch.randn(1, steps + 1, dim) * 0.1)
        self.drop = nn.Dropout(0.1)
        self.encoder = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        layer = nn.TransformerDecoderLayer(dim, 4, 3 * dim, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=depth)
        self.register_buffer("mask", torch.full((horizon, horizon), float("-inf")).triu(1))
        later = torch.arange(horizon)[:, None] < torch.arange(steps + 1)[None] - 1
        self.register_buffer("memory_mask", torch.zeros(horizon, steps + 1).masked_fill(later, float("-inf")))
        self.ln_f, self.head = nn.LayerNorm(dim), nn.Linear(dim, actions)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        embedded = torch.cat([self.time_emb(timestep.expand(sample.shape[0])).unsqueeze(1), self.cond_obs_emb(cond)], dim=1)
        memory = self.encoder(self.drop(embedded + self.cond_pos_emb[:, : embedded.shape[1]]))
        tokens = self.input_emb(sample)
        x = self.drop(tokens + self.pos_emb[:, : tokens.shape[1]])
        x = self.decoder(tgt=x, memory=memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.head(self.ln_f(x))


@entry(
    "DiffusionPolicy",
    dict(actions=10, horizon=16, steps=5, observation=20, dim=32, depth=3),
    into=OTHERS,
    module=__name__,
    rows=(4,),  # the masks are buffers as long as the horizon
)
def diffusion_policy(batch: int, rows: int) -> dict[str, Any]:
    return {"sample": torch.randn(batch, 4 * rows, 10), "timestep": torch.randint(0, 1000, (batch,)), "cond": torch.randn(batch, 5, 20)}


# --- one module holds all layers -------------------------------------------------------------------------------------------


class LucidAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm, self.attend = nn.RMSNorm(dim), nn.Softmax(dim=-1)
        self.to_qkv, self.to_out = nn.Linear(dim, heads * dim_head * 3, bias=False), nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        dots = torch.einsum("b h i d, b h j d -> b h i j", q * self.scale, k)
        out = torch.einsum("b h i j, b h j d -> b h i d", self.attend(dots), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class LucidTransformer(nn.Module):
    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            forward = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
            self.layers.append(nn.ModuleList([LucidAttention(dim, 4, 10), forward]))
        self.norm = nn.RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class LucidDenoiser(nn.Module):
    """Pairs of attention and feed-forward in the lists of one transformer module, which the root calls once; no module is a block."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.to_tokens, self.to_time = nn.Linear(3 * 4, dim), _Time(dim)
        self.registers = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.transformer = LucidTransformer(dim, depth)
        self.to_pixels = nn.Linear(dim, 3 * 4)

    def forward(self, img: Tensor, times: Tensor) -> Tensor:
        h = img.shape[-2] // 2
        tokens = self.to_tokens(rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)) + self.to_time(times)[:, None]
        tokens = torch.cat([repeat(self.registers, "r d -> b r d", b=len(img)), tokens], dim=1)
        tokens = self.transformer(tokens)[:, len(self.registers) :]
        return rearrange(self.to_pixels(tokens), "b (h w) (p q c) -> b c (h p) (w q)", p=2, q=2, h=h)


@entry("LucidDenoiser", dict(dim=32, depth=3), into=OTHERS, module=__name__, timestep="times", timestep_range=(0.0, 1.0))
def lucid_denoiser(batch: int, rows: int) -> dict[str, Any]:
    return {"img": torch.randn(batch, 3, 2 * rows, 10), "times": torch.rand(batch)}


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
