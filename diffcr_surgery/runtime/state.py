"""What a converted model carries under ``model.diffcr``: routers, ratio table, and the graphs made so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import ConversionError
from diffcr_surgery.plan import SurgeryPlan
from diffcr_surgery.ratios import bracket, round_to_bins, weighted_mean
from diffcr_surgery.rewrite import Decision
from diffcr_surgery.trace.recording import Recordings

__all__ = ["DiffCRState", "Router"]


class Router(nn.Module):
    """Scores how much each token needs the block: one linear map C -> 1 without bias, then a sigmoid (paper, section 3.1).

    Args:
        width: C.

    The weight starts at zero, so that all scores are 1/2 and the doubled gate is 1. It is no ``nn.Linear``: adapters that are added
    to every linear layer of a model pass it by.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores ``b n`` of tokens ``b n c``, in (0, 1) and float32."""
        return functional.linear(tokens, self.weight.to(tokens.dtype)).squeeze(-1).float().sigmoid()

    def extra_repr(self) -> str:
        """Show the width."""
        return f"width={self.weight.shape[1]}"


class DiffCRState(nn.Module):
    """Routers, the ratio table ``l r``, and what inference does with them.

    Attributes:
        plan: The plan the model was converted by.
        routers: Row of the table, as a string -> :class:`Router`.
        ratio_table: The learnable ratios, one row a routed site, one column a timestep region, cleanest first.
        specialized: Whether :func:`diffcr_surgery.specialize_` has fixed the ratios.
    """

    def __init__(self, plan: SurgeryPlan) -> None:
        super().__init__()
        self.plan = plan
        self.specialized = False
        self.recordings = Recordings()
        self.routers = nn.ModuleDict({str(i): Router(site.width) for i, site in enumerate(plan.routed_sites)})
        shape = (len(plan.routed_sites), plan.regions.count)
        self.ratio_table = nn.Parameter(torch.full(shape, float(self.config.initial_ratio)), requires_grad=self.config.learn_ratios)
        self._rounded: tuple[tuple[float, ...], Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to be run as a layer.

        Raises:
            ConversionError: Always.
        """
        raise ConversionError(
            f"The forward of {self.plan.model_class} runs over all of its children, and now over model.diffcr too, which is no layer. Let "
            "it hold its layers in a ModuleList or Sequential of their own, and convert it then."
        )

    @property
    def config(self) -> DiffCRConfig:
        """Settings of the conversion."""
        return self.plan.config

    @property
    def region_weights(self) -> Tensor:
        """How often inference visits each region, ``r``, summing to 1."""
        return torch.full((self.plan.regions.count,), 1.0 / self.plan.regions.count)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DiffCRState:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A ratio moves by thousandths a step; half precision would swallow that, so the table follows the device alone.
        if self.ratio_table.dtype != torch.float32:
            self.ratio_table.data = self.ratio_table.data.float()
        return self

    def ratios(self) -> Tensor:
        """Return the table as it counts, on the CPU: finite and within ``[0, max_ratio]``; the parameter itself is brought there.

        Raises:
            ConversionError: If an entry is not finite.
        """
        table = self.ratio_table.detach()
        values = table.cpu()
        if not bool(values.isfinite().all()):
            rows = sorted({int(row) for row in (~values.isfinite()).nonzero()[:, 0]})
            names = [self.plan.routed_sites[row].path for row in rows]
            raise ConversionError(
                f"The ratios of {names} are not finite; the loss or the learning rate broke training. Load an earlier adapter."
            )
        bounded = values.clamp(0.0, self.config.max_ratio)
        if not torch.equal(bounded, values):
            self.ratio_table.data.copy_(bounded)  # a projection after the step: clamping inside the graph would stop the gradient
        return bounded

    def executed_ratios(self) -> Tensor:
        """Return the ratios inference runs at, ``l r``: bins, rounded so that the weighted mean is kept."""
        values = self.ratios()
        key = tuple(values.flatten().tolist())
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = (key, round_to_bins(values, self.config.bins, self.region_weights))
        return self._rounded[1]

    def decisions(self, region: int) -> tuple[Decision, ...]:
        """Return at which ratio or ratios each site runs in a region: two bins in training, one in inference."""
        if not self.training or self.specialized or not self.config.learn_ratios:
            return tuple(Decision(self._bin(value)) for value in self.executed_ratios()[:, region].tolist())
        # At its upper bound a ratio lies between the last two bins in reach; beyond it there is nothing to learn from.
        top = next(i for i, b in enumerate(self.config.bins) if b >= self.config.max_ratio - 1e-6)
        bins = self.config.bins[: max(top, 1) + 1]
        return tuple(Decision(*bracket(value, bins)) for value in self.ratios()[:, region].tolist())

    def _bin(self, value: float) -> float:
        return min(self.config.bins, key=lambda b: abs(b - value))

    def mean_ratio(self) -> Tensor:
        """Return the weighted mean of the table, with gradient; what a step pushed out of range counts as the bound it crossed."""
        self.ratios()
        return weighted_mean(self.ratio_table, self.region_weights)
