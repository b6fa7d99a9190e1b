"""DreamLite, and the denoisers from Allegro to Ernie-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import Tensor

from tests.zoo.entry import entry, grid


def padded(batch: int, length: int) -> Tensor:
    """Boolean text mask: the first prompt fills it, every further one is a token shorter, down to four."""
    lengths = torch.tensor([max(length - i, 4) for i in range(batch)])
    return torch.arange(length) < lengths[:, None]


@entry(
    "AllegroTransformer3DModel",
    dict(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=6,
        sample_frames=3,
        caption_channels=20,
    ),
    shared=("image_rotary_emb",),
)
def allegro(batch: int, rows: int) -> dict[str, Any]:
    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (rows, 3)), (rows, 3), 3, (2.2, 2.0, 2.0))
    cells = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 2 * rows, 6),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "encoder_attention_mask": padded(batch, 7).long(),
        "timestep": torch.randint(0, 1000, (batch,)),
        "image_rotary_emb": (tuple(freqs), tuple(cells)),
    }


@entry(
    "AnyFlowFARTransformer3DModel",
    dict(
        full_chunk_limit=2,
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=5,
        out_channels=5,
        text_dim=20,
        freq_dim=16,
        ffn_dim=72,
        num_layers=2,
        rope_max_seq_len=32,
        chunk_partition=(1, 2, 2),
    ),
    batches=(1,),  # rotary tables shared by the batch, and a cache whose batch is its second axis: samples cannot run one by one
    flex=True,
    warns=("flex_attention called without torch.compile",),
)
def anyflow_far(batch: int, rows: int) -> dict[str, Any]:
    """The pipeline's step for the third chunk: the first sits compressed in the cache, the second in full."""
    full, compressed = rows * 4, rows // 2 * 2
    timestep = 1000 * torch.rand(batch, 1)
    return {
        "hidden_states": torch.randn(batch, 2, 5, 2 * rows, 8),
        "timestep": timestep.repeat(1, 2),
        "r_timestep": (timestep * torch.rand(batch, 1)).repeat(1, 2),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "chunk_partition": [1, 2, 2],
        "kv_cache": [
            {
                "full_cache": torch.randn(2, batch, 4, 2 * 2 * full, 12),
                "compressed_cache": torch.randn(2, batch, 4, 2 * 2 * compressed, 12),
            }
            for _ in range(2)
        ],
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


@entry(
    "AnyFlowTransformer3DModel",
    dict(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=5,
        out_channels=5,
        text_dim=20,
        freq_dim=16,
        ffn_dim=72,
        num_layers=2,
        rope_max_seq_len=32,
    ),
)
def anyflow(batch: int, rows: int) -> dict[str, Any]:
    timestep = 1000 * torch.rand(batch, 1)
    return {
        "hidden_states": torch.randn(batch, 3, 5, 2 * rows, 6),
        "timestep": timestep.repeat(1, 3),
        "r_timestep": (timestep * torch.rand(batch, 1)).repeat(1, 3),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
    }


@entry(
    "BriaFibo2Transformer2DModel",
    dict(
        in_channels=5,
        dim=32,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=4,
        cap_feat_dim=20,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=2,
        min_num_gist_tokens=3,
        max_num_gist_tokens=9,
        gist_step=3,
        gist_min_text_len=2,
        gist_max_text_len=20,
        axes_dims=(4, 2, 2),
        axes_lens=(16, 16, 16),
    ),
    timestep_range=(0.0, 1.0),
)
def bria_fibo2(batch: int, rows: int) -> dict[str, Any]:
    """Every prompt gets 6 gist tokens, whatever its length: they stand before the image."""
    return {
        "hidden_states": torch.randn(batch, 5, 2 * rows, 10),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 3, 7, 20),
        "encoder_attention_mask": padded(batch, 7),
    }


@entry(
    "BriaFiboTransformer2DModel",
    dict(
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=28,
        axes_dims_rope=[4, 2, 2],
        text_encoder_dim=14,
    ),
)
def bria_fibo(batch: int, rows: int) -> dict[str, Any]:
    mask = torch.cat([padded(batch, 7), torch.ones(batch, 5 * rows, dtype=torch.bool)], dim=1)
    return {
        "hidden_states": torch.randn(batch, 5 * rows, 12),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "text_encoder_layers": [torch.randn(batch, 7, 14) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
        "txt_ids": torch.zeros(7, 3),
        "img_ids": grid(1, rows, 5).float(),
    }


@entry(
    "BriaTransformer2DModel",
    dict(
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=28,
        axes_dims_rope=[4, 2, 2],
    ),
)
def bria(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 5 * rows, 12),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28) * padded(batch, 7)[..., None],
        "txt_ids": torch.zeros(7, 3),
        "img_ids": grid(1, rows, 5).float(),
    }


@entry(
    "ChromaTransformer2DModel",
    dict(
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=28,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    ),
    timestep_range=(0.0, 1.0),
)
def chroma(batch: int, rows: int) -> dict[str, Any]:
    """The pipeline's mask is one of floats, which attention adds to its scores."""
    return {
        "hidden_states": torch.randn(batch, 5 * rows, 12),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 28),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": grid(1, rows, 5).float(),
        "attention_mask": torch.cat([padded(batch, 7), torch.ones(batch, 5 * rows)], dim=1),
        "joint_attention_kwargs": {},
    }


