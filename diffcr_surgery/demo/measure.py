"""What the denoisers are judged by: held-out loss, FLOPs, latency, and whether a classifier can read their digits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

from diffcr_surgery.demo.data import CLASSES, IMAGE_SIZE, Split
from diffcr_surgery.demo.diffusion import add_noise, region_timesteps
from diffcr_surgery.flops import count_flops

__all__ = ["DigitReader", "Step", "flops_per_step", "held_out_loss", "latencies_ms"]


@torch.inference_mode()
def held_out_loss(
    model: nn.Module, data: Split, regions: int, per_region: int, seed: int, on_step: Callable[[], None] = lambda: None
) -> list[float]:
    """Measure the denoising loss on held-out images, with the same noise for every model.

    Args:
        model: the denoiser.
        data: the held-out images.
        regions: number of timestep regions.
        per_region: evenly spread timesteps per region; every image is noised to each of them.
        seed: of the noise.
        on_step: called after every timestep.

    Returns:
        Mean squared error of the predicted noise per region, clean to noisy.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for region in range(regions):
        total = 0.0
        for timestep in region_timesteps(region, regions, per_region):
            timesteps = torch.full((len(data.images),), timestep)
            noise = torch.randn(data.images.shape, generator=generator)
            predicted = model(add_noise(data.images, noise, timesteps), timesteps, data.labels)
            total += F.mse_loss(predicted, noise).item()
            on_step()
        losses.append(total / per_region)
    return losses


@dataclass(frozen=True)
class Step:
    """One sampling step to be measured: the inputs of a call in the middle of a timestep region.

    Attributes:
        x: `b 1 h w`.
        timesteps: `b`, all equal.
        labels: `b`.
    """

    x: Tensor
    timesteps: Tensor
    labels: Tensor

    @classmethod
    def of_region(cls, region: int, regions: int, batch: int) -> Step:
        """Make up the step of a region; what is in the images does not matter to the measurement."""
        (middle,) = region_timesteps(region, regions, 1)
        x = torch.randn(batch, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(region))
        return cls(x, torch.full((batch,), middle), torch.arange(batch) % CLASSES)

    def run(self, model: nn.Module) -> None:
        """Call the denoiser."""
        model(self.x, self.timesteps, self.labels)


@torch.inference_mode()
def flops_per_step(model: nn.Module, steps: list[Step]) -> float:
    """Count the floating-point operations of a step, as they are executed, averaged over the steps given."""
    total = 0
    for step in steps:
        step.run(model)  # a converted model's first call of a kind also records its graph, which is not to be counted
        total += count_flops(partial(step.run, model))
    return total / len(steps)


@torch.inference_mode()
def latencies_ms(
    models: Mapping[str, nn.Module], steps: list[Step], rounds: int, on_step: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Time the models in turns, so that whatever slows the machine down slows all of them down.

    Args:
        models: name to denoiser.
        steps: one step per timestep region.
        rounds: how often every model runs every step.
        on_step: called after every round.

    Returns:
        Name to milliseconds per step: the median of every region, averaged over the regions.
    """
    seconds: dict[tuple[str, int], list[float]] = {(name, i): [] for name in models for i in range(len(steps))}
    for name, i in seconds:  # not counted: a first call allocates, and may record a graph
        steps[i].run(models[name])
    for _ in range(rounds):
        for i, step in enumerate(steps):
            for name, model in models.items():
                start = time.perf_counter()
                step.run(model)
                seconds[name, i].append(time.perf_counter() - start)
        on_step()
    return {name: 1000 * statistics.fmean(statistics.median(seconds[name, i]) for i in range(len(steps))) for name in models}


class DigitReader:
    """A support-vector machine that reads real digits, asked what it reads in sampled ones."""

    def __init__(self, data: Split) -> None:
        """Fit the reader on real images."""
        self._svm = SVC(gamma=0.02).fit(data.images.flatten(1).numpy(), data.labels.numpy())

    def share_read(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images `b 1 h w` that are read as their class, `b`."""
        read = torch.as_tensor(self._svm.predict(images.flatten(1).numpy()))
        return (read == labels).float().mean().item()
