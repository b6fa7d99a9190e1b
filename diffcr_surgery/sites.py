"""Find and align the sites of a recording: detect and align, joined along the dataflow."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from diffcr_surgery.align import Alignment, adds_only, align_block
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.detect import Lineage, latent_input, named_leaves, residual_after
from diffcr_surgery.errors import PatternError
from diffcr_surgery.patterns import BlockPattern, pattern_of
from diffcr_surgery.tokens import Spans
from diffcr_surgery.trace.recording import BlockCall, Recording

__all__ = ["SiteCall", "site_calls"]


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


def site_calls(recording: Recording, hints: Mapping[tuple[str, int], dict[str, str]] | None = None) -> list[SiteCall]:
    """Align every block call of a recording, one proof per distinct kind; the recording's samples are dropped afterwards.

    Args:
        recording: A fresh recording.
        hints: (path, occurrence) -> axis patterns proven before, tried first.

    Raises:
        PatternError: If a registered pattern is contradicted by the proof.
    """
    lineage = Lineage(latent_input(recording.graph, _output_shapes(recording)))
    proven: dict[tuple[Hashable, ...], Alignment] = {}
    seen: dict[str, int] = {}
    calls: list[SiteCall] = []
    for node in recording.graph.nodes:
        block = recording.blocks.get(node)
        if block is None:
            lineage.follow(node)
            continue
        occurrence = seen.get(block.path, 0)
        seen[block.path] = occurrence + 1
        streams = lineage.streams(block.module, node)
        key = (block.kind, tuple(streams))
        if key not in proven:
            proven[key] = _align(recording, node, streams, (hints or {}).get((block.path, occurrence)))
        alignment = proven[key]
        if not alignment.routable:
            lineage.settle(node, None, None, spread=bool(streams))
            calls.append(SiteCall(node, block.path, occurrence, alignment))
            continue
        stream = named_leaves(block.module, node.args, node.kwargs, fx.Node)[alignment.stream][1]
        axes = parse_axes(alignment.axes[alignment.stream])
        staying = lineage.staying(stream, axes.tokens[0], axes.batch)
        output = _continuation(node, alignment.output)
        outside = output is not None and residual_after(output, stream, recording.blocks, recording.maps_zero_to_zero)
        outside = outside and adds_only(recording.samples[block.kind], alignment)
        lineage.settle(node, stream, alignment.output)
        calls.append(SiteCall(node, block.path, occurrence, alignment, staying, outside))
    recording.samples.clear()
    return calls


def _continuation(node: fx.Node, output: str) -> fx.Node | None:
    """Return the node of a block's output that continues the stream, if it is used as such."""
    if not output:
        return node
    return next((user for user in node.users if user.target in (operator.getitem, getattr) and str(user.args[1]) == output), None)


def _align(recording: Recording, node: fx.Node, streams: list[str], hint: dict[str, str] | None) -> Alignment:
    block = recording.blocks[node]
    sample = recording.samples[block.kind]
    pattern = pattern_of(block.module)
    if pattern is None:
        return align_block(sample, streams, hint)
    declared = dict(pattern.inputs)
    _check_names(block, pattern, set(named_leaves(block.module, sample.args, sample.kwargs, Tensor)))
    found = align_block(sample, [next(iter(declared))], declared, search=False)
    if streams and not found.routable:
        raise PatternError(
            f"Pattern {pattern.name!r} for {pattern.target} does not hold at {block.path}: {found.reason}. Declared: {declared}. "
            "Correct the pattern, or remove it and let the search decide."
        )
    return found if streams else align_block(sample, streams)


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


def _output_shapes(recording: Recording) -> list[tuple[int, ...]]:
    (output,) = (node for node in recording.graph.nodes if node.op == "output")
    return [tuple(node.meta["shape"]) for node in output.args[0] if "shape" in node.meta]
