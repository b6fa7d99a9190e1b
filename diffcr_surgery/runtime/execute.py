"""Answer a call of a converted model: region of each sample, recording, routed graph, and the rows back in order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffcr_surgery._shards import is_sharded, several_processes
from diffcr_surgery._tree import fill
from diffcr_surgery.caches import check_caches
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.costs import site_costs
from diffcr_surgery.errors import AlignmentError, ConfigError, TimestepError
from diffcr_surgery.plan import SurgeryPlan, routed_call
from diffcr_surgery.rewrite import Decision, FuseSites, RewriteResult, RoutedCall, RouteTokens, ScatterInPlace, ShareGathers
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.samples import find_splitting
from diffcr_surgery.sites import site_calls
from diffcr_surgery.split import join, kind_of_call, refused, select
from diffcr_surgery.tokens import staying_count
from diffcr_surgery.trace.key import Call, model_device
from diffcr_surgery.trace.recorder import rng_state
from diffcr_surgery.trace.recording import Recording, compile_graph
from diffcr_surgery.trace.undisturbed import set_rng_state

__all__ = ["Prepared", "Step", "answer", "costs_of", "prepare"]

MAX_GRAPHS = 64
_SPLITTING = threading.RLock()


@dataclass(frozen=True)
class Step:
    """A routed graph as a Python function, with what to call it on.

    Attributes:
        graph: The graph.
        run: The function; ``torch.compile`` finds no Python decision in it.
        inputs: The model, its input tensors, and values the recording or the rewrite added.
        recording: What the graph was made of; it knows the structure of the output, and whether ``run`` may be stopped by a guard.
    """

    graph: fx.Graph
    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    recording: Recording


class _Routed:
    """The routed forms of one recording, by decision."""

    def __init__(self, recording: Recording, plan: SurgeryPlan) -> None:
        self.recording = recording
        self.regions = plan.regions.count
        self.calls = _aligned(recording, plan)
        self._lock = threading.RLock()
        self._forms: OrderedDict[tuple[tuple[Decision, ...], bool, bool], tuple[Callable[..., Any], RewriteResult]] = OrderedDict()

    def step(self, model: torch.nn.Module, state: DiffCRState, part: _Part) -> Step:
        """Return the graph for the decisions of a part, made now if need be."""
        run, result = self._form(part.decisions, state.specialized, state.specialized and not torch.is_grad_enabled())
        extra: list[Any] = [torch.tensor(part.regions, device=state.ratio_table.device)] if result.takes_region else []
        extra += [model] if result.takes_model else []
        return Step(result.graph, run, (model, *part.call.tensors, *self.recording.constants, *extra), self.recording)

    def graphs(self) -> list[fx.Graph]:
        """Return the graphs run so far, the last one last."""
        return [result.graph for _, result in list(self._forms.values())]

    def _form(self, decisions: tuple[Decision, ...], fixed: bool, in_place: bool) -> tuple[Callable[..., Any], RewriteResult]:
        key = (decisions, fixed, in_place)
        with self._lock:
            if key not in self._forms:
                result = RouteTokens(self.calls, dict(enumerate(decisions)), self.recording.blocks, checked=not fixed)(self.recording.graph)
                for wanted, rewrite in ((fixed, ShareGathers()), (fixed, FuseSites()), (in_place, ScatterInPlace())):
                    if wanted:
                        rewrite(result.graph)
                self._forms[key] = (compile_graph(result.graph), result)
                while len(self._forms) > max(MAX_GRAPHS, 2 * self.regions):  # no region of a specialised model is ever made twice
                    self._forms.popitem(last=False)
            self._forms.move_to_end(key)
            return self._forms[key]


def _aligned(recording: Recording, plan: SurgeryPlan) -> dict[Any, RoutedCall]:
    """Align a recording with the plan's sites: what was proven is proven anew where the shapes differ."""
    rows = {(site.path, site.occurrence): (row, site) for row, site in enumerate(plan.routed_sites)}
    calls = site_calls(recording, {(site.path, site.occurrence): site.hint for site in plan.sites})
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
        routed[call.node] = routed_call(recording, call, row, site.router, plan.config)
    lost = [site for site in plan.routed_sites if site.path in recording.ran - {call.path for call in calls}]
    if lost:
        raise AlignmentError(
            f"{lost[0].path} ({lost[0].block_class}) was planned as routed, but in this call it does not do what a block does, attention "
            "and an MLP that take a stream of tokens and return one alike. Restore the model and plan with inputs like these, or leave the "
            "block out with DiffCRConfig(blocks=...)."
        )
    _check_routers(routed.values())
    return routed


def _check_routers(calls: Iterable[RoutedCall]) -> None:
    rows = {call.index: call for call in calls}
    for call in rows.values():
        first = rows.get(call.router, call)  # a call may leave a block out; then the next one's stream is scored
        if (call.tokens, call.staying) != (first.tokens, first.staying):
            raise AlignmentError(
                f"{call.path} was planned to share the routing of {first.path}, but in this call other tokens of theirs may bypass: "
                f"{first.tokens - staying_count(first.staying)} there, {call.tokens - staying_count(call.staying)} here. Plan with inputs "
                "like these, or with share_routing=1."
            )


