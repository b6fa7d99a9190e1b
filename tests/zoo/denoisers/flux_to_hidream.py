"""The denoisers from Flux 2 to HiDream."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from tests.zoo.entry import entry, grid


@entry(
    "Flux2Transformer2DModel",
    dict(
        in_channels=10,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=12,
        joint_attention_dim=28,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 4, 4),
    ),
    timestep_range=(0.0, 1.0),
)
def flux2(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 5 * rows, 10),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 4.0),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "txt_ids": grid(1, 1, 1, 7).expand(batch, -1, -1),
        "img_ids": grid(1, rows, 5, 1).expand(batch, -1, -1),
    }


@entry(
    "Flux3Transformer2DModel",
    dict(
        in_channels=12,
        cond_in_channels=14,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=10,
        joint_attention_dim=28,
        timestep_channels=32,
        axes_dims_rope=(2, 2, 2, 4),
    ),
    timestep_range=(0.0, 1.0),
)
def flux3(batch: int, rows: int) -> dict[str, Any]:
    """Image to image: without a reference the `image_cond` blocks would idle."""
    reference = grid(1, 3, 3, 1) * 0.5
    reference[:, 3] = -1
    return {
        "hidden_states": torch.randn(batch, 5 * rows, 12),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "img_ids": grid(1, rows, 5, 1) * 0.5,
        "txt_ids": grid(1, 1, 1, 7).float(),
        "image_cond_hidden_states": torch.randn(batch, 9, 14),
        "image_cond_ids": reference,
    }


@entry(
    "FluxTransformer2DModel",
    dict(
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        joint_attention_dim=24,
        pooled_projection_dim=28,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ),
    timestep_range=(0.0, 1.0),
)
def flux(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 5 * rows, 12),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "pooled_projections": torch.randn(batch, 28),
        "encoder_hidden_states": torch.randn(batch, 6, 24),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": grid(1, rows, 5).float(),
    }


@entry(
    "GlmImageTransformer2DModel",
    dict(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        text_embed_dim=28,
        time_embed_dim=24,
        condition_dim=10,
        prior_vq_quantizer_codebook_size=50,
    ),
)
def glm_image(batch: int, rows: int) -> dict[str, Any]:
    """The pipeline passes a cache even where it has no image to keep in it; sizes have one row for the whole batch."""
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 6, 28),
        "prior_token_id": torch.randint(0, 50, (batch, 5 * rows)),
        "prior_token_drop": torch.zeros(batch, 5 * rows, dtype=torch.bool),
        "timestep": 1000 * torch.rand(batch),
        "target_size": torch.tensor([[16.0 * rows, 80.0]]),
        "crop_coords": torch.zeros(1, 2),
        "kv_caches": GlmImageKVCache(num_layers=2),
    }


@entry(
    "HeliosTransformer3DModel",
    dict(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=28,
        freq_dim=32,
        ffn_dim=72,
        num_layers=2,
        rope_dim=(4, 4, 4),
    ),
)
def helios(batch: int, rows: int) -> dict[str, Any]:
    """Frames in order of time: one prefix, four long, two middle, one short, then the three to denoise."""
    prefix, long, mid, short, chunk = torch.arange(11).split([1, 4, 2, 1, 3])
    return {
        "hidden_states": torch.randn(batch, 4, 3, rows, 6),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "indices_hidden_states": chunk[None],
        "indices_latents_history_short": torch.cat([prefix, short])[None],
        "indices_latents_history_mid": mid[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": torch.randn(batch, 4, 2, rows, 6),
        "latents_history_mid": torch.randn(batch, 4, 2, rows, 6),
        "latents_history_long": torch.randn(batch, 4, 4, rows, 6),
    }


@entry(
    "HiDreamImageTransformer2DModel",
    dict(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=6,
        caption_channels=[20, 28],
        text_emb_dim=22,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(2, 2, 2),
        max_resolution=(12, 12),
        llama_layers=[0, 2, 1, 2],
    ),
    timestep="timesteps",
)
def hidream(batch: int, rows: int) -> dict[str, Any]:
    """Square: any other shape is padded to `max_resolution`, whatever its size."""
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 2 * rows),
        "timesteps": 1000 * torch.rand(batch),
        "encoder_hidden_states_t5": torch.randn(batch, 5, 20),
        "encoder_hidden_states_llama3": torch.randn(3, batch, 5, 28),
        "pooled_embeds": torch.randn(batch, 22),
    }
