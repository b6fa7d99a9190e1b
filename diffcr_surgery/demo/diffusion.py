"""Noise and sampling: diffusers' schedulers, one shared set of settings, and timesteps drawn region by region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from diffcr_surgery.demo.data import CLASSES, IMAGE_SIZE

__all__ = ["NO_CLASS", "TIMESTEPS", "add_noise", "draw_timesteps", "region_timesteps", "sample"]

TIMESTEPS = 1000
NO_CLASS = CLASSES  # the label beyond the last class: what classifier-free guidance steers away from

_SETTINGS = {
    "num_train_timesteps": TIMESTEPS,
    # The linear schedule would spend most of its steps on pure noise at 8x8 pixels (Nichol & Dhariwal, section 3.2).
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
}


_NOISING: Any = DDPMScheduler(**_SETTINGS)


def add_noise(images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Mix noise into images `b 1 h w` as far as their timesteps `b` say, in training and in measuring."""
    noisy: Tensor = _NOISING.add_noise(images, noise, timesteps)
    return noisy


def draw_timesteps(regions: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draw one timestep region, then the timesteps of a batch inside it.

    Every timestep is as likely as if it were drawn on its own. One region per batch is DiffCR's fast path: all samples
    share one ratio per layer, so that the batch is never split.

    Args:
        regions: number of equal parts of the timestep range; 1 draws from all of it.
        batch: how many timesteps to draw.
        generator: the source of randomness.

    Returns:
        `b`, whole numbers from 0 to 999.
    """
    region = int(torch.randint(regions, (), generator=generator))
    low, high = region * TIMESTEPS // regions, (region + 1) * TIMESTEPS // regions
    return torch.randint(low, high, (batch,), generator=generator)


def region_timesteps(region: int, regions: int, count: int) -> list[int]:
    """Return `count` evenly spread timesteps of a region, away from its edges.

    Example:
        >>> region_timesteps(0, 4, 2)
        [62, 187]
    """
    width = TIMESTEPS / regions
    return [int((region + (i + 0.5) / count) * width) for i in range(count)]


@torch.inference_mode()
def sample(
    model: nn.Module,
    labels: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw images by DDIM with classifier-free guidance.

    Args:
        model: the denoiser.
        labels: wanted classes, `b`.
        steps: denoising steps.
        guidance: how far to go from the class-free prediction to the one for the class; 1 is no guidance.
        seed: of the noise that sampling starts from; equal seeds start equal.
        on_step: called after every step.

    Returns:
        Images in [-1, 1], `b 1 h w`.
    """
    scheduler = DDIMScheduler(**_SETTINGS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    for timestep in scheduler.timesteps:
        with_class, without = model(torch.cat([x, x]), timestep.expand(len(both)), both).chunk(2)
        noise = without + guidance * (with_class - without)
        x = scheduler.step(noise, timestep, x).prev_sample
        on_step()
    return x.clamp(-1, 1)
