"""Image models the way research repositories write them: no library blocks, each with the habits of its own code base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry


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


# facebook DiT -----------------------------------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """Class labels, adaLN-zero, a frozen table of positions for one square size, a learned variance beside the noise."""

    def __init__(self, size: int = 8, channels: int = 4, dim: int = 24, depth: int = 4, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.in_channels, self.out_channels = channels, 2 * channels
        self.x_embedder = PatchEmbed(2, channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(classes, dim, 0.1)
        self.pos_embed = nn.Parameter(grid_table(dim, size // 2, size // 2)[None], requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, 4 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        t = self.t_embedder(t)
        y = self.y_embedder(y, self.training)
        c = t + y
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        side = int(x.shape[1] ** 0.5)
        return unpatchify(x, self.out_channels, side, side)


@entry("DiT", dict(size=8), into=OTHERS, module=__name__, timestep="t", rows=(4,))  # its table of positions has one size
def dit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 4, 2 * rows, 2 * rows),
        "t": torch.randint(0, 1000, (batch,)),
        "y": torch.randint(0, 10, (batch,)),
    }


# U-ViT ------------------------------------------------------------------------------------------------------------------------------


class UViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        q, k, v = rearrange(self.qkv(self.norm1(x)), "B L (K H D) -> K B H L D", K=3, H=self.num_heads).float()
        attn = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(rearrange(attn, "B H L D -> B L (H D)"))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """The time and the text as tokens in front of the image, long skips by concatenation, no modulation, a last convolution."""

    def __init__(self, dim: int = 24, depth: int = 5, heads: int = 4, clip_dim: int = 20, text: int = 7) -> None:
        super().__init__()
        self.in_chans, self.dim, self.extras = 3, dim, 1 + text
        self.patch_embed = PatchEmbed(2, 3, dim)
        self.time_embed = nn.Identity()
        self.context_embed = nn.Linear(clip_dim, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.extras + 64, dim))
        self.in_blocks = nn.ModuleList([UViTBlock(dim, heads) for _ in range(depth // 2)])
        self.mid_block = UViTBlock(dim, heads)
        self.out_blocks = nn.ModuleList([UViTBlock(dim, heads, skip=True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 2 * 2 * 3)
        self.final_layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        L = x.shape[1]
        time_token = self.time_embed(sinusoid(timesteps, self.dim)).unsqueeze(dim=1)
        x = torch.cat((time_token, self.context_embed(context), x), dim=1)
        x = x + self.pos_embed[:, : x.size(1)]
        skips = []
        for blk in self.in_blocks:
            x = blk(x)
            skips.append(x)
        x = self.mid_block(x)
        for blk in self.out_blocks:
            x = blk(x, skips.pop())
        x = self.decoder_pred(self.norm(x))
        assert x.size(1) == self.extras + L
        x = rearrange(x[:, self.extras :, :], "B (h w) (p1 p2 C) -> B C (h p1) (w p2)", h=height // 2, w=width // 2, p1=2, p2=2)
        return self.final_layer(x)


@entry("UViT", dict(dim=24, depth=5), into=OTHERS, module=__name__, timestep="timesteps")
def uvit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 3, 2 * rows, 10),
        "timesteps": torch.randint(0, 1000, (batch,)),
        "context": torch.randn(batch, 7, 20),
    }


# Stability's MMDiT ------------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    b, _, dim = q.shape
    q, k, v = (t.view(b, -1, heads, dim // heads).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False).transpose(1, 2).reshape(b, -1, dim)


class SplitAttention(nn.Module):
    """Attention in two halves, with whatever the caller does between them; has no forward."""

    def __init__(self, dim: int, heads: int, pre_only: bool = False) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.ln_q, self.ln_k = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        if not pre_only:
            self.proj = nn.Linear(dim, dim)

    def pre_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.num_heads, -1).movedim(2, 0)
        return self.ln_q(q).reshape(B, L, -1), self.ln_k(k).reshape(B, L, -1), v.reshape(B, L, -1)

    def post_attention(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DismantledBlock(nn.Module):
    def __init__(self, dim: int, heads: int, pre_only: bool = False, self_attn: bool = False) -> None:
        super().__init__()
        self.pre_only, self.self_attn = pre_only, self_attn
        self.norm1, self.attn = plain_norm(dim), SplitAttention(dim, heads, pre_only)
        if self_attn:
            self.attn2 = SplitAttention(dim, heads)
        if not pre_only:
            self.norm2, self.mlp = plain_norm(dim), Mlp(dim, 4 * dim)
        self.adaLN_modulation = ada(dim, 2 if pre_only else 9 if self_attn else 6)

    def pre_attention(self, x: Tensor, c: Tensor) -> tuple[Any, Any]:
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.pre_only else 9 if self.self_attn else 6, dim=1)
        normed = self.norm1(x)
        qkv = self.attn.pre_attention(modulate(normed, shift, scale))
        if not self.self_attn:
            return qkv, (x, *rest)
        gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = rest
        own = attend(*self.attn2.pre_attention(modulate(normed, shift2, scale2)), self.attn2.num_heads)
        return qkv, (x + gate2.unsqueeze(1) * self.attn2.post_attention(own), gate, shift_mlp, scale_mlp, gate_mlp)

    def post_attention(self, attn: Tensor, x: Tensor, gate: Tensor, shift_mlp: Tensor, scale_mlp: Tensor, gate_mlp: Tensor) -> Tensor:
        x = x + gate.unsqueeze(1) * self.attn.post_attention(attn)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


def block_mixing(
    context: Tensor, x: Tensor, context_block: DismantledBlock, x_block: DismantledBlock, c: Tensor
) -> tuple[Tensor | None, Tensor]:
    context_qkv, context_rest = context_block.pre_attention(context, c)
    x_qkv, x_rest = x_block.pre_attention(x, c)
    q, k, v = (torch.cat((context_qkv[i], x_qkv[i]), dim=1) for i in range(3))
    attn = attend(q, k, v, x_block.attn.num_heads)
    context_attn, x_attn = attn[:, : context_qkv[0].shape[1]], attn[:, context_qkv[0].shape[1] :]
    new = None if context_block.pre_only else context_block.post_attention(context_attn, *context_rest)
    return new, x_block.post_attention(x_attn, *x_rest)


class JointBlock(nn.Module):
    """Two sub-blocks and no code of its own."""

    def __init__(self, *args: Any, pre_only: bool, self_attn: bool) -> None:
        super().__init__()
        self.context_block = DismantledBlock(*args, pre_only=pre_only)
        self.x_block = DismantledBlock(*args, self_attn=self_attn)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor]:
        return block_mixing(*args, context_block=self.context_block, x_block=self.x_block, **kwargs)


class MMDiT(nn.Module):
    """Joint blocks that hold two sub-blocks and take ``*args``; the text is given first and returned first, and last not at all."""

    def __init__(self, dim: int = 32, depth: int = 4, heads: int = 4, table: int = 12, text_dim: int = 20, pooled: int = 9) -> None:
        super().__init__()
        self.table = table
        self.x_embedder = PatchEmbed(2, 6, dim)
        self.t_embedder, self.y_embedder = TimestepEmbedder(dim), nn.Sequential(nn.Linear(pooled, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.context_embedder = nn.Linear(text_dim, dim)
        self.register_buffer("pos_embed", grid_table(dim, table, table)[None])
        self.joint_blocks = nn.ModuleList([JointBlock(dim, heads, pre_only=i == depth - 1, self_attn=i < depth // 2) for i in range(depth)])
        self.final_layer = FinalLayer(dim, 4 * 6)

    def cropped_pos_embed(self, h: int, w: int) -> Tensor:
        top, left = (self.table - h) // 2, (self.table - w) // 2
        whole = rearrange(self.pos_embed, "1 (h w) c -> 1 h w c", h=self.table)
        return rearrange(whole[:, top : top + h, left : left + w, :], "1 h w c -> 1 (h w) c")

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.x_embedder(x) + self.cropped_pos_embed(h, w)
        c = self.t_embedder(t)
        if y is not None:
            c = c + self.y_embedder(y)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = block(context, x, c=c)
        return unpatchify(self.final_layer(x, c), 6, h, w)


@entry("MMDiT", dict(dim=32), into=OTHERS, module=__name__, timestep="t")
def mmdit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 6, 2 * rows, 10),
        "t": torch.randint(0, 1000, (batch,)),
        "y": torch.randn(batch, 9),
        "context": torch.randn(batch, 11, 20),
    }


# black-forest-labs FLUX -------------------------------------------------------------------------------------------------------------


def rope(pos: Tensor, dim: int) -> Tensor:
    omega = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64, device=pos.device) / dim)
    out = torch.einsum("...n,d->...nd", pos, omega)
    out = torch.stack([torch.cos(out), -torch.sin(out), torch.sin(out), torch.cos(out)], dim=-1)
    return rearrange(out, "b n d (i j) -> b n d i j", i=2, j=2).float()


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(*x.shape).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    x = F.scaled_dot_product_attention(apply_rope(q, pe), apply_rope(k, pe), v)
    return rearrange(x, "B H L D -> B L (H D)")


class EmbedND(nn.Module):
    def __init__(self, axes_dim: list[int]) -> None:
        super().__init__()
        self.axes_dim = axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([rope(ids[..., i], dim) for i, dim in enumerate(self.axes_dim)], dim=-3).unsqueeze(1)


@dataclass
class ModulationOut:
    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (1 + self.scale) * x + self.shift


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.is_double = double
        self.lin = nn.Linear(dim, (6 if double else 3) * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        out = self.lin(F.silu(vec))[:, None, :].chunk(6 if self.is_double else 3, dim=-1)
        return ModulationOut(*out[:3]), ModulationOut(*out[3:]) if self.is_double else None


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class FluxAttention(nn.Module):
    """Weights only."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(dim, 3 * dim), QKNorm(dim // heads), nn.Linear(dim, dim)


class DoubleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        for side in ("img", "txt"):
            setattr(self, f"{side}_mod", Modulation(dim, double=True))
            setattr(self, f"{side}_norm1", plain_norm(dim))
            setattr(self, f"{side}_attn", FluxAttention(dim, heads))
            setattr(self, f"{side}_norm2", plain_norm(dim))
            setattr(self, f"{side}_mlp", nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        img_qkv = self.img_attn.qkv(img_mod1(self.img_norm1(img)))
        img_q, img_k, img_v = rearrange(img_qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        img_q, img_k = self.img_attn.norm(img_q, img_k, img_v)
        txt_qkv = self.txt_attn.qkv(txt_mod1(self.txt_norm1(txt)))
        txt_q, txt_k, txt_v = rearrange(txt_qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        txt_q, txt_k = self.txt_attn.norm(txt_q, txt_k, txt_v)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        attn = attention(q, k, v, pe=pe)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = img + img_mod1.gate * self.img_attn.proj(img_attn)
        img = img + img_mod2.gate * self.img_mlp(img_mod2(self.img_norm2(img)))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_attn)
        txt = txt + txt_mod2.gate * self.txt_mlp(txt_mod2(self.txt_norm2(txt)))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.dim, self.hidden = heads, dim, 4 * dim
        self.linear1, self.linear2 = nn.Linear(dim, 3 * dim + 4 * dim), nn.Linear(dim + 4 * dim, dim)
        self.norm, self.pre_norm, self.mlp_act = QKNorm(dim // heads), plain_norm(dim), nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, double=False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        mod, _ = self.modulation(vec)
        qkv, mlp = torch.split(self.linear1(mod(self.pre_norm(x))), [3 * self.dim, self.hidden], dim=-1)
        q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        q, k = self.norm(q, k, v)
        return x + mod.gate * self.linear2(torch.cat((attention(q, k, v, pe=pe), self.mlp_act(mlp)), 2))


class Flux(nn.Module):
    """Packed tokens with ids, one rotary tensor for text and image, the text cut off again in the root forward."""

    def __init__(self, dim: int = 32, double: int = 2, single: int = 3, heads: int = 4, text_dim: int = 20, pooled: int = 9) -> None:
        super().__init__()
        self.pe_embedder = EmbedND([2, 2, 4])
        self.img_in, self.txt_in = nn.Linear(12, dim), nn.Linear(text_dim, dim)
        self.time_in, self.guidance_in = TimestepEmbedder(dim, factor=1000.0), TimestepEmbedder(dim, factor=1000.0)
        self.vector_in = nn.Sequential(nn.Linear(pooled, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(dim, heads) for _ in range(double)])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(dim, heads) for _ in range(single)])
        self.final_layer = FinalLayer(dim, 12)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError("img and txt must have three axes")
        img = self.img_in(img)
        vec = self.time_in(timesteps)
        if guidance is not None:
            vec = vec + self.guidance_in(guidance)
        vec = vec + self.vector_in(y)
        txt = self.txt_in(txt)
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        img = img[:, txt.shape[1] :, ...]
        return self.final_layer(img, vec)


@entry("Flux", dict(dim=32), into=OTHERS, module=__name__, timestep="timesteps", timestep_range=(0.0, 1.0))
def flux(batch: int, rows: int) -> dict[str, Any]:
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(5.0))
    return {
        "img": torch.randn(batch, rows * 5, 12),
        "img_ids": repeat(ids, "n c -> b n c", b=batch),
        "txt": torch.randn(batch, 7, 20),
        "txt_ids": torch.zeros(batch, 7, 3),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, 9),
        "guidance": torch.full((batch,), 3.5),
    }


