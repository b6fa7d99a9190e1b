"""Arithmetic of compression ratios: bins, brackets, and a budget that ratios are projected to, rounded and judged by."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcr_surgery.config import DiffCRConfig

__all__ = ["Budget", "bracket"]


def bracket(ratio: float, bins: Sequence[float]) -> tuple[float, float]:
    """Return the two neighbouring bins around ``ratio``; on a bin, that bin and the next (the last pair at the end).

    Blending the two by distance gives the ratio back.

    Example:
        >>> bracket(0.12, (0.0, 0.1, 0.2, 0.3))
        (0.1, 0.2)
    """
    # A float32 table holds 0.3 as 0.30000001; without slack either side, 0.7 (0.69999999) would fall below its own bin.
    index = bisect.bisect_right(bins, ratio + 1e-6) - 1
    index = min(max(index, 0), len(bins) - 2)
    return bins[index], bins[index + 1]


def _exact(values: Sequence[Any]) -> Tensor:
    """Return numbers as a tensor in double precision on the CPU, whatever torch's defaults are set to."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Budget:
    """What a ratio table saves, as a share of what its blocks cost dense.

    Each site has a curve of costs over the bins, interpolated in between, so that the saving has a gradient in every ratio. Regions count
    as often as inference visits them. If a token costs the same everywhere, the saving is the mean ratio.

    Attributes:
        bins: Rising ratios, ``m`` of them.
        costs: What each site costs at each bin, ``l m``, falling along a row, in any unit.
        region_weights: How often inference visits each region, ``r``, summing to 1.
        max_ratio: Upper bound of every ratio.

    Example:
        >>> budget = Budget((0.0, 0.5, 1.0), torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, 0.0]]), torch.ones(1), 0.9)
        >>> round(float(budget.saving(torch.tensor([[0.3], [0.0]]))), 4)  # the first block is two thirds of the whole
        0.2
    """

    bins: tuple[float, ...]
    costs: Tensor
    region_weights: Tensor
    max_ratio: float

    @classmethod
    def of_tokens(cls, sites: int, bins: Sequence[float], region_weights: Tensor, max_ratio: float) -> Budget:
        """Return the budget in which every token of every block costs the same."""
        return cls(tuple(bins), (1.0 - _exact(bins)).expand(sites, -1), region_weights, max_ratio)

    @classmethod
    def of(cls, config: DiffCRConfig, costs: Tensor) -> Budget:
        """Return the budget of a configuration, for the measured or counted costs of its sites."""
        weights = _exact(config.region_weights or (1.0,) * config.timestep_regions)
        return cls(config.reachable_bins, costs.double().cpu(), weights / weights.sum(), config.max_ratio)

    def target(self, config: DiffCRConfig) -> float:
        """Return the saving a configuration aims at; its costs are shares of the dense model's."""
        if config.target_share is not None:
            return (1.0 - config.target_share) / float(self.costs[:, 0].sum())
        return self.uniform(config.target_ratio)

    def uniform(self, ratio: float) -> float:
        """Return the saving of one ratio everywhere."""
        return float(self.saving(_exact([[ratio] * len(self.region_weights)] * len(self.costs))))

    def saving(self, table: Tensor) -> Tensor:
        """Return the share of the blocks' dense cost that ratios ``l r`` save, a scalar with gradient."""
        savings, weights = self._savings(table), self.region_weights.to(table)
        return (savings * weights).sum()

    def slopes(self, table: Tensor) -> Tensor:
        """Return what a little more ratio saves at each entry, ``l r``, relative to a block of mean cost whose tokens all cost the same."""
        lower, upper, span = self._around(table)[1:]
        return (upper - lower) / span * len(table)

    def project(self, table: Tensor, saving: float) -> Tensor:
        """Return the table with the given saving and entries in ``[0, max_ratio]`` that one shift of all entries, clipped, leads to.

        Args:
            table: Ratios ``l r``.
            saving: Wanted saving; beyond what ``max_ratio`` everywhere saves, that is the result.

        Example:
            >>> budget = Budget.of_tokens(2, (0.0, 0.5, 1.0), torch.ones(1), 0.9)
            >>> budget.project(torch.tensor([[0.0], [0.4]]), 0.3)
            tensor([[0.1000],
                    [0.5000]])
        """
        values = table.detach().double().cpu()
        low, high = -float(values.max()) - self.max_ratio, 2 * self.max_ratio - float(values.min())
        for _ in range(50):  # the saving of the clipped shift rises with the shift: bisection halves the gap each time
            middle = (low + high) / 2
            if float(self.saving((values + middle).clamp(0.0, self.max_ratio))) < saving:
                low = middle
            else:
                high = middle
        return (values + (low + high) / 2).clamp(0.0, self.max_ratio).to(table)

    def dial(self, table: Tensor, saving: float) -> Tensor:
        """Return bins ``l r`` that save as near to ``saving`` as one turn of a dial over the table allows.

        Turning it shifts all ratios alike; each goes to its next bin as it passes the middle between two. More saving turns it further, so
        that no block ever runs on more tokens for it.

        Example:
            >>> budget = Budget.of_tokens(2, (0.0, 0.5, 1.0), torch.ones(1), 0.9)
            >>> budget.dial(torch.tensor([[0.0], [0.4]]), 0.3), budget.dial(torch.tensor([[0.0], [0.4]]), 0.5)
            (tensor([[0.0000],
                    [0.5000]]), tensor([[0.5000],
                    [0.5000]]))
        """
        values, bins = table.detach().double().cpu(), _exact(self.bins)
        turns = (bins[1:] + bins[:-1]) / 2 - values[..., None]  # l r m: how far each entry has to be shifted to leave a bin
        entries = torch.arange(values.numel(), device="cpu").repeat_interleave(len(bins) - 1)
        order = turns.flatten().argsort(stable=True)
        steps = self.costs.double().cpu().diff(dim=1).neg() / float(self.costs[:, 0].sum())
        gains = (steps[:, None, :] * self.region_weights.double()[:, None]).flatten()[order]
        reached = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
        passed = entries[order[: int((reached - saving).abs().argmin())]]
        return bins[torch.bincount(passed, minlength=values.numel())].reshape(values.shape).float()

    def round(self, table: Tensor) -> Tensor:
        """Round every ratio of ``l r`` to one of the two bins around it so that the saving is kept as well as bins allow.

        Entries start at their nearest bin; then those closest to the middle between their bins change sides, as long as that brings the
        saving nearer. Rounding each by itself misses the target by up to half a bin.

        Example:
            >>> Budget.of_tokens(2, (0.0, 0.1, 0.2), torch.ones(1), 0.2).round(torch.tensor([[0.04], [0.06]])).flatten().tolist()
            [0.0, 0.10000000149011612]
        """
        values = table.detach().double().cpu()
        pairs = [bracket(value, self.bins) for value in values.flatten().tolist()]
        lower, upper = _exact(pairs).reshape(*values.shape, 2).unbind(-1)
        rounded = torch.where(values - lower < upper - values, lower, upper)
        weights = self.region_weights.to(values)
        saved_lower, saved_upper = self._savings(lower) * weights, self._savings(upper) * weights
        excess = float(self.saving(rounded) - self.saving(values))
        # A ratio that lies on a bin is where it was asked to be; it does not move to repair others.
        free = torch.minimum((values - lower).abs(), (values - upper).abs()) >= 1e-6
        order = torch.argsort((values - (lower + upper) / 2).abs().flatten(), stable=True).tolist()
        for index in [divmod(i, values.shape[1]) for i in order]:
            rise = float(saved_upper[index] - saved_lower[index])
            change = -rise if rounded[index] == upper[index] else rise
            if free[index] and abs(excess + change) < abs(excess) - 1e-12:
                rounded[index] = lower[index] if rounded[index] == upper[index] else upper[index]
                excess += change
        return rounded.float()

    def _around(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return for each entry the bin below, what its site saves there and at the bin above, and how far apart the two are."""
        bins, costs = torch.tensor(self.bins, dtype=table.dtype, device=table.device), self.costs.to(table)
        savings = (costs[:, :1] - costs) / costs[:, 0].sum()
        below = (torch.bucketize(table.detach().contiguous(), bins, right=True) - 1).clamp(0, len(bins) - 2)
        return bins[below], savings.gather(1, below), savings.gather(1, below + 1), bins[below + 1] - bins[below]

    def _savings(self, table: Tensor) -> Tensor:
        """Return what each entry of ``l r`` would save if all regions ran its site like that."""
        bins, lower, upper, span = self._around(table)
        return lower + (upper - lower) * (table - bins) / span
