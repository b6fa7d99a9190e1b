"""U-ViT, MMDiT and FLUX: text in front of the image, or beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.image_parts import (
    FinalLayer,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    ada,
    grid_table,
    modulate,
    plain_norm,
    sinusoid,
    unpatchify,
)

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
