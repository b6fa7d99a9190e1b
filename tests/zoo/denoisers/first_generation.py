"""AceStep, AuraFlow, the first video models, DiT, PixArt and their like, Sana, Stable Audio and the denoisers from before them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
    get_3d_rotary_pos_embed,
)
from torch import Tensor

from tests.zoo.entry import entry


def _keep(batch: int, length: int) -> Tensor:
    """Attention mask of a tokenizer: 1 = text, 0 = padding, of which every sample has a different amount."""
    return (torch.arange(length) < length - 1 - torch.arange(batch)[:, None]).long()


def _steps(batch: int) -> Tensor:
    return torch.randint(0, 1000, (batch,))


@entry(
    "AceStepTransformer1DModel",
    dict(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=4,  # a band mask in the first and third, none in the others
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        patch_size=2,
        sliding_window=6,
        encoder_hidden_size=28,
    ),
    timestep_range=(0.0, 1.0),
)
def ace_step(batch: int, rows: int) -> dict[str, Any]:
    timestep = torch.rand(batch)
    return {
        "hidden_states": torch.randn(batch, 10 * rows, 8),
        "timestep": timestep,
        "timestep_r": timestep,
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "context_latents": torch.randn(batch, 10 * rows, 16),
    }


@entry(
    "AuraFlowTransformer2DModel",
    dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=28,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ),
    timestep_range=(0.0, 1.0),
)
def aura_flow(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 5, 28),
        "timestep": torch.rand(batch),
    }


@entry(
    "CogVideoXTransformer3DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=28,
        num_layers=2,
        sample_width=4,
        sample_height=8,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    ),
)
def cogvideox(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 5, 4, 2 * rows, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "timestep": _steps(batch),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (rows, 2)), (rows, 2), 5),
    }


@entry(
    "ConsisIDTransformer3DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=28,
        num_layers=4,  # the face is attended to after the first and the third
        sample_width=4,
        sample_height=8,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=20,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=9,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    ),
)
def consisid(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 5, 8, 2 * rows, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "timestep": _steps(batch),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (rows, 2)), (rows, 2), 5),
        "id_vit_hidden": [torch.randn(batch, 11, 16) for _ in range(2)],
        "id_cond": torch.randn(batch, 20),
    }


@entry(
    "DiTTransformer2DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ),
)
def dit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 2 * rows),  # square: the height is the root of the token count
        "timestep": _steps(batch),
        "class_labels": torch.randint(0, 11, (batch,)),
    }


@entry(
    "HunyuanDiT2DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=24,
        num_layers=6,  # two down, two in the middle, two up with a skip connection
        cross_attention_dim=28,
        cross_attention_dim_t5=16,
        pooled_projection_dim=14,
        text_len=7,
        text_len_t5=5,
    ),
)
def hunyuan_dit(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "timestep": _steps(batch).float(),  # the embedding takes the timestep's dtype
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "text_embedding_mask": _keep(batch, 7),
        "encoder_hidden_states_t5": torch.randn(batch, 5, 16),
        "text_embedding_mask_t5": _keep(batch, 5),
        "image_meta_size": torch.tensor([16.0 * rows, 80.0, 16.0 * rows, 80.0, 0.0, 0.0]).repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (rows, 5)), (rows, 5)),
    }


@entry(
    "LatteTransformer3DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=28,
        video_length=5,
    ),
)
def latte(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 5, 2 * rows, 6),
        "timestep": _steps(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "enable_temporal_attentions": True,
    }


@entry(
    "LuminaNextDiT2DModel",
    dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=28,
    ),
    timestep_range=(0.0, 1.0),
)
def lumina_next(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "encoder_mask": _keep(batch, 7),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 12, 12),  # cut to the latent's size by the model
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }


@entry(
    "PixArtTransformer2DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=8,
        use_additional_conditions=True,
        caption_channels=28,
    ),
)
def pixart(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "timestep": _steps(batch),
        "added_cond_kwargs": {
            "resolution": torch.tensor([16.0 * rows, 80.0]).repeat(batch, 1),
            "aspect_ratio": torch.full((batch, 1), rows / 5),
        },
        "encoder_attention_mask": _keep(batch, 7),
    }


@entry(
    "PriorTransformer",
    dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=20, num_embeddings=10, additional_embeddings=4),
    rows=(4,),  # one noisy token behind the text; positions and causal mask have a fixed length
)
def prior(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 20),
        "timestep": _steps(batch),
        "proj_embedding": torch.randn(batch, 20),
        "encoder_hidden_states": torch.randn(batch, 10, 20),
        "attention_mask": _keep(batch, 10).bool(),
    }


@entry(
    "SanaTransformer2DModel",
    dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=28,
        sample_size=8,
    ),
)
def sana(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, rows, 5),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "timestep": _steps(batch),
        "encoder_attention_mask": _keep(batch, 7),
    }


@entry(
    "StableAudioDiTModel",
    dict(
        sample_size=32,
        in_channels=6,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=6,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=56,
        cross_attention_input_dim=28,
    ),
    timestep_range=(0.0, 1.0),
)
def stable_audio(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 6, 5 * rows),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "global_hidden_states": torch.randn(batch, 1, 56),
        "rotary_embedding": get_1d_rotary_pos_embed(4, 5 * rows + 1, use_real=True, repeat_interleave_real=False),
    }


@entry(
    "T5FilmDecoder",
    dict(input_dims=10, targets_length=32, max_decoder_noise_time=2000.0, d_model=28, num_layers=2, num_heads=4, d_kv=8, d_ff=48),
    timestep="decoder_noise_time",
    timestep_range=(0.0, 1.0),
)
def t5_film(batch: int, rows: int) -> dict[str, Any]:
    return {
        "encodings_and_masks": [
            (torch.randn(batch, 7, 28), _keep(batch, 7).bool()),
            (torch.randn(batch, 6, 28), torch.ones(batch, 6, dtype=torch.bool)),
        ],
        "decoder_input_tokens": torch.randn(batch, 5 * rows, 10),
        "decoder_noise_time": torch.rand(batch),
    }


@entry(
    "Transformer2DModel",  # as the first PixArt checkpoints name it; inside a UNet it denoises nothing by itself
    dict(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=28,
    ),
)
def transformer_2d(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "timestep": _steps(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": _keep(batch, 7),
    }
