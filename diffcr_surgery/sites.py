"""Find and align the sites of a recording: detect and align, joined along the dataflow."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from diffcr_surgery._shards import is_sharded
from diffcr_surgery._tree import Leaf, flatten, leaves_of
from diffcr_surgery.align import Alignment, align_block
from diffcr_surgery.align.layout import Layouts
from diffcr_surgery.align.planned import align_as_planned
from diffcr_surgery.align.residual import has_no_residual
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.detect import Lineage, latent_inputs, named_leaves, residual_after, sources_of, spans
from diffcr_surgery.errors import PatternError, SurgeryError
from diffcr_surgery.patterns import BlockPattern, pattern_of
from diffcr_surgery.tokens import Spans
from diffcr_surgery.trace.key import device_of
from diffcr_surgery.trace.recorder import rng_state
from diffcr_surgery.trace.recording import BlockCall, Flow, Recording
from diffcr_surgery.trace.undisturbed import set_rng_state

__all__ = ["Hint", "SiteCall", "site_calls"]

Hint = tuple[Alignment, bool]  # what was proven of a site before, and whether its residual is added after the block


@dataclass(frozen=True)
class SiteCall:
    """One block call of a recording.

    Attributes:
        node: Its node.
        path: Module path of the block.
        occurrence: 0 for the first call of that module, 1 for the second, ...
        alignment: What the proof found.
        staying: Tokens of the stream that never bypass, since they do not stem from the latent.
        outside: Whether the residual is added after the block.
    """

    node: fx.Node
    path: str
    occurrence: int
    alignment: Alignment
    staying: Spans = ()
    outside: bool = False


def site_calls(recording: Recording, hints: Mapping[tuple[str, int], Hint] | None = None) -> list[SiteCall]:
    """Align every block call of a recording, one proof per distinct kind; the recording's samples are dropped afterwards.

    Random state is as before afterwards: a block may draw from it in every trial.

    Args:
        recording: A fresh recording.
        hints: (path, occurrence) -> what was proven before: tried first, and taken over where the block is sharded, since no process has
            the weights to prove it anew.

    Raises:
        PatternError: If a registered pattern is contradicted by the proof.
    """
    if recording.flow is None:
        raise SurgeryError("This recording was aligned before; record the model anew.")
    tensors = (t for sample in recording.samples.values() for t in flatten((sample.args, sample.kwargs))[1])
    device = device_of(tensors)
    start = rng_state(device)
    try:
        return _site_calls(recording, recording.flow, hints or {})
    finally:
        set_rng_state(start, device)


def _site_calls(recording: Recording, flow: Flow, hints: Mapping[tuple[str, int], Hint]) -> list[SiteCall]:
    lineage = Lineage(latent_inputs(flow.graph))
    layouts = Layouts(recording, flow)
    proven: dict[tuple[Hashable, ...], Alignment] = {}
    lone: dict[tuple[Hashable, ...], bool | None] = {}
    sharded = {id(block.module): is_sharded(block.module) for block in recording.blocks.values()}
    seen: dict[str, int] = {}
    calls: list[SiteCall] = []
    for node in flow.graph.nodes:
        if node not in flow.calls:
            lineage.follow(node)
            continue
        block = recording.blocks[flow.calls[node]]
        occurrence = seen.get(block.path, 0)
        seen[block.path] = occurrence + 1
        sources = sources_of(block.module, node)
        streams = lineage.streams(sources)
        unread = _unread(node)
        hint = hints.get((block.path, occurrence))
        planned = hint[0] if hint and hint[0].routable else None
        if planned is not None and planned.stream in streams:
            streams = {planned.stream: streams[planned.stream]}
        key: tuple[Hashable, ...] = (block.kind, unread, tuple((path, mark.numpy().tobytes()) for path, mark in streams.items()))
        if sharded[id(block.module)]:
            key = (block.path, occurrence)
            known, residual_outside = hint or (_SHARDED, False)
            proven[key] = align_as_planned(recording.samples[block.kind], streams, known)
            lone[key] = residual_outside if known.routable else None
        before = hint[0].aligned if hint and hint[0].stream else None
        if key not in proven:
            proven[key] = _align(recording, block, streams, before, unread)
        if proven[key].undecided:
            told = {path: layouts.batch_axis(sources[path], mark) for path, mark in streams.items()}
            axes = {path: axis for path, axis in told.items() if axis is not None}
            key = (*key, tuple(axes.items()))
            if key not in proven:
                proven[key] = _align(recording, block, streams, before, unread, axes)
        found = proven[key]
        if not found.routable:
            if planned is not None and planned.stream in streams and found.tokens == 1:  # which stays, and is followed on as planned
                lineage.settle(node, sources[planned.stream], planned.output)
            else:
                lineage.settle_dense(block.module, node)
            calls.append(SiteCall(flow.calls[node], block.path, occurrence, found))
            continue
        stream = sources[found.stream]
        output = _continuation(node, found.output)
        outside = residual_after(output, stream, flow.calls, lineage) if output is not None else False
        if outside is not False or block.half:
            if key not in lone:
                lone[key] = has_no_residual(recording.samples[block.kind], found)
            undecided = lone[key] is None or (lone[key] and not outside)
            outside = None if undecided else bool(lone[key])
        staying = spans(streams[found.stream], parse_axes(found.axes[found.stream]).batch)
        spoiled = found.overwrites and any(user > node for user in stream.users)
        if block.path.endswith("._orig_mod"):
            found = dataclasses.replace(found, reason=f"{found.reason}{_COMPILED}")
        if outside is None or spoiled:
            found = dataclasses.replace(found, routable=False, reason=_SPOILED if spoiled else _NO_RESIDUAL)
        lineage.settle(node, stream, found.output)
        layouts.streams[node] = stream
        calls.append(SiteCall(flow.calls[node], block.path, occurrence, found, staying, bool(outside)))
    names = [node.name for node in flow.graph.nodes if node.op == "placeholder"]
    recording.pinned = {names.index(node.name): node.meta["content"].clone() for node in lineage.pinned}
    recording.forget_proof()
    return calls


_SHARDED = Alignment(False, "its weights are sharded, so that nothing can be proven; plan and convert first, then call fully_shard")
_NO_RESIDUAL = (
    "no residual of its own could be told, and its output is not simply added to the stream it came from (`x + gate * block(norm(x))`), so "
    "a token that bypasses it has nothing to go on as; add the residual inside the block, or plainly after it"
)
_COMPILED = "; its own torch.compile is passed by: compile the converted model instead"
_SPOILED = "it overwrites the stream it is given, which is read again after it; let the block, or what reads the stream, work on a clone"


def _unread(node: fx.Node) -> frozenset[str]:
    """Return the paths of a block's outputs that no one uses."""
    outputs = {path for path, _ in leaves_of(node.meta["outputs"], Leaf)}
    if any(user.target not in (operator.getitem, getattr) for user in node.users) or "" in outputs:
        return frozenset()
    heads = {str(user.args[1]) for user in node.users}
    return frozenset(path for path in outputs if path.split(".")[0] not in heads)


