"""Models built from the blocks of timm and torch, and layers that are pairs without a module of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from einops import rearrange, repeat
from timm.layers import PatchEmbed, RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.parts import _Time, _waves

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
