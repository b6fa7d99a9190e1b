"""Captioned images made ready for training once: the VAE's latents and what the pipeline makes of captions, on disk.

One small safetensors file an image and a caption, named after what it was made from. So a run that was interrupted goes on where it was,
several processes share the work, and a changed image or caption is made anew.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, Image, load_dataset
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from parts.calling import Calling, encode_captions
from PIL import Image as Pictures
from PIL import ImageOps
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["PreparedData", "load_captioned", "read_image"]


def load_captioned(source: str, caption_column: str) -> Dataset:
    """Load images with captions: a folder with a `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder), or a data set's name."""
    data = load_dataset("imagefolder", data_dir=source, split="train") if Path(source).is_dir() else load_dataset(source, split="train")
    missing = {"image", caption_column} - set(data.column_names)
    if missing:
        raise SystemExit(f"{source} has the columns {data.column_names}, not {sorted(missing)}; for a folder, add a metadata.jsonl")
    return data.cast_column("image", Image(decode=False))


def _identity(image: dict[str, Any]) -> bytes:
    """Return what an undecoded image is known by: its bytes, or its file as it is now."""
    if image["bytes"]:
        return image["bytes"]
    state = os.stat(image["path"])
    return f"{image['path']} {state.st_size} {state.st_mtime_ns}".encode()


def read_image(image: dict[str, Any], size: int) -> Tensor:
    """Return an undecoded image as `3 size size` in [-1, 1]: scaled by its shorter side, cropped in the centre."""
    with Pictures.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
        picture = v2.functional.to_image(ImageOps.exif_transpose(opened).convert("RGB"))  # upright, as its camera was held
    picture = v2.functional.center_crop(v2.functional.resize(picture, size, antialias=True), size)
    return v2.functional.to_dtype(picture, torch.float32, scale=True) * 2 - 1


class PreparedData:
    """Latents and conditions of a data set.

    Args:
        data: Rows with an undecoded `image` and a caption.
        caption_column: Name of the captions.
        calling: How the pipeline calls its transformer.
        folder: Where the files lie.
        key: What they depend on besides image and caption: the model and its settings.
        size: Height and width of an image, in pixels.
    """

    def __init__(self, data: Dataset, caption_column: str, calling: Calling, folder: Path, key: str, size: int) -> None:
        self.data, self.calling, self.folder, self.size = data, calling, folder, size
        self.captions: list[str] = list(data[caption_column])
        self._key = f"{key} {size}"
        self._latents = [self._file("latents", _identity(row)) for row in data["image"]]
        self._conditions = {caption: self._file("captions", caption.encode()) for caption in ("", *self.captions)}

    def __len__(self) -> int:
        return len(self._latents)

    def _file(self, kind: str, content: bytes) -> Path:
        digest = hashlib.sha256(self._key.encode() + b"\0" + content).hexdigest()[:32]
        return self.folder / kind / f"{digest}.safetensors"

    @torch.no_grad()
    def make(self, pipe: DiffusionPipeline, accelerator: Accelerator, **call: Any) -> None:
        """Make what is missing, every process its share; all of them return when all of it is there."""

        def mine(title: str, files: Iterable[Any], path: Callable[[Any], Path]) -> Iterable[Any]:
            share = list(files)[accelerator.process_index :: accelerator.num_processes]  # before looking: the others are at work
            missing = [each for each in share if not path(each).exists()]
            return track(missing, title, disable=not accelerator.is_main_process or not missing)

        for caption in mine("encoding captions", self._conditions, self._conditions.__getitem__):
            found = encode_captions(pipe, [caption], **call)
            _write(self._conditions[caption], {name: found[name] for name in self.calling.conditions})
        precision = pipe.vae.dtype
        pipe.vae.to(torch.float32)  # some overflow in less
        for index in mine("encoding images", range(len(self)), self._latents.__getitem__):
            pixels = read_image(self.data[index]["image"], self.size)[None].to(pipe.vae.device)
            _write(self._latents[index], {"moments": pipe.vae.encode(pixels).latent_dist.parameters})
        pipe.vae.to(precision)
        accelerator.wait_for_everyone()

    def batch(self, rows: Sequence[int], drop: Sequence[bool], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clean stream of some images, and the transformer's conditions, on the CPU.

        Args:
            rows: Which images.
            drop: Which of them get the empty caption, for guidance.
            generator: Draws from the VAE's distribution.
        """
        moments = torch.cat([load_file(self._latents[row])["moments"] for row in rows]).float()
        latents = DiagonalGaussianDistribution(moments).sample(generator)
        captions = ["" if dropped else self.captions[row] for row, dropped in zip(rows, drop, strict=True)]
        found = [load_file(self._conditions[caption]) for caption in captions]
        return self.calling.to_stream(latents), {name: torch.cat([each[name] for each in found]) for name in self.calling.conditions}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file in one step, so that one that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch)
    os.replace(scratch, path)