def _continuation(node: fx.Node, output: str) -> fx.Node | None:
    """Return the node of a block's output that continues the stream, if it is used as such."""
    if not output:
        return node
    return next((user for user in node.users if user.target in (operator.getitem, getattr) and str(user.args[1]) == output), None)


def _align(
    recording: Recording,
    block: BlockCall,
    streams: dict[str, Tensor],
    hint: dict[str, str] | None,
    unread: frozenset[str],
    batch_axes: Mapping[str, int] | None = None,
) -> Alignment:
    sample = recording.samples[block.kind]
    pattern = pattern_of(block.module)
    if pattern is None:
        return align_block(sample, streams, hint, unread=unread, batch_axes=batch_axes)
    declared = dict(pattern.inputs)
    _check_names(block, pattern, set(named_leaves(block.module, sample.args, sample.kwargs, Tensor)))
    stream = next(iter(declared))
    found = align_block(sample, {stream: streams[stream]} if stream in streams else {}, declared, search=False, unread=unread)
    if streams and not found.routable:
        raise PatternError(
            f"Pattern {pattern.name!r} for {pattern.target} does not hold at {block.path}: {found.reason}. Declared: {declared}. "
            "Correct the pattern, or remove it and let the search decide."
        )
    return found if streams else align_block(sample, streams, unread=unread)


def _check_names(block: BlockCall, pattern: BlockPattern, present: set[str]) -> None:
    """Refuse a declared argument that the block does not have; one that this call leaves out is in order."""
    parameters = inspect.signature(block.module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(name for name in pattern.inputs if name not in present and name.split(".")[0] not in parameters)
    if unknown:
        raise PatternError(
            f"Pattern {pattern.name!r} for {pattern.target} declares {unknown}, and {block.path} has no such argument; its forward takes "
            f"{sorted(parameters)}. Declared: {dict(pattern.inputs)}. Correct the pattern, or remove it and let the search decide."
        )
