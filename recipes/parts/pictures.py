"""Pictures of the recipes: images side by side, and the ratio table as a heat map."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

import diffcr_surgery as dcs

__all__ = ["draw_images", "draw_ratios", "save_image"]


def draw_images(columns: Mapping[str, Tensor], size: float = 1.3) -> Figure:
    """Draw images side by side.

    Args:
        columns: Title to images `b c h w` in [0, 1], equally many under each; c is 1 or 3.
        size: Height and width of an image, in inches.
    """
    count = len(next(iter(columns.values())))
    figure = Figure(figsize=(size * len(columns), size * count + 0.3), layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
            grid[row, column].imshow(rearrange(image, "c h w -> h w c").numpy(), cmap="gray", vmin=0, vmax=1)
            grid[row, column].set_axis_off()
    return figure


def draw_ratios(model: Any) -> Figure:
    """Draw the ratios of a converted model: one row a block, one column a timestep region, the noisiest first as a sampler goes."""
    table = dcs.ratio_table(model).detach().float().cpu().flip(1)
    plan = model.diffcr.plan
    blocks, regions = table.shape
    figure = Figure(figsize=(0.5 * regions + 3.4, 0.22 * blocks + 1.3), layout="constrained")
    axes = figure.subplots()
    heat = axes.imshow(table.numpy(), cmap="viridis", vmin=0, vmax=0.9, aspect="auto")
    axes.set_yticks(range(blocks), [site.path for site in plan.routed_sites], fontsize=7)
    axes.set_xticks([0, regions - 1] if regions > 1 else [0], ["noisy", "clean"] if regions > 1 else ["all timesteps"])
    axes.set_title(f"Share of tokens that bypass, mean {table.mean():.3f}", fontsize=9)
    figure.colorbar(heat, ax=axes)
    return figure


def save_image(image: Tensor, path: Path) -> None:
    """Write an image `c h w` in [0, 1] as a pipeline of diffusers would have given it, rounded halves included."""
    (picture,) = DiffusionPipeline.numpy_to_pil(rearrange(image, "c h w -> 1 h w c").numpy())
    picture.save(path)
