"""Pipelines of diffusers, built from small random components: for tests that save them and load them from disk as a user would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

__all__ = ["BUILDERS", "CALLS", "PIPELINES", "save_pipeline"]

WORDS = ("a", "an", "cat", "fox", "red", "snow", "photograph", "drawing", "bad")
BUILDERS: dict[str, Callable[[], Any]] = {}


def builder(build: Callable[[], Any]) -> Callable[[], Any]:
    """Enter a builder under the name of the class it returns."""
    BUILDERS[build.__annotations__["return"]] = build
    return build


def t5(width: int) -> dict[str, Any]:
    """A tokenizer of a few words and an encoder of one layer."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"tokenizer": T5TokenizerFast(vocab=pieces, extra_ids=0), "text_encoder": T5EncoderModel(config)}


def clip(width: int, projected: bool = False) -> dict[str, Any]:
    """The same in CLIP's form, with or without a projection of the pooled text."""
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, projection_dim=width, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)}


def numbered(number: int, parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_{number}": part for name, part in parts.items()}


def vae(channels: int, **more: Any) -> AutoencoderKL:
    """An image autoencoder that halves height and width."""
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, sample_size=32, **more,
    )  # fmt: skip


@builder
def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=16, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=vae(4), scheduler=DDIMScheduler(), id2label=dict(enumerate(WORDS)))


@builder
def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=16, cross_attention_dim=16,
        caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(transformer=transformer, vae=vae(4), scheduler=DPMSolverMultistepScheduler(), **t5(16))


@builder
def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **clip(16, projected=True),
        **numbered(2, clip(16, projected=True)),
        **numbered(3, t5(32)),
    )


def flux_parts(channels: int) -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        in_channels=channels, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    autoencoder = vae(4, shift_factor=0.11, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": autoencoder, "scheduler": scheduler, **clip(16), **numbered(2, t5(16))}


@builder
def flux() -> FluxPipeline:
    return FluxPipeline(**flux_parts(16))


@builder
def flux_fill() -> FluxFillPipeline:
    return FluxFillPipeline(**flux_parts(16 + 16 + 4 * 4))  # latents, those of the masked image, and the mask's 2 x 2 pixels of each


@builder
def ltx() -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=16,
    )
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return LTXPipeline(transformer=transformer, vae=autoencoder, scheduler=FlowMatchEulerDiscreteScheduler(), **t5(16))


PIPELINES = tuple(BUILDERS)
SQUARE = {"height": 32, "width": 32}
WORDED = {"prompt": "a red fox", "num_inference_steps": 3}
CALLS: dict[str, dict[str, Any]] = {
    "DiTPipeline": {"class_labels": [3], "num_inference_steps": 3},
    "PixArtSigmaPipeline": {**WORDED, **SQUARE, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8},
    "StableDiffusion3Pipeline": {**WORDED, **SQUARE, "max_sequence_length": 8},
    "FluxPipeline": {**WORDED, **SQUARE, "max_sequence_length": 8},
    "FluxFillPipeline": {
        **WORDED,
        **SQUARE,
        "max_sequence_length": 8,
        "image": torch.zeros(1, 3, 32, 32),
        "mask_image": torch.ones(1, 1, 32, 32),
    },
    "LTXPipeline": {**WORDED, **SQUARE, "num_frames": 9, "max_sequence_length": 8},
}


def save_pipeline(name: str, folder: Path) -> Path:
    """Build a pipeline by the name of its class, with weights that hide nothing, and save it."""
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    with torch.no_grad():
        for parameter in (p for p in pipe.transformer.parameters() if not p.any()):
            parameter.normal_(std=0.1)  # what starts at zero, such as gates, would hide the rest
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for part in parts:
        part.eval()
    pipe.save_pretrained(folder)
    return folder