# PixArt, the original repository ----------------------------------------------------------------------------------------------------


def t2i_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PackedCrossAttention(nn.Module):
    """All samples in one row, held apart by a block-diagonal mask that is made from the text lengths."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), zeros(nn.Linear(dim, dim))

    def forward(self, x: Tensor, cond: Tensor, mask: list[int]) -> Tensor:
        B, N, C = x.shape
        q = self.q_linear(x).view(1, -1, self.num_heads, self.head_dim)
        k, v = self.kv_linear(cond).view(1, -1, 2, self.num_heads, self.head_dim).unbind(2)
        bias = torch.block_diag(*(torch.ones(N, length, device=x.device) for length in mask)) > 0
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, -1, C))


class PixArtBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.attn, self.cross_attn, self.mlp = Attention(dim, heads), PackedCrossAttention(dim, heads), Mlp(dim, 4 * dim)
        self.drop_path = nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: list[int] | None = None, **kwargs: Any) -> Tensor:
        B, N, C = x.shape
        table = self.scale_shift_table[None] + t.reshape(B, 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        x = x + self.drop_path(gate_msa * self.attn(t2i_modulate(self.norm1(x), shift_msa, scale_msa)).reshape(B, N, C))
        x = x + self.cross_attn(x, y, mask)
        return x + self.drop_path(gate_mlp * self.mlp(t2i_modulate(self.norm2(x), shift_mlp, scale_mlp)))


class PixArt(nn.Module):
    """Text packed into one row with a list of lengths, one modulation for all blocks, positions made for each size in forward."""

    def __init__(self, dim: int = 24, depth: int = 3, heads: int = 3, caption: int = 20) -> None:
        super().__init__()
        self.dim, self.out_channels = dim, 8
        self.x_embedder, self.t_embedder = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.Sequential(nn.Linear(caption, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([PixArtBlock(dim, heads) for _ in range(depth)])
        self.norm_final, self.linear = plain_norm(dim), zeros(nn.Linear(dim, 4 * self.out_channels))
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        self.h, self.w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.x_embedder(x) + grid_table(self.dim, self.h, self.w).unsqueeze(0).to(x)
        t = self.t_embedder(timestep)
        t0 = self.t_block(t)
        y = self.y_embedder(y)
        if mask is not None:
            mask = mask.squeeze(1).squeeze(1)
            y = y.squeeze(1).masked_select(mask.unsqueeze(-1) != 0).view(1, -1, x.shape[-1])
            y_lens = mask.sum(dim=1).tolist()
        else:
            y_lens = [y.shape[2]] * y.shape[0]
            y = y.squeeze(1).view(1, -1, x.shape[-1])
        for block in self.blocks:
            x = block(x, y, t0, y_lens)
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        x = self.linear(t2i_modulate(self.norm_final(x), shift, scale))
        return unpatchify(x, self.out_channels, self.h, self.w)


@entry("PixArt", dict(dim=24), into=OTHERS, module=__name__)
def pixart(batch: int, rows: int) -> dict[str, Any]:
    lengths = torch.arange(9, 9 - batch, -1)
    return {
        "x": torch.randn(batch, 4, 2 * rows, 10),
        "timestep": torch.randint(0, 1000, (batch,)),
        "y": torch.randn(batch, 1, 9, 20),
        "mask": (torch.arange(9) < lengths[:, None]).long()[:, None, None],
    }


# SiT with REPA ----------------------------------------------------------------------------------------------------------------------


class SiTREPA(nn.Module):
    """Returns projected tokens of a block in the middle as a list beside the output; the projector flattens batch and tokens."""

    def __init__(self, dim: int = 24, depth: int = 4, heads: int = 3, encoder_depth: int = 2, z_dims: tuple[int, ...] = (18, 10)) -> None:
        super().__init__()
        self.dim, self.encoder_depth = dim, encoder_depth
        self.x_embedder, self.t_embedder = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(10, dim, 0.1)
        self.pos_embed = nn.Parameter(grid_table(dim, 8, 5)[None], requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.projectors = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 40), nn.SiLU(), nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, z)) for z in z_dims]
        )
        self.final_layer = FinalLayer(dim, 4 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.x_embedder(x) + self.pos_embed[:, : h * w]
        N, T, D = x.shape
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if (i + 1) == self.encoder_depth:
                zs = [projector(x.reshape(-1, D)).reshape(N, T, -1) for projector in self.projectors]
        return unpatchify(self.final_layer(x, c), 4, h, w), zs


@entry("SiTREPA", dict(dim=24), into=OTHERS, module=__name__, timestep="t", timestep_range=(0.0, 1.0))
def sit_repa(batch: int, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4, 2 * rows, 10), "t": torch.rand(batch), "y": torch.randint(0, 10, (batch,))}


# MDT --------------------------------------------------------------------------------------------------------------------------------


class BiasedAttention(nn.Module):
    """A learned bias for every pair of places; given ``ids_keep``, the rows and columns of the places that are there."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(0.02 * torch.randn((2 * side - 1) ** 2, heads))
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        apart = places[:, None] - places[None] + side - 1
        self.register_buffer("index", apart[..., 0] * (2 * side - 1) + apart[..., 1])

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-2, -1)) * (C // self.num_heads) ** -0.5
        bias = self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1).contiguous()
        if ids_keep is not None:
            bias = bias.unsqueeze(0).repeat(B, 1, 1, 1)
            bias = torch.gather(bias, 2, ids_keep[:, None, :, None].repeat(1, bias.shape[1], 1, bias.shape[-1]))
            bias = torch.gather(bias, 3, ids_keep[:, None, None, :].repeat(1, bias.shape[1], ids_keep.shape[1], 1))
        attn += bias
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


class MDTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.attn, self.mlp, self.adaLN_modulation = BiasedAttention(dim, heads, side), Mlp(dim, 4 * dim), ada(dim, 6)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), ids_keep=ids_keep)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class MDT(nn.Module):
    """Masked training: the encoder sees some tokens and their places; a side block fills in the others; the decoder has fixed places."""

    def __init__(self, side: int = 5, dim: int = 24, half: int = 2, decode: int = 1, heads: int = 3, mask_ratio: float = 0.4) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(2, 4, dim), TimestepEmbedder(dim), LabelEmbedder(10, dim, 0.1)
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(grid_table(dim, side, side)[None]) for _ in range(2))
        self.en_inblocks = nn.ModuleList([MDTBlock(dim, heads, side) for _ in range(half)])
        self.en_outblocks = nn.ModuleList([MDTBlock(dim, heads, side, skip=True) for _ in range(half)])
        self.de_blocks = nn.ModuleList([MDTBlock(dim, heads, side, skip=True) for _ in range(decode)])
        self.sideblocks = nn.ModuleList([MDTBlock(dim, heads, side)])
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.final_layer = FinalLayer(dim, 4 * 8)

    def forward_side_interpolater(self, x: Tensor, c: Tensor, mask: Tensor, ids_restore: Tensor) -> Tensor:
        mask_tokens = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] - x.shape[1], 1)
        x_ = torch.cat([x, mask_tokens], dim=1)
        x = torch.gather(x_, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2])) + self.decoder_pos_embed
        x_before = x
        for sideblock in self.sideblocks:
            x = sideblock(x, c, ids_keep=None)
        mask = mask.unsqueeze(dim=-1)
        return x * mask + (1 - mask) * x_before

    def forward(self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False, noise: Tensor | None = None) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        input_skip, skips, ids_keep = x, [], None
        N, L, D = x.shape
        if enable_mask:  # the original draws the noise here
            ids_shuffle = torch.argsort(noise, dim=1)
            ids_restore = torch.argsort(ids_shuffle, dim=1)
            ids_keep = ids_shuffle[:, : int(L * (1 - self.mask_ratio))]
            x = torch.gather(x, dim=1, index=ids_keep.unsqueeze(-1).repeat(1, 1, D))
            mask = torch.ones([N, L], device=x.device)
            mask[:, : ids_keep.shape[1]] = 0
            mask = torch.gather(mask, dim=1, index=ids_restore)
        for block in self.en_inblocks:
            x = block(x, c, ids_keep=ids_keep)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, skip=skips.pop(), ids_keep=ids_keep)
        x = self.forward_side_interpolater(x, c, mask, ids_restore) if enable_mask else x + self.decoder_pos_embed
        for block in self.de_blocks:
            x = block(x, c, skip=input_skip, ids_keep=None)
        side = int(L**0.5)
        return unpatchify(self.final_layer(x, c), 8, side, side)


