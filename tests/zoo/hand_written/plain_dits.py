"""DiT and what grew out of it: PixArt, SiT with REPA, MDT, MaskDiT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import OTHERS, entry
from tests.zoo.hand_written.image_parts import (
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    ada,
    grid_table,
    modulate,
    plain_norm,
    unpatchify,
    zeros,
)

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
