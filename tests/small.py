"""The smallest denoisers that route, for tests of what does not depend on the model: tokens as they come, and a table beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs

WIDTH, LAYERS, REGIONS = 8, 3, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        return x + self.mlp(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t[:, None, None] / 1000
        for block in self.blocks:
            x = block(x)
        return x


def inputs(*timesteps: float) -> dict[str, Tensor]:
    return {"x": torch.randn(len(timesteps), 10, WIDTH, generator=torch.Generator().manual_seed(3)), "t": torch.tensor(timesteps)}


def converted(**settings: Any) -> nn.Module:
    config = dcs.DiffCRConfig(**{"target_ratio": 0.3, "timestep_regions": REGIONS, "timestep_range": (0, 1000)} | settings)
    return dcs.convert_(Denoiser().train(), inputs(100.0, 900.0), config)


def give(model: nn.Module, gradient: Tensor | None) -> None:
    dcs.ratio_table(model).grad = None if gradient is None else gradient.clone()


class TableBlock(nn.Module):
    """Adds positions and mixes tokens; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        self.seen.append((x.detach(), positions.detach()))
        y = x + positions
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class TableModel(nn.Module):
    """Two blocks with a table of positions, shared by the batch, or of each sample."""

    def __init__(self, tokens: int, shared: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TableBlock() for _ in range(2))
        self.table, self.shared = nn.Parameter(torch.randn(tokens, WIDTH)), shared

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        positions = self.table if self.shared else self.table.expand(len(x), -1, -1) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x, positions=positions)
        return x