@dataclass(frozen=True)
class _Part:
    """Samples of a call that run together."""

    call: Call
    decisions: tuple[Decision, ...]
    regions: list[int]
    rows: list[int]


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
    parts, lists = _cut(model, state, call, forward)
    outputs = []
    for part in parts:

        def use(recording: Recording, part: _Part = part) -> Any:
            step = _routed(recording, state).step(model, state, part)
            return recording.execute(step.run, step.inputs)

        outputs.append(state.recordings.answer(model, part.call, forward, use))
    result = _together(outputs, parts, lists)
    if state.training and torch.is_grad_enabled():
        regions = [region for part in parts for region in part.regions * (len(part.rows) // len(part.regions))]
        state.visits = state.visits + torch.bincount(torch.tensor(regions, device="cpu"), minlength=len(state.visits))
    return result


@dataclass(frozen=True)
class Prepared:
    """A call in which nothing is left to decide.

    Attributes:
        steps: The graphs to run, one for each part of the call.
        gradients: Whether gradients are on.
        finish: Makes the call's result of what they return.
        rewind: Undoes what was done when a guard has stopped the step with this number; its recording is tried last from now on.
    """

    steps: list[Step]
    gradients: bool
    finish: Callable[[list[Any]], Any]
    rewind: Callable[[int], None]


def prepare(model: torch.nn.Module, state: DiffCRState, call: Call, forward: Callable[..., Any]) -> Prepared:
    """Return what :func:`answer` would run, not run yet."""
    parts, lists = _cut(model, state, call, forward)
    steps = []
    for part in parts:

        def use(recording: Recording, part: _Part = part) -> Step:
            return _routed(recording, state).step(model, state, part)

        steps.append(state.recordings.answer(model, part.call, forward, use))
    device = model_device(model, call.tensors)
    random = rng_state(device) if any(step.recording.guarded for step in steps) else None

    def finish(values: list[Any]) -> Any:
        return _together([fill(step.recording.output, value) for step, value in zip(steps, values, strict=True)], parts, lists)

    def rewind(stopped: int) -> None:
        state.recordings.postpone(steps[stopped].recording)
        if random is not None:
            set_rng_state(random, device)

    return Prepared(steps, torch.is_grad_enabled(), finish, rewind)


def _cut(model: torch.nn.Module, state: DiffCRState, call: Call, forward: Callable[..., Any]) -> tuple[list[_Part], frozenset[str]]:
    """Cut a call into the parts that run together; with them go the paths of output lists that hold one entry a sample."""
    regions = state.plan.regions.of_call(model, call.arguments)
    if len(set(regions)) > 1 and several_processes() and is_sharded(model):
        raise TimestepError(
            f"This call's samples lie in the regions {sorted(set(regions))}, and their blocks run once for each. With sharded weights "
            "every process has to call every block equally often, or all wait for each other forever; draw the timesteps of a batch from "
            "one region, as RegionSampler does, the same in every process."
        )
    cache = {region: state.decisions(region) for region in set(regions)}
    groups: dict[tuple[tuple[Decision, ...], int | None], list[int]] = {}
    for row, region in enumerate(regions):
        # Where a block's samples are others than the call's, one run can blend at one region's ratios alone.
        apart = state.plan.folded and any(decision.upper is not None for decision in cache[region])
        groups.setdefault((cache[region], region if apart else None), []).append(row)
    check_caches(model, state.altered(), len(groups))
    if len(groups) == 1:
        return [_Part(call, cache[regions[0]], _once(regions), list(range(len(regions))))], frozenset()
    with _SPLITTING:  # one thread finds it, the others wait
        kind = kind_of_call(call, len(regions))
        splitting = state.splittings.get(kind)
        if splitting is None:  # the first of its kind: it is run on samples alone
            splitting = find_splitting(model, forward, call, len(regions))
            if not splitting.refusal:  # which may be this call's alone
                state.splittings[kind] = splitting
    if splitting.refusal:
        raise refused(splitting.refusal)
    parts = [
        _Part(select(call, rows, len(regions), splitting.shared), decisions, _once([regions[row] for row in rows]), rows)
        for (decisions, _), rows in groups.items()
    ]
    return parts, splitting.lists


def _once(regions: list[int]) -> list[int]:
    """Return one entry where all samples share their region: it stands for any number of samples, on whatever axis a block has them."""
    return regions[:1] if len(set(regions)) == 1 else regions


def _together(outputs: list[Any], parts: list[_Part], lists: frozenset[str]) -> Any:
    return outputs[0] if len(parts) == 1 else join(outputs, [part.rows for part in parts], lists)


def costs_of(
    model: torch.nn.Module, state: DiffCRState, call: Call, forward: Callable[..., Any], config: DiffCRConfig
) -> tuple[tuple[float, ...], ...]:
    """Count or measure what each site costs on other inputs, or in another unit, than planning did; see :func:`site_costs`."""

    def use(recording: Recording) -> tuple[tuple[float, ...], ...]:
        calls = _routed(recording, state).calls
        present = {routed.index for routed in calls.values()}
        missing = sorted({site.path for row, site in enumerate(state.plan.routed_sites) if row not in present})
        if missing:
            raise ConfigError(
                f"example_inputs leave out the blocks {missing}, so what they cost is not known; give inputs of a whole call."
            )
        return site_costs(model, recording, call, calls, config)

    with torch.no_grad():
        return state.recordings.answer(model, call, forward, use)


def _routed(recording: Recording, state: DiffCRState) -> _Routed:
    if recording.derived is None:
        recording.derived = _Routed(recording, state.plan)
    return recording.derived  # type: ignore[no-any-return]
