"""What is denoised, and what samples are judged by: digits of given classes, and holes in photographs.

Both are small enough to be trained in minutes, and real: scikit-learn's scanned digits, and the photographs inside scikit-image and
scikit-learn. An image is 256 tokens in both.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from parts.inpainting_measure import masked_psnr
from parts.inpainting_model import smooth_fill
from parts.metrics import Distances, distances, features_of, train_classifier
from parts.objectives import NoisePrediction
from parts.photographs import Crops, bundled_photographs
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from diffcr_surgery.demo.data import CLASSES, load_splits
from diffcr_surgery.demo.model import DiT

__all__ = ["PARTS", "TASKS", "TIMESTEPS", "Batch", "Digits", "Photographs", "Quality", "Task", "draw", "part_timesteps", "task_named"]

TIMESTEPS = 1000
PARTS = 20  # of the timestep range: a batch lies in one, so that whatever the arm's regions are (1, 4 or 10), it lies in one of them
DATA_SEED = 0  # splits and photographs are the same for all seeds, so that seeds differ in training alone


@dataclass(frozen=True)
class Batch:
    """Images with what the denoiser knows of them.

    Attributes:
        clean: What is denoised, `b c h w`, of a spread of about 1.
        known: Other arguments of the denoiser, by name, each with `b` in front.
        counts: 1 where the loss counts, `b 1 h w`.
    """

    clean: Tensor
    known: dict[str, Tensor]
    counts: Tensor

    def __getitem__(self, rows: Any) -> "Batch":
        return Batch(self.clean[rows], {name: value[rows] for name, value in self.known.items()}, self.counts[rows])

    def __len__(self) -> int:
        return len(self.clean)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.clean.to(device), {name: value.to(device) for name, value in self.known.items()}, self.counts.to(device))

    def split(self, size: int) -> Iterator["Batch"]:
        """Return the batch in pieces."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class Quality:
    """What samples are worth.

    Attributes:
        distances: To real images, by the features of a classifier trained on the training split.
        accuracy: Share of the samples that the classifier takes for what they should be.
        psnr: Mean peak signal-to-noise ratio inside the holes, in dB; `None` where there is nothing to compare with.
    """

    distances: Distances
    accuracy: float
    psnr: float | None


class Task(Protocol):
    """A data set with its denoiser.

    Attributes:
        name: Of its experiments.
        objective: What the denoiser predicts.
        training: All training images.
        held_out: Images for the held-out loss.
    """

    name: str
    objective: NoisePrediction
    training: Batch
    held_out: Batch

    def new_denoiser(self, width: int, depth: int, heads: int) -> nn.Module:
        """Return an untrained denoiser; it takes `x`, `timestep` and what is known of a batch."""

    def wanted(self, count: int) -> Batch:
        """Return what samples are to be drawn of; `clean` gives their shape, or what they should be."""

    def judge(self, samples: Tensor, wanted: Batch) -> Quality:
        """Judge samples, in the unit of `clean`."""

    def pictures(self, count: int) -> Tensor:
        """Return the first held-out images as they are, `b c h w` in [0, 1]."""

    def about(self) -> str:
        """Return what there is to know of it before reading its results."""