@entry("MDT", dict(side=5), into=OTHERS, module=__name__, timestep="t", rows=(5,))  # positions and biases for one square size
def mdt(batch: int, rows: int) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 4, 2 * rows, 2 * rows),
        "t": torch.randint(0, 1000, (batch,)),
        "y": torch.randint(0, 10, (batch,)),
        "enable_mask": True,
        "noise": torch.rand(batch, rows * rows),
    }


# MaskDiT ----------------------------------------------------------------------------------------------------------------------------


class MaskDiT(nn.Module):
    """The mask comes as a dict of indices; a narrower decoder gets mask tokens between the others, and positions of its own."""

    def __init__(self, dim: int = 32, depth: int = 3, heads: int = 4, decoder_dim: int = 24, decoder_depth: int = 2) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = PatchEmbed(2, 4, dim), TimestepEmbedder(dim)
        self.y_embedder = nn.Linear(10, dim, bias=False)
        self.pos_embed = nn.Parameter(grid_table(dim, 8, 5)[None], requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.decoder_layer = FinalLayer(dim, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(grid_table(decoder_dim, 8, 5)[None], requires_grad=False)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList([DiTBlock(decoder_dim, 3, cond=dim) for _ in range(decoder_depth)])
        self.final_layer = FinalLayer(decoder_dim, 4 * 4, cond=dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.x_embedder(x) + self.pos_embed[:, : h * w]
        c = self.t_embedder(t) + self.y_embedder(y)
        if mask_dict is not None:
            x = torch.gather(x, dim=1, index=mask_dict["ids_keep"].unsqueeze(-1).repeat(1, 1, x.shape[2]))
        for block in self.blocks:
            x = block(x, c)
        x = self.decoder_layer(x, c)
        if mask_dict is not None:
            ids_restore = mask_dict["ids_restore"]
            mask_tokens = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] - x.shape[1], 1)
            x = torch.gather(torch.cat([x, mask_tokens], dim=1), dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = x + self.decoder_pos_embed[:, : h * w]
        for block in self.decoder_blocks:
            x = block(x, c)
        return {"x": unpatchify(self.final_layer(x, c), 4, h, w)}


@entry("MaskDiT", dict(dim=32), into=OTHERS, module=__name__, timestep="t", timestep_range=(-2.0, 2.0))
def maskdit(batch: int, rows: int) -> dict[str, Any]:
    shuffle = torch.rand(batch, rows * 5).argsort(dim=1)
    return {
        "x": torch.randn(batch, 4, 2 * rows, 10),
        "t": torch.randn(batch).clamp(-2, 2),
        "y": F.one_hot(torch.randint(0, 10, (batch,)), 10).float(),
        "mask_dict": {"ids_keep": shuffle[:, : rows * 3], "ids_restore": shuffle.argsort(dim=1)},
    }


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
