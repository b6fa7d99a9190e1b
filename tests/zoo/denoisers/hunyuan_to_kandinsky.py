"""The denoisers from HunyuanImage to Kandinsky 6."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import entry, grid, text_mask


@entry(
    "HunyuanImageTransformer2DModel",
    dict(
        in_channels=6,
        out_channels=6,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=3.0,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=28,
        text_embed_2_dim=22,
        rope_axes_dim=(4, 4),
        use_meanflow=True,
    ),
)
def hunyuan_image(batch: int, rows: int) -> dict[str, Any]:
    """The distilled model, which takes a guidance and a second, lower timestep; the layers for the second text are 2048 wide."""
    timestep = 1000 * torch.rand(batch)
    return {
        "hidden_states": torch.randn(batch, 6, rows, 5),
        "timestep": timestep,
        "timestep_r": timestep / 2,
        "guidance": torch.full((batch,), 3250.0),
        "encoder_hidden_states": torch.randn(batch, 6, 28),
        "encoder_attention_mask": text_mask(batch, 6).long(),
        "encoder_hidden_states_2": torch.randn(batch, 5, 22),
        "encoder_attention_mask_2": text_mask(batch, 5).long(),
    }


@entry(
    "HunyuanVideo15Transformer3DModel",
    dict(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=2,
        mlp_ratio=3.0,
        text_embed_dim=28,
        text_embed_2_dim=22,
        image_embed_dim=20,
        rope_axes_dim=(4, 2, 2),
    ),
)
def hunyuan_video15(batch: int, rows: int) -> dict[str, Any]:
    """Image to video; the layers for the second text are 2048 wide whatever the config says."""
    return {
        "hidden_states": torch.randn(batch, 9, 2, rows, 3),
        "image_embeds": torch.randn(batch, 3, 20),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "encoder_attention_mask": text_mask(batch, 7).long(),
        "encoder_hidden_states_2": torch.randn(batch, 5, 22),
        "encoder_attention_mask_2": text_mask(batch, 5).long(),
    }


@entry(
    "HunyuanVideoFramepackTransformer3DModel",
    dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=3.0,
        text_embed_dim=28,
        pooled_projection_dim=22,
        rope_axes_dim=(4, 2, 2),
        has_image_proj=True,
        image_proj_dim=20,
        has_clean_x_embedder=True,
    ),
    shared=("indices_latents",),
)
def framepack(batch: int, rows: int) -> dict[str, Any]:
    """Frames in order of time: the first image, three to denoise, then the history, which lies in the future."""
    first, chunk, near, mid, far = torch.arange(11).split([1, 3, 1, 2, 4])
    return {
        "hidden_states": torch.randn(batch, 4, 3, rows, 6),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "encoder_attention_mask": text_mask(batch, 7).long(),
        "pooled_projections": torch.randn(batch, 22),
        "image_embeds": torch.randn(batch, 3, 20),
        "indices_latents": chunk,
        "guidance": torch.full((batch,), 9000.0),
        "latents_clean": torch.randn(batch, 4, 2, rows, 6),
        "indices_latents_clean": torch.cat([first, near]),
        "latents_history_2x": torch.randn(batch, 4, 2, rows, 6),
        "indices_latents_history_2x": mid,
        "latents_history_4x": torch.randn(batch, 4, 4, rows, 6),
        "indices_latents_history_4x": far,
    }


@entry(
    "HunyuanVideoTransformer3DModel",
    dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=3.0,
        text_embed_dim=28,
        pooled_projection_dim=22,
        rope_axes_dim=(4, 2, 2),
    ),
)
def hunyuan_video(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 3, rows, 6),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "encoder_attention_mask": text_mask(batch, 7).long(),
        "pooled_projections": torch.randn(batch, 22),
        "guidance": torch.full((batch,), 6000.0),
    }


@entry(
    "Ideogram4Transformer2DModel",
    dict(
        in_channels=10,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=12,
        intermediate_size=80,
        adaln_dim=20,
        llm_features_dim=30,
        mrope_section=(2, 2, 2),
    ),
    timestep_range=(0.0, 1.0),
)
def ideogram4(batch: int, rows: int) -> dict[str, Any]:
    """One sequence of padding, text and image; padding is segment -1 and comes first."""
    text, image = 7, 5 * rows
    real = text_mask(batch, text).long().flip(1)
    count = (real.cumsum(1) - 1).clamp(min=0)
    cells = grid(1, rows, 5) + 65536
    return {
        "hidden_states": torch.cat([torch.zeros(batch, text, 10), torch.randn(batch, image, 10)], dim=1),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.cat([torch.randn(batch, text, 30) * real[..., None], torch.zeros(batch, image, 30)], dim=1),
        "position_ids": torch.cat([count[..., None].expand(-1, -1, 3), cells.expand(batch, -1, -1)], dim=1),
        "segment_ids": torch.cat([2 * real - 1, torch.ones(batch, image, dtype=torch.long)], dim=1),
        "indicator": torch.cat([3 * real, torch.full((batch, image), 2)], dim=1),
    }


@entry(
    "JoyImageEditPlusTransformer3DModel",
    dict(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=4,
        text_dim=28,
        mlp_width_ratio=3.0,
        num_layers=2,
        rope_dim_list=[4, 2, 2],
    ),
)
def joyimage_edit_plus(batch: int, rows: int) -> dict[str, Any]:
    """Patches of the target, then of one reference image; the first sample has the smaller one, and zeros at its end."""
    shapes = [[(1, rows, 4), (1, 2 + (i > 0), 3)] for i in range(batch)]
    lengths = torch.tensor([sum(t * h * w for t, h, w in shape) for shape in shapes])
    patches = torch.randn(batch, 4 * rows + 9, 4, 1, 2, 2)
    patches[torch.arange(4 * rows + 9) >= lengths[:, None]] = 0
    return {
        "hidden_states": patches,
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 5, 28),
        "encoder_hidden_states_mask": text_mask(batch, 5).long(),
        "shape_list": shapes,
    }


@entry(
    "JoyImageEditTransformer3DModel",
    dict(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=4,
        text_dim=28,
        mlp_width_ratio=3.0,
        num_layers=2,
        rope_dim_list=[4, 2, 2],
    ),
)
def joyimage_edit(batch: int, rows: int) -> dict[str, Any]:
    """Two images a sample: the reference, then the one to denoise."""
    return {
        "hidden_states": torch.randn(batch, 2, 4, 1, 2 * rows, 6),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
    }


@entry(
    "Kandinsky5Transformer3DModel",
    dict(
        in_visual_dim=4,
        in_text_dim=28,
        in_text_dim2=22,
        time_dim=24,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=72,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        visual_cond=True,
    ),
    shared=("visual_rope_pos",),
    rounds=True,
)
def kandinsky5(batch: int, rows: int) -> dict[str, Any]:
    latents = torch.randn(batch, 3, rows, 6, 4)
    return {
        "hidden_states": torch.cat([latents, torch.zeros(batch, 3, rows, 6, 5)], dim=-1),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "pooled_projections": torch.randn(batch, 22),
        "timestep": 1000 * torch.rand(batch),
        "visual_rope_pos": [torch.arange(3), torch.arange(rows // 2), torch.arange(3)],
        "text_rope_pos": torch.arange(7),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
    }


@entry(
    "Kandinsky6Transformer3DModel",
    dict(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=28,
        in_text_dim2=22,
        time_dim=24,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=72,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        in_audio_dim=5,
        out_audio_dim=5,
        model_dim_a=40,
        time_dim_a=20,
        ff_dim_a=64,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    ),
    shared=("visual_rope_pos",),
)
def kandinsky6(batch: int, rows: int) -> dict[str, Any]:
    """Video with sound from an image, which is one more frame at the end, in the place of the first."""
    mark = torch.zeros(batch, 3, rows, 6, 1)
    mark[:, -1] = 1
    kind = torch.zeros(batch, 3, dtype=torch.long)
    kind[:, -1] = 1
    return {
        "hidden_states": torch.cat([torch.randn(batch, 3, rows, 6, 4), torch.zeros(batch, 3, rows, 6, 4), mark], dim=-1),
        "audio_hidden_states": torch.randn(batch, 11, 5),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "pooled_projections": torch.randn(batch, 22),
        "timestep": 1000 * torch.rand(batch),
        "visual_rope_pos": (torch.tensor([0, 1, 0]), torch.arange(rows // 2), torch.arange(3)),
        "encoder_attention_mask": text_mask(batch, 7),
        "visual_token_type_ids": kind,
    }
