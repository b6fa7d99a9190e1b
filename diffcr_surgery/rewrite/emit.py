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
    gather_tokens,
    keep_tokens,
    kept_count,
    per_sample,
    rank_tokens,
    scatter_tokens,
    staying_count,
    staying_tokens,
)

__all__ = ["SCORES", "Decision", "RoutedCall", "emit_block", "emit_site"]

SCORES = object()  # the key, besides the used items of a block's output, under which a site hands out its scores


class Decision(NamedTuple):
    """At which ratios a site runs: one bin, or two to blend."""

    lower: float
    upper: float | None = None


@dataclass(frozen=True)
class RoutedCall:
    """A block call in a graph, with what routing it takes.

    Attributes:
        index: Row of the site in the ratio table.
        path: Module path of the block.
        axes: Path within ``(args, kwargs)`` -> axis pattern of what moves with the tokens.
        stream: Path of the stream.
        pattern: Axis pattern of the stream.
        output: Item of the output that continues the stream; ``None`` for a lone output.
        tokens: Length of the stream's token axis.
        staying: Tokens on it that never bypass.
        outside: Whether the residual is added after the block, so that a bypassed token takes zero from it.
        overwrites: Whether the block writes into its stream; it gets a copy where gate, router or a second branch read that too.
        counts: Path of each number that counts tokens -> ``"n"`` (those that may bypass) or ``"m+n"`` (all), of a causal flag -> ``"off"``.
        samples: b.
        random: Whether the block draws random numbers.
        gate: Gate form.
        branches: How a ratio between two bins is run.
    """

    index: int
    path: str
    axes: dict[str, str]
    stream: str
    pattern: str
    output: int | str | None
    tokens: int
    samples: int
    random: bool
    gate: str
    branches: str = "two"
    staying: Spans = ()
    outside: bool = False
    counts: dict[str, str] = field(default_factory=dict)
    overwrites: bool = False


def _item(graph: fx.Graph, block: fx.Node, item: int | str) -> fx.Node:
    return graph.call_function(operator.getitem if isinstance(item, int) else ops.named_item, (block, item))


def emit_block(graph: fx.Graph, path: str, args: Any, kwargs: Any, items: list[int | str]) -> dict[int | str | None, fx.Node]:
    """Emit a plain call of a block and take the wanted items out of its output (none: the output as a whole)."""
    block = graph.call_module(path, args, kwargs)
    return {item: _item(graph, block, item) for item in items} if items else {None: block}


def emit_site(
    graph: fx.Graph,
    call: RoutedCall,
    args: Any,
    kwargs: Any,
    items: list[int | str],
    decision: Decision,
    region: fx.Node | None,
) -> dict[Any, fx.Node]:
    """Emit a routed block call.

    Args:
        graph: Graph to emit into.
        call: The call.
        args: Positional arguments, as nodes of ``graph``.
        kwargs: Keyword arguments.
        items: Which items of the output are used; empty for a lone output.
        decision: Ratio or ratios to run at.
        region: Node of the samples' regions; needed to blend.

    Returns:
        Node of each used item; the one of the stream has all n tokens. Under ``SCORES`` that of the scores, if there is a router.
    """
    emitter = _Site(graph, call, args, kwargs, items, blended=decision.upper is not None)
    results = _run(emitter, decision, region)
    return results if emitter.raw_scores is None else {**results, SCORES: emitter.raw_scores}


def _run(emitter: _Site, decision: Decision, region: fx.Node | None) -> dict[int | str | None, fx.Node]:
    call, graph = emitter.call, emitter.graph
    if decision.upper is None:
        return emitter.branch(decision.lower)
    table = graph.get_attr("diffcr.ratio_table")
    weight = _named(graph, f"weight_{call.index}", ops.blend_weight, (table, call.index, region, decision.lower, decision.upper))
    if call.branches == "boundary":
        return emitter.branch(decision.lower, (decision.upper, weight))
    lower, upper = emitter.branch(decision.lower), emitter.branch(decision.upper, second=True)
    batch = parse_axes(call.pattern).batch
    return {item: graph.call_function(ops.blend, (lower[item], upper[item], weight, batch)) for item in lower}