def part_timesteps(part: int) -> range:
    """Return the timesteps of a part of the range.

    Example:
        >>> part_timesteps(1)
        range(50, 100)
    """
    return range(part * TIMESTEPS // PARTS, (part + 1) * TIMESTEPS // PARTS)


def _scheduler(prediction: str) -> dict[str, Any]:
    return {"num_train_timesteps": TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction}


@torch.inference_mode()
def draw(task: Task, model: nn.Module, wanted: Batch, *, steps: int, seed: int, batch: int) -> Tensor:
    """Draw a sample for each wanted one by DDIM, without guidance; equal seeds start from equal noise.

    Args:
        task: Knows what the denoiser predicts.
        model: The denoiser.
        wanted: What is known of the samples.
        steps: Denoising steps, evenly spread, so that regions are visited equally often.
        seed: Of the noise.
        batch: Samples at a time.
    """
    scheduler = DDIMScheduler(**_scheduler(task.objective.name), timestep_spacing="trailing", clip_sample=task.objective.name == "epsilon")
    scheduler.set_timesteps(steps)
    start = torch.randn(wanted.clean.shape, generator=torch.Generator().manual_seed(seed))
    drawn = []
    for noise, piece in zip(start.split(batch), wanted.split(batch), strict=True):
        x = noise = noise.to(piece.clean)
        for timestep in scheduler.timesteps:
            timesteps = timestep.to(x.device).expand(len(x))
            # Where the loss does not count, predictions are untrained, and training has shown zeros beneath the noise.
            x = torch.where(piece.counts > 0, x, scheduler.add_noise(torch.zeros_like(noise), noise, timesteps))
            predicted = model(x=x, timestep=timesteps, **piece.known)
            x = scheduler.step(predicted, timestep, x).prev_sample
        drawn.append(x)
    return torch.cat(drawn)


class Digits:
    """Class-conditional digits: the 8 x 8 scans, bilinearly enlarged to 16 x 16, so that they are 256 tokens of one pixel; epsilon."""

    name = "digits"
    objective = NoisePrediction(DDPMScheduler(**_scheduler("epsilon")))

    def __init__(self) -> None:
        training, held_out = load_splits(DATA_SEED)
        self.training, self.held_out = (self._batch(split.images, split.labels) for split in (training, held_out))

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        large = functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        return Batch(large, {"y": labels}, torch.ones_like(large))

    def new_denoiser(self, width: int, depth: int, heads: int) -> nn.Module:
        return DiT(image_size=16, patch_size=1, in_channels=1, width=width, depth=depth, heads=heads, classes=CLASSES)

    def wanted(self, count: int) -> Batch:
        labels = torch.arange(count) % CLASSES
        return Batch(torch.zeros(count, 1, 16, 16), {"y": labels}, torch.ones(count, 1, 16, 16))

    def pictures(self, count: int) -> Tensor:
        return self.held_out.clean[:count] / 2 + 0.5

    def about(self) -> str:
        return (
            "scikit-learn's scans of 8 × 8 pixels, bilinearly enlarged to 16 × 16, each pixel a token: neighbouring tokens know much of "
            f"each other, which makes it easier to save some. {len(self.training)} train, {len(self.held_out)} are held out. "
            "Samples are of the ten classes in turn. FID and KID are to the training images, by the features of a small classifier trained "
            "on these; *recognised* is the share of samples that it takes for their class."
        )

    @functools.cached_property
    def _judge(self) -> tuple[nn.Module, Tensor]:
        images = self.training.clean / 2 + 0.5
        classifier = train_classifier(images, self.training.known["y"])
        return classifier, features_of(classifier, images.split(500))

    def judge(self, samples: Tensor, wanted: Batch) -> Quality:
        classifier, real = self._judge
        images = _as_kept(samples.cpu() / 2 + 0.5)
        read = classifier.recognised(images, wanted.known["y"].cpu())
        return Quality(distances(real, features_of(classifier, images.split(500))), float(read.float().mean()), None)


class Inpainter(DiT):
    """A DiT that sees, beside the noisy image, the image around the hole and the mask."""

    def forward(self, x: Tensor, timestep: Tensor, seen: Tensor) -> Tensor:
        """Predict for the noisy image.

        Args:
            x: `b 3 h w`.
            timestep: `b`.
            seen: The image with its hole filled smoothly, and the mask, `b 4 h w`.
        """
        nothing = torch.zeros_like(timestep, dtype=torch.long)
        return super().forward(torch.cat([x, seen], dim=1), timestep, nothing)[:, :3]


class Photographs:
    """Holes in crops of photographs: 32 x 32 pixels in 256 tokens of 2 x 2, of which a hole touches about 150 to 200; v-prediction.

    What is denoised is the image over a smooth fill of its hole. The right 30 % of each photograph is seen by no training.
    """

    name = "photographs"
    objective = NoisePrediction(DDPMScheduler(**_scheduler("v_prediction")))
    size, patch, hole, detail = 32, 2, 200, 0.25
    pool, tests = 4096, 512

    def __init__(self) -> None:
        photographs, unseen = bundled_photographs(self.size)
        self._photographs = photographs
        self.training = self._batch(self._crops(photographs, self.pool, 1))
        self._tests = self._crops(unseen, self.tests, 2)
        self.held_out = self._batch(self._tests)[:256]

    def _crops(self, photographs: list[Tensor], count: int, seed: int) -> dict[str, Tensor]:
        crops = Crops(photographs, size=self.size, patch=self.patch, holes=[self.hole], group=count, seed=seed)
        return default_collate([crops[i] for i in range(count)])

    def _batch(self, crops: dict[str, Tensor]) -> Batch:
        filled = smooth_fill(crops["image"], crops["mask"])
        return Batch((crops["image"] - filled) / self.detail, {"seen": torch.cat([filled, crops["mask"]], dim=1)}, crops["mask"])

    def new_denoiser(self, width: int, depth: int, heads: int) -> nn.Module:
        return Inpainter(image_size=self.size, patch_size=self.patch, in_channels=7, width=width, depth=depth, heads=heads, classes=1)

    def wanted(self, count: int) -> Batch:
        return self._batch(self._tests)[:count]

    def pictures(self, count: int) -> Tensor:
        return self._tests["image"][:count] / 2 + 0.5

    def about(self) -> str:
        wanted = self.wanted(self.tests)
        real = wanted.known["seen"][:, :3] + self.detail * wanted.clean
        alone = float(masked_psnr(wanted.known["seen"][:, :3], real, wanted.counts).mean())
        hole = float(wanted.counts.mean())
        return (
            f"Crops of {self.size} × {self.size} pixels, 256 tokens, from {len(self._photographs)} photographs inside scikit-image and "
            f"scikit-learn, with a hole of {hole:.0%} of their area on average. {self.pool} crops train; {len(self.held_out)} are held out "
            f"for the loss and {len(wanted)} for samples, all of these from the right 30 % of the same photographs, which no training saw. "
            "FID is between filled crops and the very same crops as they were, which share all that is around the holes: it is no distance "
            "between independent sets, and KID is left out for that reason. *Recognised* is the share that a classifier takes for the same "
            f"photograph as the crop as it was. The smooth fill that denoising starts from has a masked PSNR of {alone:.2f} dB by itself: "
            "this measure rewards blurs, so it does not rank models."
        )

    @functools.cached_property
    def _judge(self) -> nn.Module:
        each = [self._crops([photograph], 200, 3)["image"] for photograph in self._photographs]
        labels = torch.arange(len(each)).repeat_interleave(200)
        return train_classifier(torch.cat(each) / 2 + 0.5, labels)

    def judge(self, samples: Tensor, wanted: Batch) -> Quality:
        seen, mask = wanted.known["seen"][:, :3].cpu(), wanted.counts.cpu()
        real = seen + self.detail * wanted.clean.cpu()
        images = torch.where(mask > 0, (seen + self.detail * samples.cpu()).clamp(-1, 1), real)
        classifier = self._judge
        features = [features_of(classifier, _as_kept(each / 2 + 0.5).split(500)) for each in (real, images)]
        alike = (classifier.head(features[0]).argmax(1) == classifier.head(features[1]).argmax(1)).float().mean()
        return Quality(distances(*features), float(alike), float(masked_psnr(images, real, mask).mean()))


def _as_kept(images: Tensor) -> Tensor:
    """Return images in [0, 1] as a file keeps them."""
    return (255 * images.clamp(0, 1)).round() / 255


TASKS: dict[str, Callable[[], Task]] = {"digits": Digits, "photographs": Photographs}


@functools.cache
def task_named(name: str) -> Task:
    """Return a task; its images are made ready once in a process."""
    return TASKS[name]()
