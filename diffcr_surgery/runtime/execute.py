"""Answer a call of a converted model: region of each sample, recording, routed graph, and the rows back in order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from diffcr_surgery._shards import is_sharded, several_processes
from diffcr_surgery.errors import AlignmentError, TimestepError
from diffcr_surgery.plan import SurgeryPlan, routed_call
from diffcr_surgery.rewrite import Decision, RewriteResult, RoutedCall, RouteTokens, ScatterInPlace
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.samples import find_splitting
from diffcr_surgery.sites import site_calls
from diffcr_surgery.split import given, join, refused, select
from diffcr_surgery.trace.key import Call
from diffcr_surgery.trace.recording import Recording, compile_graph

__all__ = ["answer"]

MAX_GRAPHS = 64


class _Routed:
    """The routed forms of one recording, by decision."""

    def __init__(self, recording: Recording, plan: SurgeryPlan) -> None:
        self.recording = recording
        self.calls = _aligned(recording, plan)
        self._forms: OrderedDict[tuple[tuple[Decision, ...], bool, bool], tuple[Callable[..., Any], RewriteResult]] = OrderedDict()

    def run(
        self, model: torch.nn.Module, state: DiffCRState, tensors: list[torch.Tensor], decisions: tuple[Decision, ...], regions: list[int]
    ) -> Any:
        in_place = state.specialized and not torch.is_grad_enabled()
        key = (decisions, in_place, state.specialized)
        form = self._forms.get(key)
        if form is None:
            result = RouteTokens(self.calls, dict(enumerate(decisions)), self.recording.blocks, checked=not state.specialized)(
                self.recording.graph
            )
            if in_place:
                ScatterInPlace()(result.graph)
            form = self._forms[key] = (compile_graph(result.graph), result)
            while len(self._forms) > MAX_GRAPHS:
                self._forms.popitem(last=False)
        self._forms.move_to_end(key)
        run, result = form
        extra: list[Any] = [torch.tensor(regions, device=state.ratio_table.device)] if result.takes_region else []
        extra += [model] if result.takes_model else []
        return self.recording.execute(run, model, tensors, extra)


def _aligned(recording: Recording, plan: SurgeryPlan) -> dict[Any, RoutedCall]:
    """Align a recording with the plan's sites: what was proven is proven anew where the shapes differ."""
    rows = {(site.path, site.occurrence): (row, site) for row, site in enumerate(plan.routed_sites)}
    calls = site_calls(recording, {(site.path, site.occurrence): site.hint for site in plan.sites if site.hint is not None})
    routed: dict[Any, RoutedCall] = {}
    for call in calls:
        if (call.path, call.occurrence) not in rows:
            continue
        row, site = rows[call.path, call.occurrence]
        if not call.alignment.routable and call.alignment.tokens == 1:
            continue  # one token is always kept, so there is nothing to route
        if not call.alignment.routable:
            raise AlignmentError(
                f"{call.path} ({site.block_class}) was planned as routed, but with the arguments of this call it cannot be: "
                f"{call.alignment.reason}. Restore the model and plan with inputs like these, or leave the block out with "
                "DiffCRConfig(blocks=...)."
            )
        routed[call.node] = routed_call(recording, call, row, plan.config)
    return routed


def answer(model: torch.nn.Module, state: DiffCRState, call: Call, forward: Callable[..., Any]) -> Any:
    """Return what the converted model returns for ``call``.

    Samples in regions with the same decisions run together; those with others run apart, so that the result equals
    running every sample alone.

    Args:
        model: The converted model.
        state: Its ``diffcr``.
        call: The call.
        forward: The original class's forward, bound to the model.
    """
    regions = state.plan.regions.of_call(model, call.arguments)
    if len(set(regions)) > 1 and several_processes() and is_sharded(model):
        raise TimestepError(
            f"This call's samples lie in the regions {sorted(set(regions))}, and their blocks run once for each. With sharded weights "
            "every process has to call every block equally often, or all wait for each other forever; draw the timesteps of a batch from "
            "one region, as RegionSampler does, the same in every process."
        )
    if state.training and torch.is_grad_enabled():
        state.visits += torch.bincount(torch.tensor(regions), minlength=len(state.visits))
    cache = {region: state.decisions(region) for region in set(regions)}
    groups: dict[tuple[tuple[Decision, ...], int | None], list[int]] = {}
    for row, region in enumerate(regions):
        # Where a block's samples are others than the call's, one run can blend at one region's ratios alone.
        apart = state.plan.folded and any(decision.upper is not None for decision in cache[region])
        groups.setdefault((cache[region], region if apart else None), []).append(row)
    if len(groups) == 1:
        same = len(set(regions)) == 1
        return _run(model, state, call, forward, cache[regions[0]], regions[:1] if same else regions)
    splitting = state.splittings.get(given(call))
    if splitting is None:  # the first of its kind: it is run on samples alone
        splitting = state.splittings[given(call)] = find_splitting(model, forward, call, len(regions))
    if splitting.refusal:
        raise refused(splitting.refusal)
    parts = []
    for (decisions, _), rows in groups.items():
        part = select(call, rows, len(regions), splitting.shared)
        parts.append(_run(model, state, part, forward, decisions, [regions[row] for row in rows]))
    return join(parts, list(groups.values()), splitting.lists or frozenset())


def _run(
    model: torch.nn.Module,
    state: DiffCRState,
    call: Call,
    forward: Callable[..., Any],
    decisions: tuple[Decision, ...],
    regions: list[int],
) -> Any:
    def use(recording: Recording) -> Any:
        if recording.derived is None:
            recording.derived = _Routed(recording, state.plan)
        return recording.derived.run(model, state, call.tensors, decisions, regions)

    return state.recordings.answer(model, call, forward, use)