@entry(
    "ChronoEditTransformer3DModel",
    dict(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=9,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=72,
        num_layers=2,
        image_dim=14,
        added_kv_proj_dim=48,
        rope_max_seq_len=32,
        rope_temporal_skip_len=8,
    ),
)
def chronoedit(batch: int, rows: int) -> dict[str, Any]:
    """With image tokens, cross-attention takes the last 512 context tokens for text, however many there are."""
    return {
        "hidden_states": torch.randn(batch, 9, 2, 2 * rows, 10),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 512, 20),
        "encoder_hidden_states_image": torch.randn(batch, 6, 14),
    }


def cogview_sizes(batch: int, rows: int) -> dict[str, Tensor]:
    height = 16.0 * rows
    return {
        "original_size": torch.tensor([[height, 80.0]]).repeat(batch, 1),
        "target_size": torch.tensor([[height, 80.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


COGVIEW = dict(
    in_channels=3,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    out_channels=3,
    text_embed_dim=20,
    time_embed_dim=28,
    condition_dim=6,
    pos_embed_max_size=16,
    sample_size=16,
)


@entry("CogView3PlusTransformer2DModel", COGVIEW)
def cogview3(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 3, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "timestep": torch.randint(0, 1000, (batch,)),
        **cogview_sizes(batch, rows),
    }


@entry("CogView4Transformer2DModel", COGVIEW | dict(rope_axes_dim=(16, 16)))
def cogview4(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 3, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "timestep": 1000 * torch.rand(batch),
        **cogview_sizes(batch, rows),
    }


@entry(
    "Cosmos3OmniTransformer",
    dict(
        head_dim=12,
        hidden_size=32,
        intermediate_size=56,
        latent_channel=5,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=20,
        rope_axes_dim=(2, 2, 2),
        vocab_size=40,
    ),
    batches=(1,),
    timestep="vision_timesteps",
)
def cosmos3(batch: int, rows: int) -> dict[str, Any]:
    """One packed sample, text first; every noisy token has a timestep, those of the first frame (the condition) none."""
    text, shape = 7, (3, rows, 3)
    video, frame = 9 * rows, 3 * rows
    ids = grid(*shape).T + torch.tensor([[text + 15000], [0], [0]])
    return {
        "input_ids": torch.randint(0, 40, (text,)),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, -1), ids], dim=1).float(),
        "und_len": text,
        "sequence_length": text + video,
        "vision_tokens": [torch.randn(1, 5, 3, 2 * rows, 6)],
        "vision_token_shapes": [shape],
        "vision_sequence_indexes": torch.arange(text, text + video),
        "vision_mse_loss_indexes": torch.arange(text + frame, text + video),
        "vision_timesteps": (1000 * torch.rand(1)).repeat(2 * frame),
        "vision_noisy_frame_indexes": [torch.tensor([1, 2])],
    }


@entry(
    "CosmosTransformer3DModel",
    dict(
        in_channels=5,
        out_channels=5,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=10,
        max_size=(8, 16, 16),
    ),
    timestep_range=(-1.5, 1.1),
)
def cosmos(batch: int, rows: int) -> dict[str, Any]:
    """A timestep is a quarter of the logarithm of a noise level between 0.002 and 80."""
    return {
        "hidden_states": torch.randn(batch, 5, 3, 2 * rows, 6),
        "timestep": 2.6 * torch.rand(batch) - 1.5,
        "encoder_hidden_states": torch.randn(batch, 7, 20) * padded(batch, 7)[..., None],
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 16 * rows, 48),
    }


@entry(
    "DreamLiteTransformer2DModel",
    dict(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=20,
        use_linear_projection=True,
        qk_norm="rms_norm",
        ff_mult=3,
    ),
    timestep=None,
)
def dreamlite(batch: int, rows: int) -> dict[str, Any]:
    """A stage of a U-Net: it maps features to features and does not see the timestep.

    `num_kv_heads` needs an attention processor which only the U-Net sets.
    """
    return {
        "hidden_states": torch.randn(batch, 32, rows, 5),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "encoder_attention_mask": padded(batch, 7),
    }


@entry(
    "EasyAnimateTransformer3DModel",
    dict(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=5,
        out_channels=5,
        patch_size=2,
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=14,
        add_norm_text_encoder=True,
        text_embed_dim=20,
    ),
)
def easyanimate(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 5, 3, 2 * rows, 6),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
    }


@entry(
    "ErnieImageTransformer2DModel",
    dict(
        hidden_size=32,
        num_attention_heads=4,
        num_layers=2,
        ffn_hidden_size=56,
        in_channels=6,
        out_channels=6,
        text_in_dim=20,
        rope_axes_dim=(4, 2, 2),
    ),
)
def ernie(batch: int, rows: int) -> dict[str, Any]:
    mask = padded(batch, 7)
    return {
        "hidden_states": torch.randn(batch, 6, rows, 5),
        "timestep": 1000 * torch.rand(batch),
        "text_bth": torch.randn(batch, 7, 20) * mask[..., None],
        "text_lens": mask.sum(dim=1),
    }
