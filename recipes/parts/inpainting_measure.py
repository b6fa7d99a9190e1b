"""What inpainting models are compared by: filled holes, the loss on held-out crops, and what a step costs for holes of several sizes."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from matplotlib.figure import Figure
from parts.inpainting_model import Example, Inpainter, PixelSpace, VaeSpace, add_tokens, prepare
from parts.objectives import NoisePrediction
from torch import Tensor

from diffcr_surgery.flops import count_flops

__all__ = ["draw_cost", "held_out_loss", "hole_costs", "inpaint", "masked_psnr"]

LOSS_TIMESTEPS = 4  # in each region


@torch.no_grad()
def inpaint(
    model: Inpainter, batch: Mapping[str, Tensor], space: PixelSpace | VaeSpace, patch: int, scheduler: DDIMScheduler, steps: int, seed: int
) -> Tensor:
    """Fill the holes of a batch; the pixels around them stay as they are.

    Args:
        model: Dense or routed, in `eval()`.
        batch: Of crops.
        space: What is denoised.
        patch: Height and width of a token.
        scheduler: With the noise schedule of training.
        steps: Denoising steps.
        seed: Of the noise to start from.

    Returns:
        Images in [-1, 1], `b 3 h w`.
    """
    seen, clean, places = prepare(batch, space, patch)
    context = model.encode(seen, places)
    tokens = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        predicted = model.decoder(tokens, context, places, timestep.to(places).expand(len(tokens)))
        tokens = scheduler.step(predicted, timestep, tokens).prev_sample
    filled = space.decode(add_tokens(seen[:, :-1], space.detail * tokens, places, patch)).clamp(-1, 1)
    return torch.where(batch["mask"] > 0, filled, batch["image"])


def masked_psnr(images: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image inside its mask, in dB, `b`.

    Args:
        images: `b c h w` in [-1, 1].
        reference: What they should be, `b c h w`.
        mask: 1 where they are compared, `b 1 h w`.

    Raises:
        ValueError: If a mask is empty.
    """
    area = mask.sum(dim=(1, 2, 3)) * images.shape[1]
    if not bool((area > 0).all()):
        raise ValueError("A mask is empty: there is nothing to compare inside it")
    error = (((images - reference) / 2).square() * mask).sum(dim=(1, 2, 3)) / area
    return -10 * error.log10()


@torch.no_grad()
def held_out_loss(model: Inpainter, examples: Sequence[Example], objective: NoisePrediction, regions: int, seed: int) -> list[float]:
    """Return the mean training loss in each timestep region, cleanest first, with the same noise for every model."""
    generator, width = torch.Generator().manual_seed(seed), objective.highest / regions
    losses = [[0.0] for _ in range(regions)]
    for seen, clean, places in examples:
        context = model.encode(seen, places)
        for region, found in enumerate(losses):
            for i in range(LOSS_TIMESTEPS):
                timestep = torch.full((len(clean),), int((region + (i + 0.5) / LOSS_TIMESTEPS) * width), device=clean.device)
                noise = torch.randn(clean.shape, generator=generator).to(clean)
                noisy, target = objective.noisy_and_target(clean, noise, timestep)
                found.append(float((model.decoder(noisy, context, places, timestep) - target).square().mean()))
    return [statistics.fmean(found[1:]) for found in losses]


@torch.no_grad()
def hole_costs(
    models: Mapping[str, Inpainter], examples: Sequence[Example], objective: NoisePrediction, regions: int, rounds: int
) -> list[dict[str, Any]]:
    """Count and time a decoder's step for holes of several sizes; a mean over the timestep regions, which a sampler visits equally often.

    Args:
        models: Name to model.
        examples: One for each size of hole.
        objective: Knows the range of timesteps.
        regions: Timestep regions.
        rounds: How often each step is timed; models take turns, and medians are reported.

    Returns:
        For each size of hole: `hole`, its tokens, and for each model `flops_NAME`, of an image, and `ms_NAME`, of the batch.
    """
    found = []
    for seen, clean, places in examples:
        calls: dict[tuple[str, int], Callable[[], Tensor]] = {}
        for name, model in models.items():
            context = model.encode(seen, places)
            for region in range(regions):
                timestep = torch.full((len(clean),), int((region + 0.5) * objective.highest / regions), device=clean.device)
                calls[name, region] = lambda m=model.decoder, c=context, t=timestep, x=clean, p=places: m(x, c, p, t)
        flops = {key: _flops(call) / len(clean) for key, call in calls.items()}
        seconds = {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                seconds[key].append(_seconds(call, clean.device))
        row: dict[str, Any] = {"hole": clean.shape[1]}
        for name in models:
            row[f"flops_{name}"] = statistics.fmean(flops[name, region] for region in range(regions))
            row[f"ms_{name}"] = 1000 * statistics.fmean(statistics.median(seconds[name, region]) for region in range(regions))
        found.append(row)
    return found


def _flops(call: Callable[[], Tensor]) -> int:
    call()  # a converted model's first call of a kind records its graph, which is not to be counted
    return count_flops(call)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def draw_cost(costs: Sequence[Mapping[str, Any]], names: Sequence[str], batch: int) -> Figure:
    """Draw what a decoder's step costs against the size of the hole.

    Args:
        costs: Of `hole_costs`.
        names: Of the models.
        batch: Images a step was timed on.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    titles = (("flops", 1e-9, "GFLOPs of a step, one image"), ("ms", 1.0, f"ms of a step, {batch} images"))
    for axes, (key, unit, title) in zip(figure.subplots(1, 2), titles, strict=True):
        for name in names:
            axes.plot([row["hole"] for row in costs], [unit * row[f"{key}_{name}"] for row in costs], marker="o", label=name)
        axes.set(title=title, xlabel="tokens in the hole", xlim=(0, None), ylim=(0, None))
        axes.legend()
    return figure
