"""Emit the nodes of one routed site: router, ranking, gathers, the block on its own path, the gate, and the skip connection."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from diffcr_surgery._tree import map_leaves
from diffcr_surgery.align.proof import needs_samples
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.rewrite import ops
from diffcr_surgery.tokens import (
    Spans,
    gather_each,
    gather_tokens,
    keep_tokens,
    kept_count,
    per_sample,
    rank_tokens,
    sample_axes,
    scatter_tokens,
    staying_count,
    staying_tokens,
    top_tokens,
)

__all__ = ["Decision", "RoutedCall", "Shared", "emit_block", "emit_site"]


class Decision(NamedTuple):
    """At which ratios a site runs: one bin, or two to blend."""

    lower: float
    upper: float | None = None


@dataclass(frozen=True)
class RoutedCall:
    """A block call in a graph, with what routing it takes.

    Attributes:
        index: Row of the site in the ratio table.
        router: Row of the site whose router decides here: its own, or an earlier one's.
        path: Module path of the block.
        axes: Path within ``(args, kwargs)`` -> axis pattern of what moves with the tokens.
        stream: Path of the stream.
        pattern: Axis pattern of the stream.
        output: Item of the output that continues the stream; ``None`` for a lone output.
        tokens: Length of the stream's token axis.
        staying: Tokens on it that never bypass.
        samples: b.
        outside: Whether the residual is added after the block, so that a bypassed token takes zero from it.
        overwrites: Whether the block writes into its stream; it gets a copy where gate, router or a second branch read that too.
        counts: Path of each number that counts tokens -> ``"n"`` (those that may bypass) or ``"m+n"`` (all), of a causal flag -> ``"off"``.
        batches: Item of the output -> its batch axis, where the stream's is not the first.
        random: Whether the block draws random numbers.
        gate: Gate form.
        branches: How a ratio between two bins is run.
    """

    index: int
    router: int
    path: str
    axes: dict[str, str]
    stream: str
    pattern: str
    output: int | str | None
    tokens: int
    staying: Spans
    samples: int
    outside: bool
    overwrites: bool
    counts: dict[str, str]
    batches: dict[int | str, int]
    random: bool
    gate: str
    branches: str

    def kept(self, ratio: float) -> int:
        """Return how many tokens of the stream are kept at a ratio."""
        return kept_count(ratio, self.tokens, staying_count(self.staying))

    def scored(self, decision: Decision) -> bool:
        """Tell whether the site reads scores: to choose tokens, to blend, or since the paper's gate scales even what all keep."""
        return self.gate == "sigmoid" or decision.upper is not None or self.kept(decision.lower) < self.tokens


@dataclass
class Shared:
    """What the sites of one graph have in common.

    Attributes:
        region: Node of the samples' regions; needed to blend.
        checked: Whether infinite scores are to be seen.
        wanted: Rows of the routers that decide anything.
        risky: Whether anything in the graph may write into a stream, so that none may go on under two names.
        scores: Row of each router that has been emitted -> its scores.
        staying: Spans of tokens that stay, and their number in all -> the mask.
    """

    region: fx.Node | None
    checked: bool
    wanted: frozenset[int]
    risky: bool
    scores: dict[int, fx.Node] = field(default_factory=dict)
    staying: dict[tuple[Spans, int], fx.Node] = field(default_factory=dict)


def _items(graph: fx.Graph, block: fx.Node, items: list[int | str]) -> dict[int | str | None, fx.Node]:
    """Take the wanted items out of a block's output (none: the output as a whole)."""
    if not items:
        return {None: block}
    return {item: graph.call_function(operator.getitem if isinstance(item, int) else ops.named_item, (block, item)) for item in items}


def emit_block(graph: fx.Graph, path: str, args: Any, kwargs: Any, items: list[int | str]) -> dict[int | str | None, fx.Node]:
    """Emit a plain call of a block and take the wanted items out of its output (none: the output as a whole)."""
    return _items(graph, graph.call_module(path, args, kwargs), items)


