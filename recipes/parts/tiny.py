"""A tiny random PixArt-Sigma and captioned crops of real photographs, for `--smoke`: what is needed to run a recipe, and no download."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from skimage import data as photographs
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

__all__ = ["captioned_photographs", "tiny_pixart"]

PICTURES = {
    "a cat": photographs.chelsea,
    "an astronaut": photographs.astronaut,
    "a cup of coffee": photographs.coffee,
    "a rocket": photographs.rocket,
}
SIZE = 32  # of an image, in pixels


def captioned_photographs(folder: Path, count: int = 16) -> Path:
    """Write crops of scikit-image's photographs with captions, in the form of Hugging Face's imagefolder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, lines = torch.Generator().manual_seed(0), []
    for index in range(count):
        caption, load = list(PICTURES.items())[index % len(PICTURES)]
        picture = Image.fromarray(load())
        side = min(picture.size) // 2
        left, top = (int(torch.randint(extent - side, (), generator=generator)) for extent in picture.size)
        picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE)).save(folder / f"{index:02}.png")
        lines.append(json.dumps({"file_name": f"{index:02}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tiny_pixart(folder: Path) -> Path:
    """Save a PixArt-Sigma pipeline of 3 layers and 64 image tokens, with random weights."""
    torch.manual_seed(0)
    words = sorted({word for caption in PICTURES for word in caption.split()} | {"photograph", "drawing"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    width = 16
    encoder = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=SIZE,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=SIZE // 2,
        cross_attention_dim=16, caption_channels=width, use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (p for p in transformer.parameters() if not p.any()):
            parameter.normal_(std=0.05)  # what starts at zero would hide the rest
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder
