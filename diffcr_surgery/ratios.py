"""Arithmetic of compression ratios: bins, brackets, rounding and projection that keep the mean."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Bracket", "bracket", "project_to_mean", "round_to_bins", "weighted_mean"]


class Bracket(NamedTuple):
    """The two bins around a ratio: ``lower <= ratio <= upper``; blending them by distance gives the ratio back."""

    lower: float
    upper: float


def bracket(ratio: float, bins: Sequence[float]) -> Bracket:
    """Return the two neighbouring bins around ``ratio``; on a bin, that bin and the next (the last pair at the end).

    Example:
        >>> bracket(0.12, (0.0, 0.1, 0.2, 0.3))
        Bracket(lower=0.1, upper=0.2)
    """
    # A float32 table holds 0.3 as 0.30000001; without slack either side, 0.7 (0.69999999) would fall below its own bin.
    index = bisect.bisect_right(bins, ratio + 1e-6) - 1
    index = min(max(index, 0), len(bins) - 2)
    return Bracket(bins[index], bins[index + 1])


def weighted_mean(table: Tensor, region_weights: Tensor) -> Tensor:
    """Return the mean ratio, ``l r`` with weights ``r`` that sum to 1 -> scalar; every layer counts alike."""
    return (table * region_weights.to(table)).sum(1).mean()


def round_to_bins(table: Tensor, bins: Sequence[float], region_weights: Tensor) -> Tensor:
    """Round every ratio to one of the two bins around it so that the weighted mean is kept as well as bins allow.

    Entries start at their nearest bin; then those closest to the middle between their bins change sides, as long as that
    brings the mean nearer. Rounding each by itself misses the target by up to half a bin.

    Args:
        table: Ratios ``l r``.
        bins: Rising ratios.
        region_weights: How often inference visits each region, ``r``, summing to 1.

    Example:
        >>> round_to_bins(torch.tensor([[0.04], [0.06]]), (0.0, 0.1), torch.ones(1)).flatten().tolist()
        [0.0, 0.10000000149011612]
    """
    values = table.detach().double().cpu()
    pairs = [bracket(value, bins) for value in values.flatten().tolist()]
    lower = torch.tensor([p.lower for p in pairs], dtype=torch.float64)
    upper = torch.tensor([p.upper for p in pairs], dtype=torch.float64)
    flat = values.flatten()
    nearest = torch.where(flat - lower < upper - flat, lower, upper)
    weights = region_weights.double().cpu().expand_as(values).flatten() / values.shape[0]
    excess = float(((nearest - flat) * weights).sum())
    order = torch.argsort((flat - (lower + upper) / 2).abs(), stable=True).tolist()
    for index in order:
        flipped = lower[index] if nearest[index] == upper[index] else upper[index]
        change = float((flipped - nearest[index]) * weights[index])
        # A ratio that lies on a bin is where it was asked to be; it does not move to repair others.
        on_bin = min(abs(float(flat[index] - lower[index])), abs(float(flat[index] - upper[index]))) < 1e-6
        if not on_bin and abs(excess + change) < abs(excess) - 1e-12:
            nearest[index] = flipped
            excess += change
    return nearest.reshape(values.shape).to(torch.float32)


def project_to_mean(table: Tensor, mean: float, max_ratio: float, region_weights: Tensor) -> Tensor:
    """Return the nearest table with the given weighted mean and entries in ``[0, max_ratio]``: one shift, clipped.

    Args:
        table: Ratios ``l r``.
        mean: Wanted weighted mean, in ``[0, max_ratio]``.
        max_ratio: Upper bound.
        region_weights: Weights ``r``, summing to 1.

    Example:
        >>> project_to_mean(torch.tensor([[0.0], [0.4]]), 0.3, 0.9, torch.ones(1))
        tensor([[0.1000],
                [0.5000]])
    """
    values = table.detach().double()
    low, high = -float(values.max()) - max_ratio, max_ratio - float(values.min()) + max_ratio
    for _ in range(60):  # the mean of the clipped shift rises with the shift: bisection halves the gap each time
        middle = (low + high) / 2
        if float(weighted_mean((values + middle).clamp(0.0, max_ratio), region_weights.double())) < mean:
            low = middle
        else:
            high = middle
    return (values + (low + high) / 2).clamp(0.0, max_ratio).to(table.dtype)
