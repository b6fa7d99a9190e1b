"""The training loop that all denoisers share: dense, uniform and DiffCR differ in the model, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.nn import functional as F

import diffcr_surgery as dcs
from diffcr_surgery.demo.data import Split
from diffcr_surgery.demo.diffusion import NO_CLASS, add_noise, draw_timesteps

__all__ = ["Schedule", "train"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: the highest; it warms up over the first 5 % of the steps and falls to 0 along a cosine.
        regions: timestep regions; every batch is drawn from one of them.
        batch_size: images per step.
        weight_decay: of AdamW.
        drop_class: share of labels replaced by "no class", for classifier-free guidance.
    """

    steps: int
    learning_rate: float
    regions: int = 1
    batch_size: int = 32
    weight_decay: float = 0.01
    drop_class: float = 0.1


def train(
    model: nn.Module,
    data: Split,
    schedule: Schedule,
    *,
    seed: int,
    on_step: Callable[[float], None],
    ratio_optimizer: dcs.RatioOptimizer | None = None,
) -> None:
    """Train a denoiser in place.

    Equal seeds give equal batches, timesteps and noise, whatever the model is.

    Args:
        model: takes noisy images `b 1 h w`, timesteps `b` and classes `b`.
        data: the training images.
        schedule: how long and how fast.
        seed: of batches, timesteps and noise.
        on_step: called after every step with the step's loss.
        ratio_optimizer: moves the ratio table of a converted model. Without one, a table stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    own: dict[str, Any] = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    groups = dcs.parameter_groups(model, **own) if hasattr(model, "diffcr") else [{"params": list(model.parameters()), **own}]
    weights = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, foreach=True)
    learning_rate = get_cosine_schedule_with_warmup(optimizer, schedule.steps // 20, schedule.steps)
    model.train()
    for _ in range(schedule.steps):
        rows = torch.randint(len(data.images), (schedule.batch_size,), generator=generator)
        images, labels = data.images[rows], data.labels[rows]
        dropped = torch.rand(schedule.batch_size, generator=generator) < schedule.drop_class
        labels = labels.masked_fill(dropped, NO_CLASS)
        timesteps = draw_timesteps(schedule.regions, schedule.batch_size, generator)
        noise = torch.randn(images.shape, generator=generator)
        loss = F.mse_loss(model(add_noise(images, noise, timesteps), timesteps, labels), noise)

        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        if ratio_optimizer is not None:
            ratio_optimizer.step()
            ratio_optimizer.zero_grad()
        on_step(loss.item())
    model.eval()
