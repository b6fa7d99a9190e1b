"""Answer a call of a converted model: region of each sample, recording, routed graph, and the rows back in order."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from diffcr_surgery._tree import fill, flatten, map_leaves
from diffcr_surgery.errors import AlignmentError, TimestepError
from diffcr_surgery.plan import SurgeryPlan, routed_call
from diffcr_surgery.rewrite import Decision, RewriteResult, RoutedCall, RouteTokens, ScatterInPlace
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.sites import site_calls
from diffcr_surgery.trace.key import Call
from diffcr_surgery.trace.recording import Recording, compile_graph

__all__ = ["answer"]

MAX_GRAPHS = 64


class _Routed:
    """The routed forms of one recording, by decision."""

    def __init__(self, recording: Recording, plan: SurgeryPlan) -> None:
        self.recording = recording
        self.calls = _aligned(recording, plan)
        self._forms: OrderedDict[tuple[tuple[Decision, ...], bool], tuple[Callable[..., Any], RewriteResult]] = OrderedDict()

    def run(
        self, model: torch.nn.Module, state: DiffCRState, tensors: list[torch.Tensor], decisions: tuple[Decision, ...], regions: list[int]
    ) -> Any:
        in_place = state.specialized and not torch.is_grad_enabled()
        form = self._forms.get((decisions, in_place))
        if form is None:
            result = RouteTokens(self.calls, dict(enumerate(decisions)), self.recording.blocks)(self.recording.graph)
            if in_place:
                ScatterInPlace()(result.graph)
            form = self._forms[decisions, in_place] = (compile_graph(result.graph), result)
            while len(self._forms) > MAX_GRAPHS:
                self._forms.popitem(last=False)
        run, result = form
        extra: list[Any] = [torch.tensor(regions, device=state.ratio_table.device)] if result.takes_region else []
        extra += [model] if result.takes_model else []
        return self.recording.execute(run, model, tensors, extra)


def _aligned(recording: Recording, plan: SurgeryPlan) -> dict[Any, RoutedCall]:
    """Align a recording with the plan's sites: what was proven is proven anew where the shapes differ."""
    rows = {(site.path, site.occurrence): (row, site) for row, site in enumerate(plan.routed_sites)}
    calls = site_calls(recording, {key: dict(site.aligned) for key, (_, site) in rows.items()})
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
        routed[call.node] = routed_call(recording, call, row, plan.config.gate)
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
    groups: dict[tuple[Decision, ...], list[int]] = {}
    cache = {region: state.decisions(region) for region in set(regions)}
    for row, region in enumerate(regions):
        groups.setdefault(cache[region], []).append(row)
    if len(groups) == 1:
        ((decisions, _),) = groups.items()
        same = len(set(regions)) == 1
        return _run(model, state, call, forward, decisions, regions[:1] if same else regions)
    parts = []
    for decisions, rows in groups.items():
        part = _select(call, rows, len(regions), state.plan.shared_inputs)
        parts.append(_run(model, state, part, forward, decisions, [regions[row] for row in rows]))
    return _join(parts, list(groups.values()))


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


def _select(call: Call, rows: list[int], batch: int, shared: frozenset[str]) -> Call:
    """Return the call with the given samples alone."""
    index = torch.tensor(rows)
    memo: dict[int, torch.Tensor] = {}
    chosen = []
    for path, t in zip(call.paths, call.tensors, strict=True):
        if path not in shared and t.ndim and t.shape[0] == batch:
            memo.setdefault(id(t), t.index_select(0, index.to(t.device)))
        chosen.append(memo.get(id(t), t))
    if all(new is old for new, old in zip(chosen, call.tensors, strict=True) if new.ndim > 1 and new.is_floating_point()):
        raise TimestepError(
            "The samples of this call lie in several timestep regions, and none of its inputs can be split into samples (a packed "
            "sequence, or a list): batch axis 0 is what a split goes by. Call the model once for each region, or use timestep_regions=1."
        )
    other = {id(old): new for old, new in zip(call.tensors, chosen, strict=True)}

    def swap(_: str, leaf: Any) -> Any:
        return other.get(id(leaf), leaf)

    args, kwargs = map_leaves((call.args, call.kwargs), swap)
    return dataclasses.replace(call, arguments=map_leaves(call.arguments, swap), args=args, kwargs=kwargs, tensors=chosen)


def _join(parts: list[Any], groups: list[list[int]]) -> Any:
    """Put the rows of the groups' outputs back in order."""
    order = torch.tensor([row for rows in groups for row in rows]).argsort()
    flattened = [flatten(part) for part in parts]
    joined = []
    for tensors in zip(*(tensors for _, tensors, _ in flattened), strict=True):
        batched = all(t.ndim and t.shape[0] == len(rows) for t, rows in zip(tensors, groups, strict=True))
        joined.append(torch.cat(tensors).index_select(0, order.to(tensors[0].device)) if batched else tensors[0])
    return fill(flattened[0][2], joined)
