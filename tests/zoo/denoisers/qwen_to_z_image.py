from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from tests.zoo.entry import entry


def padding(batch: int, length: int) -> Tensor:
    """Text masks: the first sample is full, the others lose one or two tokens at the end."""
    return torch.arange(length) < torch.tensor([length - min(sample, 2) for sample in range(batch)])[:, None]


@entry(
    "QwenImage21Transformer2DModel",
    dict(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        context_in_dim=18,
        axes_dims_rope=(4, 2, 2),
    ),
    batches=(1,),  # see test_zoo.py on larger ones
    timestep_range=(0.0, 1.0),
)
def qwen_image_21(batch: int, rows: int) -> dict[str, Any]:
    tokens = rows * 6
    text = torch.zeros(batch, 7, dtype=torch.bool)
    slots = torch.ones(batch, tokens // 4, dtype=torch.bool)  # one for each square of four image tokens
    return {
        "hidden_states": torch.randn(batch, tokens, 4),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "encoder_hidden_states_mask": padding(batch, 7),
        "img_shapes": [[(1, rows, 6)]] * batch,
        "img_mask": torch.cat([text, slots], dim=1),
    }


@entry(
    "QwenImageTransformer2DModel",
    dict(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=18,
        axes_dims_rope=(4, 2, 2),
    ),
    timestep_range=(0.0, 1.0),
)
def qwen_image(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, rows * 5, 16),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "encoder_hidden_states_mask": padding(batch, 7),
        "img_shapes": [[(1, rows, 5)]] * batch,
    }


@entry(
    "RFD4ProteinaTransformer",
    dict(
        nlayers=4,
        token_dim=32,
        nheads=4,
        dim_cond=24,
        pair_repr_dim=12,
        latent_dim=6,
        token_type_emb_dim=8,
        cath_emb_dim=2,
        t_emb_dim=16,
        seq_sep_dim=9,
        xt_pair_dist_dim=10,
        tri_mult_c=10,
        num_sequence_classes=21,
    ),
    timestep="bb_ca_time",
    timestep_range=(0.0, 1.0),
)
def rfd4_proteina(batch: int, rows: int) -> dict[str, Any]:
    """A protein of 5 residues a row; no molecular annotations but those that its features ask for."""
    tokens = 5 * rows
    real = torch.arange(tokens) < torch.tensor([tokens - sample for sample in range(batch)])[:, None]
    atoms = real[..., None] & (torch.rand(batch, tokens, 37) < 0.3)
    names = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    residues = torch.arange(tokens).expand(batch, -1)
    return {
        "bb_ca": torch.randn(batch, tokens, 3),
        "local_latents": torch.randn(batch, tokens, 6),
        "bb_ca_time": torch.rand(batch),
        "local_latents_time": torch.rand(batch),
        "padding_mask": real,
        "token_type": torch.zeros(batch, tokens, dtype=torch.long),
        "atom37_mask": atoms,
        "conditioning": {
            **{f"condition_{name}_1_atom": torch.randint(0, 2, (batch, tokens, 37)) for name in names},
            "condition_secondary-structure_1_residue": torch.randint(0, 4, (batch, tokens)),
            "condition_index-group_1_token": torch.zeros(batch, tokens, dtype=torch.long),
            "molecule_iid": (residues >= tokens // 2).long(),
            "molecule_entity_id": torch.zeros(batch, tokens, dtype=torch.long),
            "token_bond_path_length": (residues[:, :, None] - residues[:, None, :]).abs(),
            "is_in_context_conditioning": residues < 2,
            "supports_local_latent": real,
        },
        "recycle_depth": 2,
    }


@entry(
    "SanaVideoTransformer3DModel",
    dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=18,
        mlp_ratio=2.0,
        sample_size=8,
        patch_size=(1, 2, 2),
        rope_max_seq_len=32,
    ),
)
def sana_video(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 2 * rows, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "encoder_attention_mask": padding(batch, 7).long(),
        "timestep": 1000 * torch.rand(batch),
    }


@entry(
    "SanaWMLTX2RefinerTransformer3DModel",
    dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        audio_in_channels=3,
        audio_out_channels=3,
        audio_num_attention_heads=4,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=16,
        num_layers=3,
        caption_channels=18,
        rope_type="split",
    ),
)
def sana_wm_refiner(batch: int, rows: int) -> dict[str, Any]:
    """The first block of frames: no keys kept from earlier ones. Its pipeline gives every token its time."""
    tokens = 2 * rows * 3
    angles = torch.arange(tokens)[:, None] * torch.linspace(0.1, 1, 6)
    return {
        "hidden_states": torch.randn(batch, tokens, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "timestep": 1000 * torch.rand(batch, 1).repeat(1, tokens),
        "video_rotary_emb": tuple(table.expand(batch, 4, tokens, 6).contiguous() for table in (angles.cos(), angles.sin())),
        "encoder_attention_mask": padding(batch, 7).flip(1).long(),
    }


@entry(
    "SanaWMTransformer3DModel",
    dict(
        in_channels=4,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        softmax_every_n=2,
        linear_head_dim=8,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=4,
        caption_channels=18,
        mlp_ratio=2.0,
    ),
)
def sana_wm(batch: int, rows: int) -> dict[str, Any]:
    """Every frame has its time, that of the first frame is zero: it is given."""
    timestep = (1000 * torch.rand(batch, 1, 1)).repeat(1, 1, 5)
    timestep[..., 0] = 0
    pose = torch.eye(4).repeat(batch, 5, 1, 1)
    pose[:, :, 2, 3] = 0.1 * torch.arange(5) * torch.rand(batch, 1)
    lens = torch.tensor([2.0, rows, 1.0, rows / 2]).expand(batch, 5, 4)
    return {
        "hidden_states": torch.randn(batch, 4, 5, rows, 2),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 1, 7, 18),
        "encoder_attention_mask": padding(batch, 7).long(),
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": torch.randn(batch, 6, 5, rows, 2),
    }