def emit_site(
    graph: fx.Graph, call: RoutedCall, args: Any, kwargs: Any, items: list[int | str], decision: Decision, shared: Shared
) -> dict[int | str | None, fx.Node]:
    """Emit a routed block call.

    Args:
        graph: Graph to emit into.
        call: The call.
        args: Positional arguments, as nodes of ``graph``.
        kwargs: Keyword arguments.
        items: Which items of the output are used; empty for a lone output.
        decision: Ratio or ratios to run at.
        shared: What the sites of the graph share; a router emitted here is added.

    Returns:
        Node of each used item; the one of the stream has all n tokens.
    """
    emitter = _Site(graph, call, args, kwargs, items, shared, blended=decision.upper is not None)
    if call.index in shared.wanted:  # the router reads the stream of the first site it decides for, whether or not that one needs it
        emitter.scores()
    if decision.upper is None:
        return emitter.branch(decision.lower)
    table = graph.get_attr("diffcr.ratio_table")
    weight = emitter.node("weight", ops.blend_weight, table, call.index, shared.region, decision.lower, decision.upper)
    if call.kept(decision.lower) == call.kept(decision.upper):  # so short a stream that both ratios keep the same tokens
        results = emitter.branch(decision.lower)
        results[call.output] = graph.call_function(ops.with_zero_gradients, (results[call.output], weight, emitter.scores()))
        return results
    if call.branches == "boundary":
        return emitter.branch(decision.lower, (decision.upper, weight))
    # Last in the forward is first in the backward, and the original's own run (lower is 0) has to come first there: its strides decide in
    # what order a sum further up adds, and at ratio 0, where all else is zeros, gradients are to be the dense model's to the last bit.
    ordered = (decision.upper, decision.lower) if decision.lower == 0.0 else (decision.lower, decision.upper)
    runs = {ratio: emitter.branch(ratio, extra=ratio == decision.upper) for ratio in ordered}
    lower, upper = runs[decision.lower], runs[decision.upper]
    batch = parse_axes(call.pattern).batch
    axes = {item: batch if item is None else call.batches.get(item, batch) for item in lower}
    return {item: graph.call_function(ops.blend, (lower[item], upper[item], weight, axes[item])) for item in lower}


