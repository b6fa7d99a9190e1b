"""The three pictures: samples side by side, the learned ratios, and which patches go round which layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from diffcr_surgery.demo.data import CLASSES
from diffcr_surgery.demo.diffusion import TIMESTEPS, add_noise, region_timesteps
from diffcr_surgery.tokens import keep_tokens, kept_count, rank_tokens

__all__ = ["bypassed_patches", "draw_ratios", "draw_routing", "draw_samples"]

_BYPASS_COLOUR = "tab:orange"


def draw_samples(path: Path, images: Mapping[str, Tensor], rows: int) -> None:
    """Draw the samples of several models side by side, one column per class.

    Args:
        path: the file to write.
        images: title to images in [-1, 1], `(row class) 1 h w`, every model from the same noise.
        rows: how many rows to draw.
    """
    figure = Figure(figsize=(4.6 * len(images), 0.46 * rows + 0.7), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        size = batch.shape[-1] + 2
        framed = nn.functional.pad(batch[: rows * CLASSES], (1, 1, 1, 1), value=-1.0)
        axes.imshow(rearrange(framed, "(r k) 1 h w -> (r h) (k w)", k=CLASSES), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([size * (k + 0.5) - 0.5 for k in range(CLASSES)], [str(k) for k in range(CLASSES)])
        axes.set_yticks([])
    figure.savefig(path, dpi=150)


def draw_ratios(path: Path, learned: Tensor, executed: Tensor) -> None:
    """Draw the ratio table as a heat map: the bins that run, with the learned values they were rounded from.

    Args:
        path: the file to write.
        learned: ratio table, `l r`.
        executed: the bins that inference runs, `l r`.
    """
    layers, regions = executed.shape
    figure = Figure(figsize=(1.4 * regions + 2.4, 0.55 * layers + 1.6), layout="constrained")
    axes = figure.subplots()
    heat = axes.imshow(executed, cmap="viridis", vmin=0, vmax=0.9, aspect="auto")
    for layer in range(layers):
        for region in range(regions):
            value = executed[layer, region].item()
            text = f"{value:.1f}\n({learned[layer, region].item():.2f})"
            colour = "black" if value > 0.5 else "white"
            axes.text(region, layer, text, ha="center", va="center", fontsize=8, color=colour)
    edges = [TIMESTEPS * r // regions for r in range(regions + 1)]
    names = [f"{low}–{high - 1}" for low, high in itertools.pairwise(edges)]
    names[0], names[-1] = f"{names[0]}\nclean", f"{names[-1]}\nnoisy"
    axes.set_xticks(range(regions), names)
    axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    axes.set_xlabel("timestep region")
    axes.set_ylabel("layer")
    axes.set_title(f"Share of tokens that bypass (learned value), mean {executed.mean().item():.3f}", fontsize=10)
    figure.colorbar(heat, ax=axes)
    figure.savefig(path, dpi=150)


@torch.inference_mode()
def bypassed_patches(model: Any, x: Tensor, timesteps: Tensor, labels: Tensor, region: int) -> Tensor:
    """Run a converted model and tell which tokens went round which layer.

    Args:
        model: a converted denoiser, in inference and not yet specialised.
        x: noisy images, `b 1 h w`.
        timesteps: `b`, all of one region.
        labels: `b`.
        region: the region of the timesteps.

    Returns:
        True where a token bypasses a layer, `l b n`.
    """
    scores: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index, router in enumerate(model.diffcr.routers.values()):

            def keep(_module: nn.Module, _args: Any, output: Tensor, index: int = index) -> None:
                scores[index] = output

            handle = router.register_forward_hook(keep)
            stack.callback(handle.remove)
        model(x, timesteps, labels)
    tokens = x[0].numel()
    table = model.diffcr.executed_ratios()
    bypassed = torch.zeros(len(table), len(x), tokens, dtype=torch.bool)
    for index, ratio in enumerate(table[:, region].tolist()):
        count = kept_count(ratio, tokens)
        if count < tokens:
            bypassed[index] = True
            bypassed[index].scatter_(1, keep_tokens(rank_tokens(scores[index]), count), False)
    return bypassed


def draw_routing(path: Path, model: Any, image: Tensor, label: Tensor, regions: int, seed: int) -> None:
    """Draw which patches bypass each layer, over the image, from noisy to clean.

    Args:
        path: the file to write.
        model: a converted denoiser, in inference and not yet specialised.
        image: a clean image, `1 1 h w`.
        label: its class, `1`.
        regions: number of timestep regions; one column shows the middle of each.
        seed: of the noise.
    """
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    columns = []
    for region in reversed(range(regions)):  # as a sampler goes
        (timestep,) = region_timesteps(region, regions, 1)
        at = torch.tensor([timestep])
        noisy = add_noise(image, noise, at)
        columns.append((timestep, noisy, bypassed_patches(model, noisy, at, label, region)))
    layers = len(columns[0][2])
    figure = Figure(figsize=(1.5 * regions + 0.6, 1.5 * (layers + 1) + 0.9), layout="constrained")
    grid = figure.subplots(layers + 1, regions, squeeze=False)
    for column, (timestep, noisy, bypassed) in enumerate(columns):
        _show(grid[0, column], noisy[0, 0], None, f"t = {timestep}")
        for layer in range(layers):
            mask = bypassed[layer, 0].reshape(image.shape[-2:])
            _show(grid[layer + 1, column], image[0, 0], mask, f"{mask.float().mean().item():.0%} bypass")
    for row, name in enumerate(["what it sees", *(f"layer {layer}" for layer in range(layers))]):
        grid[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle("Patches that bypass a layer (tinted), over the clean image", fontsize=10)
    figure.savefig(path, dpi=130)


def _show(axes: Any, image: Tensor, tinted: Tensor | None, title: str) -> None:
    """Show a grey image `h w`, tinted where a mask `h w` is set."""
    grey = ((image.clamp(-1, 1) + 1) / 2)[..., None].expand(-1, -1, 3).clone()
    if tinted is not None:
        grey[tinted] = 0.35 * grey[tinted] + 0.65 * torch.tensor(to_rgb(_BYPASS_COLOUR))
    axes.imshow(grey)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
