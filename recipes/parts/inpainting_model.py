"""An inpainting model in the manner of Lazy Diffusion (arXiv 2404.12382): look at the whole image once, then denoise the hole alone.

A ViT encoder reads the image and the mask. A DiT decoder is given the tokens of the hole and what the encoder made of their places, and
nothing else: its cost follows the size of the hole, not of the image.

Shapes: n tokens an image, k of them to be generated, at places (numbers of tokens) `b k`; p values a token.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormSingle
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Decoder",
    "Example",
    "Inpainter",
    "PixelSpace",
    "VaeSpace",
    "add_tokens",
    "hole_places",
    "prepare",
    "smooth_fill",
    "take",
    "to_tokens",
]


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """Return tokens `b n c` at some places `b k`: `b k c`."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def hole_places(mask: Tensor, patch: int, count: int) -> Tensor:
    """Return the numbers of the tokens to generate, `b k`, rising.

    All images of a batch have equally many: an image with a smaller hole also generates the visible tokens nearest to it.

    Args:
        mask: `b 1 h w`, 1 in the hole.
        patch: Height and width of a token.
        count: k; no hole may touch more tokens.
    """
    touched = functional.max_pool2d(mask, patch)
    rows, columns = touched.shape[2:]
    centres = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns))).to(mask.device)
    distances = torch.cdist(centres, centres).expand(len(mask), -1, -1)
    to_hole = distances.masked_fill(touched.flatten(1)[:, None] == 0, float("inf")).amin(-1)
    return to_hole.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def to_tokens(image: Tensor, patch: int) -> Tensor:
    """Cut an image `b c h w` into tokens `b n p`."""
    return rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def add_tokens(image: Tensor, tokens: Tensor, places: Tensor, patch: int) -> Tensor:
    """Return an image `b c h w` with tokens `b k p` added in their places."""
    everything = to_tokens(image, patch).scatter_add(1, places[..., None].expand_as(tokens), tokens)
    return rearrange(everything, "b (h w) (c p q) -> b c (h p) (w q)", h=image.shape[2] // patch, p=patch, q=patch)


def smooth_fill(image: Tensor, mask: Tensor) -> Tensor:
    """Fill holes with what lies around them, blurred the more the farther away it is (pull-push, Gortler et al. 1996).

    Args:
        image: `b c h w`; what is in the hole has no say.
        mask: `b 1 h w`, 1 in the hole.
    """
    known = 1 - mask
    if min(image.shape[2:]) == 1:
        return image
    half = [(extent + 1) // 2 for extent in image.shape[2:]]
    weight = functional.adaptive_avg_pool2d(known, half)
    coarse = functional.adaptive_avg_pool2d(image * known, half) / weight.clamp_min(1e-6)
    around = functional.interpolate(smooth_fill(coarse, (weight == 0).to(mask)), size=image.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(mask > 0, around, image)


class PixelSpace:
    """Images are denoised as they are.

    Attributes:
        channels: Of what is denoised.
        factor: Pixels to one of its places, down and across.
        detail: Its spread around a smooth fill, so that what is denoised has a spread of about 1.
    """

    channels, factor, detail = 3, 1, 0.125

    def encode(self, images: Tensor) -> Tensor:
        """Return images `b 3 h w` in [-1, 1] as what is denoised."""
        return images

    decode = encode


class VaeSpace:
    """Images are denoised as the latents of an autoencoder of diffusers.

    Args:
        vae: The autoencoder; it is frozen.
    """

    detail = 0.5

    def __init__(self, vae: Any) -> None:
        self._vae = vae.eval().requires_grad_(False)
        self.channels, self.factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
        self._shift, self._scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return images `b 3 h w` in [-1, 1] as latents `b c h/f w/f`."""
        return (self._vae.encode(images).latent_dist.mode() - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents."""
        return self._vae.decode(latents / self._scale + self._shift).sample


class Example(NamedTuple):
    """A batch as the model takes it.

    Attributes:
        seen: Images with holes smoothly filled, and the masks as their last channel, `b c+1 h w`.
        clean: The tokens to generate, `b k p`: the images less what the holes were filled with, in units of the space's `detail`.
        places: Their numbers in the image, `b k`.
    """

    seen: Tensor
    clean: Tensor
    places: Tensor


def prepare(batch: Mapping[str, Tensor], space: PixelSpace | VaeSpace, patch: int) -> Example:
    """Make an example of images, masks and sizes of holes."""
    mask = functional.max_pool2d(batch["mask"], space.factor)
    filled = smooth_fill(space.encode(smooth_fill(batch["image"], batch["mask"])), mask)
    places = hole_places(mask, patch, int(batch["hole"][0]))
    clean = take(to_tokens((space.encode(batch["image"]) - filled) / space.detail, patch), places)
    return Example(torch.cat([filled, mask], dim=1), clean, places)


def _positions(side: int, width: int) -> Tensor:
    """Return sines and cosines of the places in a square grid, `n c`; the temperature is low, since grids are small."""
    return build_sincos2d_pos_embed([side, side], width, temperature=100.0)


class Decoder(nn.Module):
    """A DiT over the tokens of the hole, with PixArt's blocks: one modulation by the timestep for all of them (arXiv 2310.00426).

    Args:
        values: Values of a token that comes in and goes out, p.
        context: Channels of the encoder's tokens.
        side: Tokens of an image, down and across.
        width: Channels of a token inside.
        depth: Number of blocks.
        heads: Attention heads of a block.
    """

    def __init__(self, *, values: int, context: int, side: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(values + context, width)
        self.positions: Tensor
        self.register_buffer("positions", _positions(side, width), persistent=False)
        self.time = AdaLayerNormSingle(width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width, heads, width // heads, activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_single",
                norm_elementwise_affine=False, norm_eps=1e-6,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Parameter(torch.zeros(2, width))
        self.out = nn.Linear(width, values)
        nn.init.zeros_(self.out.weight)

    def forward(self, tokens: Tensor, context: Tensor, places: Tensor, timestep: Tensor) -> Tensor:
        """Predict what was mixed into the hole.

        Args:
            tokens: Noisy tokens of the hole, `b k p`.
            context: The encoder's tokens at the same places, `b k c`.
            places: Their numbers in the image, `b k`.
            timestep: `b`.

        Returns:
            The prediction, `b k p`.
        """
        hidden = self.embed(torch.cat([tokens, context], dim=-1)) + self.positions[places]
        modulation, embedded = self.time(timestep, hidden_dtype=hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, timestep=modulation)
        shift, scale = (self.modulation[None] + embedded[:, None]).chunk(2, dim=1)
        return self.out(self.norm(hidden) * (1 + scale) + shift)


class Inpainter(nn.Module):
    """Encoder and decoder.

    Args:
        channels: Of an image, or of its latents.
        size: Height and width of an image, or of its latents.
        patch: Height and width of a token.
        width: Channels of a token, in both.
        encoder_depth: Number of the encoder's blocks.
        decoder_depth: Number of the decoder's blocks.
        heads: Attention heads of a block.
    """

    def __init__(self, *, channels: int, size: int, patch: int, width: int, encoder_depth: int, decoder_depth: int, heads: int) -> None:
        super().__init__()
        self.encoder = VisionTransformer(
            img_size=size, patch_size=patch, in_chans=channels + 1, num_classes=0, global_pool="", class_token=False,
            embed_dim=width, depth=encoder_depth, num_heads=heads, weight_init="jax",
        )  # fmt: skip
        self.encoder.pos_embed.data.copy_(_positions(size // patch, width))  # timm's own start tells next to nothing of where a token is
        values = channels * patch**2
        self.decoder = Decoder(values=values, context=width, side=size // patch, width=width, depth=decoder_depth, heads=heads)

    def encode(self, seen: Tensor, places: Tensor) -> Tensor:
        """Return what the decoder has to know of an image, `b k c`; once an image, however many steps its hole takes.

        Args:
            seen: As in an example.
            places: As in an example.
        """
        return take(self.encoder(seen), places)

    def forward(self, seen: Tensor, tokens: Tensor, places: Tensor, timestep: Tensor) -> Tensor:
        """Predict for a batch, `b k p`; arguments as those of `encode` and the decoder."""
        return self.decoder(tokens, self.encode(seen, places), places, timestep)
