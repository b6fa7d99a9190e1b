"""Kandinsky 6 SR to PRX."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.entry import entry, grid, text_mask


@entry(
    "Kandinsky6SRTransformer3DModel",
    dict(
        in_visual_dim=3,
        out_visual_dim=6,
        time_dim=20,
        model_dim=24,
        ff_dim=40,
        num_visual_blocks=2,
        axes_dims=(2, 2, 2),
        nabla_window=(1, 1, 1),
        tile_sizes=((64, 64),),
    ),
    flex=True,
    warns=("flex_attention called without torch.compile",),
)
def kandinsky6_sr(batch: int, rows: int) -> dict[str, Any]:
    # Tokens lie in tiles of 8x8, so there are many of them.
    shape = (batch, rows // 2, 8, 16)
    latents = torch.randn(*shape, 3)
    return {
        "hidden_states": torch.cat([latents, torch.zeros_like(latents), torch.zeros(*shape, 1)], dim=-1),
        "timestep": 1000 * torch.rand(batch),
    }


@entry(
    "Krea2Transformer2DModel",
    dict(
        in_channels=12,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=16,
        text_hidden_dim=20,
        num_text_layers=5,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=36,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=(4, 2, 2),
    ),
    timestep_range=(0.0, 1.0),
)
def krea2(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, rows * 7, 12),
        "encoder_hidden_states": torch.randn(batch, 6, 5, 20),
        "timestep": torch.rand(batch),
        "position_ids": torch.cat([torch.zeros(6, 3), grid(1, rows, 7).float()]),
        "encoder_attention_mask": text_mask(batch, 6),
    }


@entry(
    "LongCatAudioDiTTransformer",
    dict(dit_dim=24, dit_depth=2, dit_heads=4, dit_text_dim=10, latent_dim=6, ff_mult=2.0),
    timestep_range=(0.0, 1.0),
)
def longcat_audio(batch: int, rows: int) -> dict[str, Any]:
    length = 4 * rows + 1
    return {
        "hidden_states": torch.randn(batch, length, 6),
        "encoder_hidden_states": torch.randn(batch, 7, 10),
        "encoder_attention_mask": text_mask(batch, 7),
        "timestep": torch.rand(batch),
        "attention_mask": torch.ones(batch, length, dtype=torch.bool),
        "latent_cond": torch.zeros(batch, length, 6),
    }


@entry(
    "LongCatImageTransformer2DModel",
    dict(
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=6,
        num_attention_heads=4,
        joint_attention_dim=14,
        pooled_projection_dim=14,
        axes_dims_rope=[2, 2, 2],
    ),
    timestep_range=(0.0, 1.0),
)
def longcat_image(batch: int, rows: int) -> dict[str, Any]:
    # The pipeline gives the image the modality 1 and lets it start where the text ends.
    text = torch.tensor([[0.0, i, i] for i in range(7)])
    return {
        "hidden_states": torch.randn(batch, rows * 5, 12),
        "timestep": torch.rand(batch),
        "guidance": None,
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "txt_ids": text,
        "img_ids": grid(1, rows, 5) + torch.tensor([1.0, 7.0, 7.0]),
    }


@entry(
    "LTX2VideoTransformer3DModel",
    dict(
        in_channels=6,
        out_channels=6,
        num_attention_heads=4,
        attention_head_dim=6,
        cross_attention_dim=24,
        audio_in_channels=5,
        audio_out_channels=5,
        audio_num_attention_heads=4,
        audio_attention_head_dim=5,
        audio_cross_attention_dim=20,
        num_layers=2,
        caption_channels=14,
    ),
)
def ltx2(batch: int, rows: int) -> dict[str, Any]:
    timestep = 1000 * torch.rand(batch)
    mask = text_mask(batch, 7)
    # First and last pixel of the tokens on each axis, and the seconds of the sound.
    video = torch.tensor([8 / 24, 32, 32])[:, None] * grid(2, rows, 5).T
    audio = torch.arange(9)[None] / 25
    return {
        "hidden_states": torch.randn(batch, 2 * rows * 5, 6),
        "audio_hidden_states": torch.randn(batch, 9, 5),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "audio_encoder_hidden_states": torch.randn(batch, 7, 14),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": rows,
        "width": 5,
        "fps": 24.0,
        "audio_num_frames": 9,
        "video_coords": torch.stack([video, video + torch.tensor([[8 / 24], [32], [32]])], dim=-1).expand(batch, -1, -1, -1),
        "audio_coords": torch.stack([audio, audio + 1 / 25], dim=-1).expand(batch, -1, -1, -1),
    }


@entry(
    "LTXVideoTransformer3DModel",
    dict(
        in_channels=6,
        out_channels=6,
        num_attention_heads=4,
        attention_head_dim=6,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=14,
    ),
)
def ltx(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 2 * rows * 5, 6),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "timestep": 1000 * torch.rand(batch),
        "encoder_attention_mask": text_mask(batch, 7),
        "num_frames": 2,
        "height": rows,
        "width": 5,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


@entry(
    "Lumina2Transformer2DModel",
    dict(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=4,
        axes_dim_rope=(2, 2, 2),
        axes_lens=(40, 12, 12),
        cap_feat_dim=14,
    ),
    timestep_range=(0.0, 1.0),
)
def lumina2(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "encoder_attention_mask": text_mask(batch, 7),
    }


@entry(
    "MiniMaxH3Transformer3DModel",
    dict(
        num_attention_heads=4,
        attention_head_dim=8,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=40,
        in_channels=3,
        audio_in_channels=5,
        text_dim=14,
        freq_dim=16,
        time_embed_hidden_dim=20,
        time_embed_dim=18,
        rope_freq_dim=1,
    ),
    timestep_range=(0.0, 1.0),
)
def minimax_h3(batch: int, rows: int) -> dict[str, Any]:
    # One sequence of text, reference image, reference sound, sound and video. All samples of a batch share its layout and its
    # noise levels: `timestep` has one value a level, not one a sample.
    frame = grid(1, rows // 2, 3)
    blocks = [
        (1, 0, grid(5, 1, 1)),
        (0, 1, frame + torch.tensor([6, 0, 0])),
        (2, 2, grid(2, 1, 1).repeat(2, 1) + torch.tensor([8, 0, 0])),
        (2, 3, grid(4, 1, 1).repeat(2, 1) + torch.tensor([11, 0, 0])),
        (0, 0, torch.cat([frame, frame + torch.tensor([2, 0, 0])]) + torch.tensor([11, 0, 0])),
    ]
    tags = torch.cat([torch.full((len(positions),), tag) for tag, _, positions in blocks])
    video, text, audio = ((tags == tag).nonzero()[:, 0] for tag in range(3))
    return {
        "hidden_states": torch.randn(batch, len(video), 12),
        "audio_hidden_states": torch.randn(batch, len(audio), 5),
        "encoder_hidden_states": torch.randn(batch, len(text), 14),
        "timestep": torch.rand(4),
        "timestep_indices": torch.cat([torch.full((len(positions),), level) for _, level, positions in blocks]),
        "token_tags": tags,
        "position_ids": torch.cat([positions for _, _, positions in blocks]).double(),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


@entry(
    "MiniMaxMusic3Transformer1DModel",
    dict(
        in_channels=6,
        condition_dim=10,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=6,
        ff_inner_dim=40,
        rotary_dim=4,
        fourier_embedding_dim=16,
    ),
    timestep_range=(0.0, 1.0),
)
def minimax_music3(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 6, 4 * rows + 1),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 4 * rows + 1, 10),
    }


@entry(
    "MochiTransformer3DModel",
    # The last block drops the text.
    dict(
        num_attention_heads=4,
        attention_head_dim=6,
        num_layers=3,
        pooled_projection_dim=20,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=32,
        max_sequence_length=7,
    ),
    warns=("In CPU autocast, but the target dtype is not supported",),  # diffusers asks for float32 there
)
def mochi(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": 1000 * torch.rand(batch),
        "encoder_attention_mask": text_mask(batch, 7),
    }


@entry(
    "MotifVideoTransformer3DModel",
    dict(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=6,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=14,
        image_embed_dim=10,
        rope_axes_dim=(2, 2, 2),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ),
)
def motif_video(batch: int, rows: int) -> dict[str, Any]:
    # Latents, latents of the first frame, and where they are given.
    shape = (2, 2 * rows, 10)
    first = torch.arange(2)[:, None, None].expand(shape) == 0
    condition = torch.randn(batch, 4, *shape) * first
    return {
        "hidden_states": torch.cat([torch.randn(batch, 4, *shape), condition, first.float().expand(batch, 1, *shape)], dim=1),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "encoder_attention_mask": text_mask(batch, 7),
        "image_embeds": torch.randn(batch, 3, 10),
    }


def NucleusMoEImageTransformer2DModel(**config: Any) -> nn.Module:
    """Build the class of diffusers, which leaves the weights of its experts uninitialised."""
    model = diffusers.NucleusMoEImageTransformer2DModel(**config)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@entry(
    "NucleusMoEImageTransformer2DModel",
    # The first three blocks and the last one are dense; a dense block cannot be narrower than 128 inside.
    dict(
        in_channels=12,
        out_channels=3,
        num_layers=6,
        attention_head_dim=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=14,
        axes_dims_rope=(2, 2, 2),
        mlp_ratio=8.0,
        num_experts=4,
        moe_intermediate_dim=20,
        capacity_factors=2.0,
    ),
    module=__name__,
    timestep_range=(0.0, 1.0),
)
def nucleus(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, rows * 5, 12),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "encoder_hidden_states_mask": text_mask(batch, 7),
        "img_shapes": [(1, rows, 5)] * batch,
    }


@entry(
    "OmniGenTransformer2DModel",
    dict(
        in_channels=3,
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=40,
        num_layers=2,
        pad_token_id=2,
        vocab_size=30,
        rope_scaling=dict(short_factor=[1.0, 1.1, 1.2], long_factor=[2.0, 2.1, 2.2]),
        pos_embed_max_size=12,
        time_step_dim=16,
    ),
    timestep_range=(0.0, 1.0),
)
def omnigen(batch: int, rows: int) -> dict[str, Any]:
    # Condition, time and image lie in one sequence; the condition is causal and padded on the left, and that of the first sample
    # has an image of four tokens inside.
    condition, image = 7, rows * 5
    length = condition + 1 + image
    pad = torch.arange(batch) % 3
    cells = torch.arange(length)
    ids = torch.randint(3, 30, (batch, condition)).where(cells[:condition] >= pad[:, None], 2)
    ids[0, 2:6] = 0
    mask = (cells <= cells[:, None]) | (cells[:, None] > condition)
    mask = (mask & (cells >= pad[:, None, None])) | (cells[:, None] < pad[:, None, None])
    mask[0, 2:6, 2:6] = True
    return {
        "hidden_states": torch.randn(batch, 3, 2 * rows, 10),
        "timestep": torch.rand(batch),
        "input_ids": ids,
        "input_img_latents": [torch.randn(1, 3, 4, 4)],
        "input_image_sizes": {0: [[2, 6]]},
        "attention_mask": mask.float(),
        "position_ids": (cells - pad[:, None]).clamp(min=0),
    }


@entry(
    "OvisImageTransformer2DModel",
    dict(
        in_channels=12,
        out_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=6,
        num_attention_heads=4,
        joint_attention_dim=14,
        axes_dims_rope=(2, 2, 2),
    ),
    timestep_range=(0.0, 1.0),
)
def ovis_image(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, rows * 5, 12),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "txt_ids": torch.tensor([[0.0, i, i] for i in range(7)]),
        "img_ids": grid(1, rows, 5).float(),
    }


@entry(
    "PRXTransformer2DModel",
    dict(in_channels=4, context_in_dim=14, hidden_size=24, mlp_ratio=1.5, num_heads=4, depth=2, axes_dim=[4, 2]),
    timestep_range=(0.0, 1.0),
)
def prx(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 14),
        "attention_mask": text_mask(batch, 7),
    }
