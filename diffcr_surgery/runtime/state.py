"""What a converted model carries under ``model.diffcr``: routers, ratio table, and the graphs made so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from diffcr_surgery._shards import assign_, whole
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import ConversionError, NonFiniteError
from diffcr_surgery.plan import SurgeryPlan
from diffcr_surgery.ratios import Budget, bracket
from diffcr_surgery.rewrite import Decision
from diffcr_surgery.router import Router
from diffcr_surgery.split import Splitting
from diffcr_surgery.trace.recording import Recordings

__all__ = ["Achieved", "DiffCRState"]


@dataclass(frozen=True)
class Achieved:
    """What a specialised model costs.

    Attributes:
        cost: What is counted: ``"tokens"`` of the routed blocks, or ``"flops"`` or ``"latency"`` of the model.
        share: Share of the dense cost that is left.
        requested: The share asked for; ``None`` if the trained table was taken as it is.
        ratio: Mean compression ratio, regions weighted.
    """

    cost: str
    share: float
    requested: float | None
    ratio: float

    def __str__(self) -> str:
        whole = "the routed blocks' tokens" if self.cost == "tokens" else f"the dense model's {self.cost}"
        asked = "" if self.requested is None else f", {self.requested:.3f} requested"
        return f"{self.share:.3f} of {whole}{asked}; mean ratio {self.ratio:.3f}"


class DiffCRState(nn.Module):
    """Routers, the ratio table ``l r``, and what inference does with them.

    Attributes:
        plan: The plan the model was converted by.
        routers: Row of the table, as a string -> :class:`Router`; of several sites that share one, the first's.
        ratio_table: The learnable ratios, one row a routed site, one column a timestep region, cleanest first.
        site_costs: Share of the dense model's cost that each site takes at each reachable bin, ``l m``.
        settled: Whether the table stands at bins, for what is left of training.
        achieved: What a specialised model costs, and was asked to.
        fixed: Of each region, at which bins the sites run, once :func:`diffcr_surgery.specialize_` has fixed them.
        splittings: What kind of call -> how calls like that are cut into samples.
    """

    def __init__(self, plan: SurgeryPlan) -> None:
        super().__init__()
        self.plan = plan
        self.fixed: tuple[tuple[Decision, ...], ...] | None = None
        self.achieved: Achieved | None = None
        self.settled = False
        self._moving: dict[str, bool] = {}
        self.recordings = Recordings()
        self.routers = nn.ModuleDict({str(i): Router(site.width) for i, site in enumerate(plan.routed_sites) if site.router == i})
        shape = (len(plan.routed_sites), plan.regions.count)
        start = torch.full(shape, float(self.config.initial_ratio), dtype=torch.float32)
        self.ratio_table = nn.Parameter(start, requires_grad=self.config.learn_ratios)
        self.site_costs: Tensor
        self.register_buffer("site_costs", torch.tensor(plan.site_costs, dtype=torch.float32))
        self.splittings: dict[frozenset[tuple[str, bool]], Splitting] = {}
        # Samples of each region since the last step of RatioOptimizer.
        self.visits = torch.zeros(plan.regions.count, dtype=torch.float32, device="cpu")
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

    def extra_repr(self) -> str:
        """Show what a specialised model was asked for and costs."""
        return "" if self.achieved is None else f"specialised: {self.achieved}"

    def graphs(self) -> list[fx.Graph]:
        """Return the routed graphs that have answered calls so far: ``print(model.diffcr.graphs()[-1])`` shows what is run."""
        return [graph for recording in self.recordings if recording.derived is not None for graph in recording.derived.graphs()]

    @property
    def config(self) -> DiffCRConfig:
        """Settings of the conversion."""
        return self.plan.config

    @property
    def specialized(self) -> bool:
        """Whether the ratios are fixed."""
        return self.fixed is not None

    def fix(self, ratios: Tensor, achieved: Achieved) -> None:
        """Run at these ratios ``l r`` from now on, all of them bins: kept counts no longer depend on any tensor."""
        fixed = tuple(tuple(Decision(self._bin(value)) for value in column) for column in ratios.T.tolist())
        self._moving = self._altered(ratios)
        self.ratio_table.requires_grad_(False)
        self.ratio_table.grad = None
        self.ratio_table.data.copy_(ratios)
        self.achieved = achieved
        self.fixed = fixed

    @property
    def budget(self) -> Budget:
        """What the ratios save."""
        return Budget.of(self.config, self.site_costs)

    @property
    def target_saving(self) -> float:
        """The share of the blocks' dense cost to be saved."""
        return self.budget.target(self.config)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DiffCRState:
        table, costs = self.ratio_table.data, self.site_costs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A ratio moves by thousandths a step; half precision would swallow that, so table and costs follow the device alone.
        if self.ratio_table.dtype != torch.float32:
            self.ratio_table.data = table.to(self.ratio_table.device)
            if self.ratio_table.grad is not None:
                self.ratio_table.grad.data = self.ratio_table.grad.data.float()
        if self.site_costs.dtype != torch.float32:
            self.site_costs = costs.to(self.site_costs.device)
        return self

    def ratios(self) -> Tensor:
        """Return the table as it counts, on the CPU: finite and within ``[0, max_ratio]``; the parameter itself is brought there.

        The bin above ``max_ratio``, where inference runs ratios close to it, is kept as well.

        Raises:
            NonFiniteError: If an entry is not finite.
        """
        values = whole(self.ratio_table.detach()).float().cpu()
        if not bool(values.isfinite().all()):
            rows = sorted({int(row) for row in (~values.isfinite()).nonzero()[:, 0]})
            names = [self.plan.routed_sites[row].path for row in rows]
            raise NonFiniteError(
                f"The ratios of {names} are not finite; the loss or the learning rate broke training. Load an earlier adapter."
            )
        if self.specialized:
            return values
        highest = self.config.reachable_bins[-1]  # above max_ratio if that lies between two bins; a table that has settled may stand there
        bounded = values.clamp(0.0, highest if self.settled else self.config.max_ratio)
        bounded = torch.where((values > bounded) & ((values - highest).abs() < 1e-6), highest, bounded)
        if not torch.equal(bounded, values):
            assign_(self.ratio_table.data, bounded)  # a projection after the step: clamping inside the graph would stop the gradient
        return bounded

    def executed_ratios(self) -> Tensor:
        """Return the ratios inference runs at, ``l r``: bins, rounded so that the weighted mean is kept."""
        values = self.ratios()
        if self.specialized:
            return values
        key = tuple(values.flatten().tolist())
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = (key, self.budget.round(values))
        return self._rounded[1]

    def decisions(self, region: int) -> tuple[Decision, ...]:
        """Return at which ratio or ratios each site runs in a region: two bins in training, one in inference."""
        if self.fixed is not None:
            return self.fixed[region]
        if not self.training or not self.config.learn_ratios:
            return tuple(Decision(self._bin(value)) for value in self.executed_ratios()[:, region].tolist())
        # At its upper bound a ratio lies between the last two bins in reach: beyond them short streams have no token left to give up.
        # A table that has settled needs no gradient, and runs as inference will: on the bin below, which the last one is with 1 behind it.
        bins = (*self.config.bins, *((1.0,) if self.config.bins[-1] < 1.0 else ())) if self.settled else self.config.reachable_bins
        return tuple(Decision(*bracket(value, bins)) for value in self.ratios()[:, region].tolist())

    def altered(self) -> Mapping[str, bool]:
        """Return path of each routed block -> whether it runs otherwise than the original's, in any region."""
        if self.fixed is None:
            return self._altered(self.ratios() if self.training else self.executed_ratios())
        return self._moving

    def _altered(self, ratios: Tensor) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for site, moves in zip(self.plan.routed_sites, ratios.gt(0).any(1).tolist(), strict=True):
            found[site.path] = found.get(site.path, False) or moves or self.config.gate == "sigmoid"
        return found

    def _bin(self, value: float) -> float:
        return min(self.config.bins, key=lambda b: abs(b - value))

    def saving(self) -> Tensor:
        """Return what the table saves, with gradient; what a step pushed out of range counts as the bound it crossed."""
        self.ratios()
        return self.budget.saving(whole(self.ratio_table))
