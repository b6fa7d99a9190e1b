"""A class-conditional adaLN-zero DiT, as a user would write it with timm.

Nothing in this file knows of routing: the point of the demo is that an ordinary model is converted as it stands.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from timm.layers import Attention, Mlp, PatchEmbed, build_sincos2d_pos_embed
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale every token of a sample alike.

    Args:
        x: tokens, `b n c`.
        shift: `b c`.
        scale: `b c`.

    Returns:
        `b n c`.
    """
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Sines and cosines of the timestep, followed by a two-layer perceptron."""

    def __init__(self, width: int, frequencies: int = 64) -> None:
        """Build the embedder.

        Args:
            width: channels of the embedding.
            frequencies: how many sines, and as many cosines.
        """
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.rates: Tensor
        self.register_buffer("rates", torch.exp(-math.log(10_000.0) * torch.arange(frequencies) / frequencies))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed timesteps: `b` → `b c`."""
        angles = timestep[:, None].float() * self.rates
        embedding: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedding


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        """Build the block.

        Args:
            width: channels of a token.
            heads: attention heads.
            mlp_ratio: hidden channels of the MLP, in multiples of `width`.
        """
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, hidden_features=int(width * mlp_ratio), act_layer=nn.GELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Update the tokens: `b n c`, condition `b c` → `b n c`."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Modulated norm and a projection to pixels."""

    def __init__(self, width: int, out_channels: int) -> None:
        """Build the layer.

        Args:
            width: channels of a token.
            out_channels: values per token that come out.
        """
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project: `b n c`, condition `b c` → `b n p`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        pixels: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return pixels


class DiT(nn.Module):
    """The denoiser: predicts what was mixed into an image, given the timestep and the class."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
    ) -> None:
        """Build the denoiser.

        Args:
            image_size: height and width of the image, in pixels.
            patch_size: height and width of a patch, in pixels; one patch is one token.
            in_channels: channels of the image.
            width: channels of a token.
            depth: number of blocks.
            heads: attention heads per block.
            classes: number of classes; one more, the last, stands for "no class" in classifier-free guidance.
        """
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.x_embedder = PatchEmbed(image_size, patch_size, in_channels, width)
        self.pos_embed = nn.Parameter(build_sincos2d_pos_embed([self.grid, self.grid], width, temperature=100.0))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Embedding(classes + 1, width)
        self.blocks = nn.Sequential(*(DiTBlock(width, heads) for _ in range(depth)))
        self.final_layer = FinalLayer(width, patch_size**2 * in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Start every block as the identity: the "zero" of adaLN-zero (Peebles & Xie, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        """Denoise a batch of images.

        Args:
            x: noisy images, `b c h w`.
            timestep: one per image, `b`.
            y: classes, `b`.

        Returns:
            The prediction, of the shape of `x`.
        """
        c = self.t_embedder(timestep) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        p = self.patch_size
        return rearrange(x, "b (gh gw) (ph pw c) -> b c (gh ph) (gw pw)", gh=self.grid, ph=p, pw=p)
