"""The denoisers that are measured: classes of diffusers at the sizes of the published models, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "build"]

# What is built and made inside `torch.device(...)` and with a default dtype set, so that nothing here names either.


@dataclass(frozen=True)
class Family:
    """A published model.

    Attributes:
        layers: Its number of layers; for FLUX of double blocks, with twice as many single ones.
        build: (layers, tokens along a side of the image, whether shortened) -> a model.
        inputs: (batch, tokens along a side) -> arguments of a call, as the model's pipeline passes them.
    """

    layers: int
    build: Callable[[int, int, bool], Any]  # an nn.Module, which mypy does not see in classes of diffusers
    inputs: Callable[[int, int], dict[str, Any]]


def build(name: str, side: int, layers: int | None, batch: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model right on its device and in its dtype: the largest would not fit a second time.

    Args:
        name: Of the family.
        side: Tokens along a side of the image.
        layers: Number of layers; `None` for the family's own. For FLUX this many double and this many single blocks.
        batch: Samples of the call.
        device: `"cpu"` or `"cuda"`.
        dtype: Of weights and inputs; tables of positions are float32 whatever it is.

    Returns:
        The model in `eval()`, and the arguments of a call.
    """
    family = FAMILIES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = family.build(layers or family.layers, side, layers is not None)
            inputs = family.inputs(batch, side)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False), inputs


def _dit(layers: int, side: int, shortened: bool) -> Any:
    return DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, sample_size=2 * side, patch_size=2
    )


def _dit_inputs(batch: int, side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * side, 2 * side),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 1000,
    }


def _pixart(layers: int, side: int, shortened: bool) -> Any:
    return PixArtTransformer2DModel(
        num_layers=layers,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=1152,
        caption_channels=4096,
        sample_size=2 * side,
        patch_size=2,
        use_additional_conditions=False,  # which PixArt-Σ never has
    )


def _pixart_inputs(batch: int, side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * side, 2 * side),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 300, 4096),
        "encoder_attention_mask": torch.ones(batch, 300),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(layers: int, side: int, shortened: bool) -> Any:
    return SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=24,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=max(192, side),
        sample_size=2 * side,
        patch_size=2,
    )


def _sd3_inputs(batch: int, side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 2 * side, 2 * side),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 333, 4096),
        "pooled_projections": torch.randn(batch, 2048),
    }


def _flux(layers: int, side: int, shortened: bool) -> Any:
    return FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=layers if shortened else 2 * layers,
        num_attention_heads=24,
        attention_head_dim=128,
        in_channels=64,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )


def _flux_inputs(batch: int, side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, side * side, 64),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "encoder_hidden_states": torch.randn(batch, 512, 4096),
        "pooled_projections": torch.randn(batch, 768),
        "txt_ids": torch.zeros(512, 3),
        "img_ids": _places(side),
    }


def _places(side: int) -> Tensor:
    """Return the row and column of every image token, ``n 3`` with a leading 0."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(torch.get_default_dtype())


FAMILIES = {
    "dit-xl-2": Family(28, _dit, _dit_inputs),
    "pixart-sigma": Family(28, _pixart, _pixart_inputs),
    "sd3-medium": Family(24, _sd3, _sd3_inputs),
    "flux-dev": Family(19, _flux, _flux_inputs),
}
