"""What a site costs at each ratio: counted in FLOPs, or measured in seconds on the model's device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import ConfigError
from diffcr_surgery.flops import flop_counter
from diffcr_surgery.rewrite import Decision, RoutedCall, RouteTokens
from diffcr_surgery.router import Router
from diffcr_surgery.trace.key import Call, model_device
from diffcr_surgery.trace.recording import Recording
from diffcr_surgery.trace.undisturbed import undisturbed

__all__ = ["site_costs"]

ROUNDS = 5  # of latency, the first of them thrown away; medians are taken over the rest and over like sites


def site_costs(
    model: torch.nn.Module, recording: Recording, call: Call, routed: Mapping[fx.Node, RoutedCall], config: DiffCRConfig
) -> tuple[tuple[float, ...], ...]:
    """Return the share of the dense model's cost that each site takes at each reachable bin, ``l m``, never rising with the ratio.

    ``"flops"`` costs one forward a bin, ``"latency"`` five, all on the example inputs; a site's cost counts its router, its gathers and its
    scatter too. ``"tokens"`` runs nothing: all blocks share the cost alike, and nothing outside them has any.

    Args:
        model: The model.
        recording: Its recording on ``call``.
        call: The example call.
        routed: Block node -> how it is routed.
        config: Settings: ``cost`` and the bins.
    """
    bins = config.reachable_bins
    if config.cost == "tokens":
        return tuple(tuple((1.0 - ratio) / len(routed) for ratio in bins) for _ in routed)
    readings: dict[float, list[dict[int | None, float]]] = {ratio: [] for ratio in bins}
    with torch.no_grad(), undisturbed(model, model_device(model, call.tensors)) as rewind:
        for _ in range(ROUNDS if config.cost == "latency" else 1):
            for ratio, taken in readings.items():  # bins take turns, so that whatever slows the machine down slows all of them down
                taken.append(_read(model, recording, call.tensors, routed, ratio, config.cost))
                rewind()
    dense = statistics.median(sum(reading.values()) for reading in readings[0.0][-ROUNDS + 1 :])
    free = [site.path for site in routed.values() if not readings[0.0][-1].get(site.index)]
    if free:
        raise ConfigError(
            f'cost="{config.cost}" counts nothing in {free[:3]}: torch has no formula for the operations the blocks run. Use cost="tokens" '
            'or "latency".'
        )
    groups = {site.index: (recording.blocks[node].kind, site.tokens, site.staying) for node, site in routed.items()}
    curves = []
    for index in sorted(groups):
        alike = [other for other, group in groups.items() if group == groups[index]]
        costs = [statistics.median(reading.get(i, 0.0) for reading in taken[-ROUNDS + 1 :] for i in alike) for taken in readings.values()]
        curves.append(tuple(cost / dense for cost in accumulate(costs, min)))  # noise must not make a higher ratio look dearer
    return tuple(curves)


def _read(
    model: torch.nn.Module,
    recording: Recording,
    tensors: Sequence[torch.Tensor],
    routed: Mapping[fx.Node, RoutedCall],
    ratio: float,
    cost: str,
) -> dict[int | None, float]:
    """Return what each site cost in one run with all of them at ``ratio``; under ``None``, everything else."""
    decisions = {site.index: Decision(ratio) for site in routed.values()}
    blocks = {node: replace(block, checkpointed=False) for node, block in recording.blocks.items()}
    result = RouteTokens(routed, decisions, blocks)(recording.graph)
    inputs = [*tensors, *recording.constants]
    if cost == "latency":
        device = model_device(model, tensors)
        meter = _Meter(model, result.graph, lambda: _clock(device))
        meter.run(*inputs)
    else:
        with flop_counter() as counter:
            meter = _Meter(model, result.graph, lambda: float(counter.get_total_flops()))
            meter.run(*inputs)
    meter.settle(None)
    return meter.spent


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Meter(fx.Interpreter):
    """Runs a routed graph, and reads a meter wherever a site begins or ends."""

    def __init__(self, model: torch.nn.Module, graph: fx.Graph, read: Callable[[], float]) -> None:
        super().__init__(model, graph=graph)
        self.read = read
        self.site: int | None = None
        self.last = read()
        self.spent: dict[int | None, float] = {}

    def settle(self, site: int | None) -> None:
        """Put what was spent since the last reading down to the site that was running, and go on to the next."""
        now = self.read()
        self.spent[self.site] = self.spent.get(self.site, 0.0) + now - self.last
        self.last, self.site = now, site

    def run_node(self, n: fx.Node) -> Any:
        site = n.meta.get("site")
        if site != self.site:
            self.settle(site)
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target).startswith("diffcr.routers."):  # the model has none yet
            with args[0].device:
                return Router(args[0].shape[-1])(*args)
        return super().call_module(target, args, kwargs)