@entry(
    "SD3Transformer2DModel",
    dict(
        sample_size=12,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=18,
        caption_projection_dim=32,
        pooled_projection_dim=14,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
)
def sd3(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * rows, 10),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "pooled_projections": torch.randn(batch, 14),
    }


@entry(
    "SkyReelsV2Transformer3DModel",
    dict(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=18,
        freq_dim=16,
        ffn_dim=44,
        num_layers=3,
        rope_max_seq_len=32,
    ),
)
def skyreels_v2(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 2 * rows, 10),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
    }


@entry(
    "StableAudio3DiTModel",
    dict(
        io_channels=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        cond_token_dim=18,
        global_cond_dim=14,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=3,
    ),
    timestep_range=(0.0, 1.0),
)
def stable_audio_3(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, rows * 5),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "global_hidden_states": torch.randn(batch, 14),
        "encoder_attention_mask": padding(batch, 7),
    }


@entry(
    "TransformerTemporalModel",
    dict(num_attention_heads=3, attention_head_dim=8, in_channels=6, num_layers=2, norm_num_groups=2, cross_attention_dim=None),
    module="diffusers.models.transformers.transformer_temporal",
)
def temporal(batch: int, rows: int) -> dict[str, Any]:
    # A stage of a video U-Net: frames are its tokens, and every place of the image is a sample.
    frames = rows + 6
    return {"hidden_states": torch.randn(batch * frames, 6, 2, 2), "timestep": torch.randint(0, 1000, (batch,)), "num_frames": frames}


@entry(
    "WanAnimate2Transformer3DModel",
    dict(
        patch_size=(1, 2, 2),
        text_len=9,
        in_dim=12,
        dim=32,
        ffn_dim=44,
        freq_dim=16,
        text_dim=18,
        out_dim=4,
        num_heads=4,
        num_layers=3,
    ),
)
def wan_animate_2(batch: int, rows: int) -> dict[str, Any]:
    """The pass over the driving video, the one that runs on every device; it reads no time, whatever it is given."""
    return {
        "hidden_states": list(torch.randn(batch, 4, 2, 2 * rows, 10)),
        "timestep": 1000 * torch.rand(batch),
        "encoder_hidden_states": [torch.randn(7 - sample, 18) for sample in range(batch)],
        "encoder_hidden_states_image": torch.randn(batch, 6, 1280),
        "condition_latents": list(torch.randn(batch, 8, 2, 2 * rows, 10)),
        "kv_cache": WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": 2 * rows * 5,
        "offset_grid_sizes": torch.tensor([[2, rows, 5]] * batch),
    }


@entry(
    "WanAnimateTransformer3DModel",
    dict(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=18,
        freq_dim=16,
        ffn_dim=44,
        num_layers=4,
        image_dim=14,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
)
def wan_animate(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 12, 3, 2 * rows, 6),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "encoder_hidden_states_image": torch.randn(batch, 5, 14),
        "pose_hidden_states": torch.randn(batch, 4, 2, 2 * rows, 6),
        "face_pixel_values": torch.randn(batch, 3, 5, 16, 16),  # five pixel frames make two latent ones
        "motion_encode_batch_size": 4,
    }


@entry(
    "WanTransformer3DModel",
    dict(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=18,
        freq_dim=16,
        ffn_dim=44,
        num_layers=3,
        rope_max_seq_len=32,
    ),
)
def wan(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 2 * rows, 10),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
    }


@entry(
    "WanVACETransformer3DModel",
    dict(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=18,
        freq_dim=16,
        ffn_dim=44,
        num_layers=4,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=14,
    ),
)
def wan_vace(batch: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 2 * rows, 10),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 18),
        "control_hidden_states": torch.randn(batch, 14, 2, 2 * rows, 10),
        "control_hidden_states_scale": torch.tensor([1.0, 0.8]),
    }


@entry(
    "ZImageTransformer2DModel",
    dict(
        in_channels=4,
        dim=24,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=18,
        axes_dims=[2, 2, 2],
        axes_lens=[128, 16, 16],
    ),
    timestep="t",
    timestep_range=(0.0, 1.0),
)
def z_image(batch: int, rows: int) -> dict[str, Any]:
    """The model fills images and prompts up to multiples of 32 tokens; one long prompt, so that the others get a mask."""
    return {
        "x": list(torch.randn(batch, 4, 1, 2 * rows, 12)),
        "t": torch.rand(batch),
        "cap_feats": [torch.randn(7 - sample if sample else 70, 18) for sample in range(batch)],
    }