class _Site:
    def __init__(
        self, graph: fx.Graph, call: RoutedCall, args: Any, kwargs: Any, items: list[int | str], shared: Shared, *, blended: bool
    ) -> None:
        self.graph = graph
        self.call = call
        self.arguments = (args, kwargs)
        self.items = items
        self.shared = shared
        self.blended = blended
        self.stream = self._find(call.stream)
        self._scores: fx.Node | None = None
        self._order: fx.Node | None = None
        self._factor: fx.Node | None = None

    def _find(self, wanted: str) -> fx.Node:
        found: list[fx.Node] = []
        map_leaves(self.arguments, lambda path, leaf: found.append(leaf) if path == wanted else None)
        return found[0]

    def node(self, name: str, target: Any, *args: Any) -> fx.Node:
        """Emit a call of a function under a name that says which site it belongs to."""
        return self.graph.create_node("call_function", target, args, name=f"{name}_{self.call.index}")

    def scores(self) -> fx.Node:
        if self._scores is None:
            i = self.call.router
            if i not in self.shared.scores:
                arguments = (self.stream,) if self.shared.checked else (self.stream, False)
                self.shared.scores[i] = self.graph.create_node("call_module", f"diffcr.routers.{i}", arguments, name=f"scores_{i}")
            scores = self.shared.scores[i]
            batch = parse_axes(self.call.pattern).batch
            if batch is None:  # packed tokens `n c` are one sample
                scores = self.graph.call_method("unsqueeze", (scores, 0))
            self._scores = self.graph.call_method("transpose", (scores, 0, 1)) if batch == 1 else scores
        return self._scores

    def staying(self) -> tuple[fx.Node, ...]:
        """Emit the mask of the tokens that stay, if any do, once for all sites with the same."""
        if not self.call.staying:
            return ()
        key = (self.call.staying, self.call.tokens)
        if key not in self.shared.staying:
            self.shared.staying[key] = self.node("staying", staying_tokens, self.scores(), self.call.staying)
        return (self.shared.staying[key],)

    def order(self) -> fx.Node:
        if self._order is None:
            self._order = self.node("order", rank_tokens, self.scores(), *self.staying())
        return self._order

    def factor(self, toward: tuple[float, fx.Node] | None, decided: bool) -> fx.Node:
        """Emit by how much each token's update counts: its gate, and on the way to a second ratio also the blend."""
        call = self.call
        if self._factor is None:
            self._factor = self.node("factor", ops.gate_factor, self.scores(), call.gate, *self.staying())
        if toward is None:
            return self._factor
        ratio, weight = toward
        decided = decided or call.gate == "sigmoid"
        return self.node("boundary", ops.boundary_factor, self._factor, self.order(), call.kept(ratio), weight, decided)

    def kept(self, count: int) -> fx.Node:
        """Emit the kept tokens: ranked where a second ratio keeps the first of them, else as they come."""
        if not self.blended:
            return self.node("kept", top_tokens, self.scores(), count, *self.staying())
        return self.node("kept", keep_tokens, self.order(), count, *((True,) if self.call.staying else ()))

    def gated(self, tokens: fx.Node, processed: fx.Node, factor: fx.Node) -> fx.Node:
        """Emit the gate: what the block did is scaled."""
        base = self.graph.call_function(torch.zeros_like, (processed,)) if self.call.outside else tokens
        return self.node("gated", ops.gate_update, base, processed, factor, self.call.pattern)

    def branch(self, ratio: float, toward: tuple[float, fx.Node] | None = None, *, extra: bool = False) -> dict[int | str | None, fx.Node]:
        """Emit the block at one ratio.

        Args:
            ratio: Share of the tokens that bypass.
            toward: A higher ratio and the blend weight, if this run is to stand for both (``branches="boundary"``).
            extra: Whether this is the run of the block that the original model does not make.
        """
        call, graph = self.call, self.graph
        count = call.kept(ratio)
        if count == call.tokens:
            return self._whole(toward, extra)
        if ratio == 1.0 and not self.blended and not call.staying and self.items in ([], [call.output]):
            skip = self._skip()  # nothing enters the block
            return {call.output: graph.call_method("clone", (skip,)) if self.shared.risky and skip is self.stream else skip}
        kept = self.kept(count)
        tokens = self.node("tokens", gather_tokens, self.stream, kept, call.pattern, call.tokens)
        results = self._run_kept(kept, tokens, extra, count)
        factor = graph.call_function(ops.take_factors, (self.factor(toward, decided=True), kept))
        processed = self.gated(tokens, results[call.output], factor)
        results[call.output] = self.node("stream", scatter_tokens, self._skip(), processed, kept, call.pattern)
        return results

    def _skip(self) -> fx.Node:
        """Return what a bypassed token goes on as: itself, or nothing where the residual is added after the block."""
        return self.graph.call_function(torch.zeros_like, (self.stream,)) if self.call.outside else self.stream

    def _whole(self, toward: tuple[float, fx.Node] | None, extra: bool) -> dict[int | str | None, fx.Node]:
        """Emit the block on all tokens: nothing is gathered; only the paper's gate, or the blend, still scales."""
        call = self.call
        args, kwargs = self.arguments
        scaled = call.gate == "sigmoid" or toward is not None
        if call.overwrites and (scaled or self.blended):
            copied = self.graph.call_method("clone", (self.stream,))
            args, kwargs = map_leaves(self.arguments, lambda path, leaf: copied if path == call.stream else leaf)
        # A node from before the block, so that the zeros it sends back come after what the block does; see `emit_site`.
        base = self.stream if toward is None else self.graph.call_method("view_as", (self.stream, self.stream))
        results = self._call(args, kwargs, extra)
        if scaled:
            results[call.output] = self.gated(base, results[call.output], self.factor(toward, decided=False))
        return results

    def _run_kept(self, kept: fx.Node, tokens: fx.Node, extra: bool, count: int) -> dict[int | str | None, fx.Node]:
        call, graph = self.call, self.graph
        sizes = {"n": count - staying_count(call.staying), "m+n": count, "off": False}
        arguments = map_leaves(self.arguments, lambda path, leaf: sizes[call.counts[path]] if path in call.counts else leaf)
        apart = needs_samples(call.axes, call.samples)

        def gather(path: str, leaf: Any) -> Any:
            pattern = call.axes.get(path)
            if path == call.stream:
                return graph.call_method("clone", (tokens,)) if call.overwrites else tokens  # the gate reads them after the block
            if pattern is None or not parse_axes(pattern).tokens or not isinstance(leaf, fx.Node):
                return leaf
            each = apart and parse_axes(pattern).batch is None
            return graph.call_function(gather_each if each else gather_tokens, (leaf, kept, pattern, call.tokens))

        args, kwargs = map_leaves(arguments, gather)
        if not apart:
            return self._call(args, kwargs, extra)
        joined = parse_axes(call.pattern).batch or 0
        target = ops.per_sample_without_random_trace if extra and call.random else per_sample
        block = self.node("block", target, graph.get_attr(call.path), args, kwargs, sample_axes(call.axes), call.samples, joined)
        return _items(graph, block, self.items)

    def _call(self, args: Any, kwargs: Any, extra: bool) -> dict[int | str | None, fx.Node]:
        if not (extra and self.call.random):
            return emit_block(self.graph, self.call.path, args, kwargs, self.items)
        block = self.graph.get_attr(self.call.path)
        return _items(self.graph, self.graph.call_function(ops.without_random_trace, (block, args, kwargs)), self.items)