def _named(graph: fx.Graph, name: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
    return graph.create_node("call_function", target, args, name=name)


class _Site:
    def __init__(self, graph: fx.Graph, call: RoutedCall, args: Any, kwargs: Any, items: list[int | str], *, blended: bool) -> None:
        self.graph = graph
        self.call = call
        self.arguments = (args, kwargs)
        self.items = items
        self.blended = blended
        self.stream = self._find(call.stream)
        self.raw_scores: fx.Node | None = None
        self._scores: fx.Node | None = None
        self._order: fx.Node | None = None
        self._staying: fx.Node | None = None
        self._factor: fx.Node | None = None

    def _find(self, wanted: str) -> fx.Node:
        found: list[fx.Node] = []
        map_leaves(self.arguments, lambda path, leaf: found.append(leaf) if path == wanted else None)
        return found[0]

    def scores(self) -> fx.Node:
        if self._scores is None:
            i = self.call.index
            scores = self.graph.create_node("call_module", f"diffcr.routers.{i}", (self.stream,), name=f"scores_{i}")
            self.raw_scores = scores
            batch = parse_axes(self.call.pattern).batch
            if batch is None:  # packed tokens `n c` are one sample
                scores = self.graph.call_method("unsqueeze", (scores, 0))
            self._scores = self.graph.call_method("transpose", (scores, 0, 1)) if batch == 1 else scores
        return self._scores

    def staying(self) -> fx.Node:
        if self._staying is None:
            self._staying = _named(self.graph, f"staying_{self.call.index}", staying_tokens, (self.scores(), self.call.staying))
        return self._staying

    def order(self) -> fx.Node:
        if self._order is None:
            ranked = (self.scores(), self.staying()) if self.call.staying else (self.scores(),)
            self._order = _named(self.graph, f"order_{self.call.index}", rank_tokens, ranked)
        return self._order

    def factor(self, toward: tuple[float, fx.Node] | None, decided: bool) -> fx.Node:
        """Emit by how much each token's update counts: its gate, and on the way to a second ratio also the blend."""
        call, graph = self.call, self.graph
        if self._factor is None:
            staying = (self.staying(),) if call.staying else ()
            self._factor = _named(graph, f"factor_{call.index}", ops.gate_factor, (self.scores(), call.gate, *staying))
        if toward is None:
            return self._factor
        ratio, weight = toward
        arguments = (self._factor, self.order(), self._count(ratio), weight, decided or call.gate == "sigmoid")
        return _named(graph, f"boundary_{call.index}", ops.boundary_factor, arguments)

    def _count(self, ratio: float) -> int:
        return kept_count(ratio, self.call.tokens, staying_count(self.call.staying))

    def gated(self, tokens: fx.Node, processed: fx.Node, factor: fx.Node) -> fx.Node:
        """Emit the gate: what the block did is scaled."""
        base = self.graph.call_function(torch.zeros_like, (processed,)) if self.call.outside else tokens
        return _named(self.graph, f"gated_{self.call.index}", ops.gate_update, (base, processed, factor, self.call.pattern))

    def branch(self, ratio: float, toward: tuple[float, fx.Node] | None = None, *, second: bool = False) -> dict[int | str | None, fx.Node]:
        """Emit the block at one ratio.

        Args:
            ratio: Share of the tokens that bypass.
            toward: A higher ratio and the blend weight, if this run is to stand for both (``branches="boundary"``).
            second: Whether this is the second run of the block.
        """
        call, graph = self.call, self.graph
        count = self._count(ratio)
        if toward is not None and self._count(toward[0]) == count:
            toward = None  # so short a stream that both ratios keep the same tokens
        if count == call.tokens:
            return self._whole(toward, second)
        kept = _named(graph, f"kept_{call.index}", keep_tokens, (self.order(), count, *((True,) if call.staying else ())))
        tokens = _named(graph, f"tokens_{call.index}", gather_tokens, (self.stream, kept, call.pattern, call.tokens))
        results = self._run_kept(kept, tokens, second, count)
        factor = graph.call_function(ops.take_factors, (self.factor(toward, decided=True), kept))
        processed = self.gated(tokens, results[call.output], factor)
        skip = graph.call_function(torch.zeros_like, (self.stream,)) if call.outside else self.stream
        results[call.output] = _named(graph, f"stream_{call.index}", scatter_tokens, (skip, processed, kept, call.pattern))
        return results

    def _whole(self, toward: tuple[float, fx.Node] | None, second: bool) -> dict[int | str | None, fx.Node]:
        """Emit the block on all tokens: nothing is gathered; only the paper's gate, or the blend, still scales."""
        call = self.call
        args, kwargs = self.arguments
        scaled = call.gate == "sigmoid" or toward is not None
        if call.overwrites and (scaled or self.blended):
            copied = self.graph.call_method("clone", (self.stream,))
            args, kwargs = map_leaves(self.arguments, lambda path, leaf: copied if path == call.stream else leaf)
        results = self._call(args, kwargs, second)
        if scaled:
            results[call.output] = self.gated(self.stream, results[call.output], self.factor(toward, decided=False))
        return results

    def _run_kept(self, kept: fx.Node, tokens: fx.Node, second: bool, count: int) -> dict[int | str | None, fx.Node]:
        call, graph = self.call, self.graph
        sizes = {"n": count - staying_count(call.staying), "m+n": count, "off": False}
        arguments = map_leaves(self.arguments, lambda path, leaf: sizes[call.counts[path]] if path in call.counts else leaf)
        if needs_samples(call.axes, call.samples):
            block = graph.get_attr(call.path)
            inner: tuple[Any, ...] = (block, *arguments, call.axes, kept, call.tokens, parse_axes(call.pattern).batch or 0)
            target: Any = per_sample
            if second and call.random:
                target = ops.per_sample_without_random_trace
            return self._items(_named(graph, f"block_{call.index}", target, inner))

        def gather(path: str, leaf: Any) -> Any:
            pattern = call.axes.get(path)
            if path == call.stream:
                return graph.call_method("clone", (tokens,)) if call.overwrites else tokens  # the gate reads them after the block
            if pattern is None or not parse_axes(pattern).tokens or not isinstance(leaf, fx.Node):
                return leaf
            return graph.call_function(gather_tokens, (leaf, kept, pattern, call.tokens))

        args, kwargs = map_leaves(arguments, gather)
        return self._call(args, kwargs, second)

    def _call(self, args: Any, kwargs: Any, second: bool) -> dict[int | str | None, fx.Node]:
        if not (second and self.call.random):
            return emit_block(self.graph, self.call.path, args, kwargs, self.items)
        block = self.graph.get_attr(self.call.path)
        return self._items(self.graph.call_function(ops.without_random_trace, (block, args, kwargs)))

    def _items(self, block: fx.Node) -> dict[int | str | None, fx.Node]:
        return {item: _item(self.graph, block, item) for item in self.items} if self.items else {None: block}
