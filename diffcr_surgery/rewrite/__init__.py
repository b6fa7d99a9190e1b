"""Stage 5, rewrite: a recorded graph and one decision per site become the routed graph that is executed.

A site at ratio 0.3 over 64 tokens reads, in the printed graph:

    scores_3 = call_module[diffcr.routers.3](stream)                 b n
    kept_3   = top_tokens(scores_3, 45)                              b k
    tokens_3 = gather_tokens(stream, kept_3, 'b n c', 64)            b k c
    blocks_3 = call_module[blocks.3](tokens_3, c)                    b k c
    factor_3 = gate_factor(scores_3, 'doubled_sigmoid')              b n
    gated_3  = gate_update(tokens_3, blocks_3, ...)                  b k c
    stream_3 = scatter_tokens(stream, gated_3, kept_3, 'b n c')      b n c

Counts are Python ints, so a compiler sees static shapes. A site at 0 is the block itself, one at 1 is gone. What the graph of a specialised
model can do without, :mod:`.passes` takes out.

In training a ratio lies between two bins, at the share w of the way, and the tokens are ranked (``rank_tokens``, ``keep_tokens``). Let K be
the tokens kept at the lower bin and K' those kept at the higher; both are the first of one ranking, so K' lies in K. Let u(i, S) be the
gated update of token i when the block sees the tokens S.

- ``branches="two"`` (the paper) runs the block on K and on K', and blends: token i moves by (1 - w) u(i, K) + w u(i, K') if it is in K', by
  (1 - w) u(i, K) if it is in K alone, and not at all outside.
- ``branches="boundary"`` runs it on K alone: token i moves by u(i, K) if it is in K', by (1 - w) u(i, K) if it is in K alone. One forward.

They differ by w (u(i, K) - u(i, K')) for the tokens of K', and nowhere else: by what the tokens of K without K' do to others as attention
context. Where tokens do not see each other they are equal, gradients in ρ included. Both are linear in ρ between bins. ``"two"`` is
continuous everywhere; ``"boundary"`` is continuous from above at a bin, and where ρ rises to it jumps by u(i, K) - u(i, K'), as the last
boundary tokens leave the context. (At ``max_ratio``, the upper end of the last two bins, training keeps them there.) Its gradient in ρ is
that of the boundary tokens' own updates, without that of the context.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import fx

from diffcr_surgery.errors import SurgeryError
from diffcr_surgery.rewrite import ops
from diffcr_surgery.rewrite.emit import Decision, RoutedCall, Shared, emit_block, emit_site
from diffcr_surgery.rewrite.passes import FuseSites, ScatterInPlace, ShareGathers, writes
from diffcr_surgery.trace.recording import BlockCall, compile_graph

__all__ = ["Decision", "FuseSites", "RewriteResult", "RouteTokens", "RoutedCall", "ScatterInPlace", "ShareGathers", "used_items"]


class RewriteResult(NamedTuple):
    """A rewritten graph.

    Attributes:
        graph: The new graph; the one given is never changed.
        takes_region: Whether it ends in a placeholder for the samples' regions.
        takes_model: Whether it ends in a placeholder for the model, which checkpointed sites need.
    """

    graph: fx.Graph
    takes_region: bool
    takes_model: bool


def used_items(node: fx.Node) -> list[int | str] | None:
    """Return the output items by which a block's result is used: empty if it is a lone tensor, ``None`` if mixed."""
    if "shape" in node.meta:
        return []
    taken = [user.args[1] for user in node.users if user.target in (operator.getitem, getattr)]
    items = [item for item in taken if isinstance(item, (int, str))]
    return list(dict.fromkeys(items)) if len(items) == len(node.users) else None


class RouteTokens:
    """The pass that routes: ``requires`` → ``call`` → ``ensures``, on a copy of the graph.

    Args:
        calls: Block node -> how to route it.
        decisions: Row of the ratio table -> ratio or ratios to run at.
        blocks: Every block node, for gradient checkpointing.
        checked: Whether the graph ends with a check that all scores are numbers.
    """

    def __init__(
        self,
        calls: Mapping[fx.Node, RoutedCall],
        decisions: Mapping[int, Decision],
        blocks: Mapping[fx.Node, BlockCall],
        *,
        checked: bool = False,
    ) -> None:
        self.calls = calls
        self.decisions = decisions
        self.blocks = blocks
        self.checked = checked

    def __call__(self, graph: fx.Graph) -> RewriteResult:
        """Return the routed copy of ``graph``."""
        self.requires(graph)
        result = self.call(graph)
        self.ensures(result)
        return result

    def requires(self, graph: fx.Graph) -> None:
        """Check that every site is a block call of this graph."""
        nodes = set(graph.nodes)
        for node, call in self.calls.items():
            if node not in nodes or node.op != "call_module":
                raise SurgeryError(f"Site {call.path} is no block call of this graph:\n{graph}")
            if call.index not in self.decisions:
                raise SurgeryError(f"No ratio was decided for site {call.index} ({call.path}).")

    def ensures(self, result: RewriteResult) -> None:
        """Check that the graph is well formed."""
        result.graph.lint()

    def call(self, graph: fx.Graph) -> RewriteResult:
        """Copy the graph, routing each site on the way."""
        out = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        taken: dict[fx.Node, dict[Any, fx.Node]] = {}
        scored = frozenset(call.router for call in self.calls.values() if call.scored(self.decisions[call.index]))
        blending = any(self.decisions[call.index].upper is not None for call in self.calls.values())
        wrapped = {node for node, block in self.blocks.items() if block.checkpointed}
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        env |= {node: out.node_copy(node) for node in inputs}
        extra = {name: out.placeholder(name) for name, wanted in (("region", blending), ("model", wrapped)) if wanted}
        calls = list(self.calls.values())
        risky = any(call.overwrites for call in calls) or self.blocks.keys() != self.calls.keys() or any(map(writes, graph.nodes))
        shared = Shared(extra.get("region"), self.checked, scored, risky)
        for node in list(graph.nodes)[len(inputs) :]:
            source = node.args[0] if node.args and node.target in (operator.getitem, getattr) else None
            if isinstance(source, fx.Node) and source in taken and None not in taken[source]:
                env[node] = taken[source][node.args[1]]
            elif node in self.calls or node in wrapped:
                before = next(reversed(out.nodes))
                items = used_items(node) or []
                if node in wrapped:
                    taken[node] = self._checkpointed(out, node, env, extra, items, shared)
                else:
                    taken[node] = self._emit(out, node, fx.map_arg(node.args, env.get), fx.map_arg(node.kwargs, env.get), items, shared)
                self._mark(out, before, node)
                if None in taken[node]:
                    env[node] = taken[node][None]
            else:
                if node.op == "output" and self.checked and shared.scores:
                    paths = {call.router: call.path for call in reversed(calls)}
                    out.call_function(ops.check_scores, (tuple(paths[row] for row in shared.scores), tuple(shared.scores.values())))
                env[node] = out.node_copy(node, env.__getitem__)
        return RewriteResult(out, blending, bool(wrapped))

    def _mark(self, out: fx.Graph, before: fx.Node, node: fx.Node) -> None:
        """Note on all nodes after ``before`` which site they belong to."""
        new = next(reversed(out.nodes))
        while new is not before and node in self.calls:
            new.meta["site"] = self.calls[node].index
            new = new.prev

    def _emit(self, graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any, items: list[int | str], shared: Shared) -> dict[Any, fx.Node]:
        if node not in self.calls:
            return emit_block(graph, self.blocks[node].path, args, kwargs, items)
        call = self.calls[node]
        return emit_site(graph, call, args, kwargs, items, self.decisions[call.index], shared)

    def _checkpointed(
        self,
        out: fx.Graph,
        node: fx.Node,
        env: dict[fx.Node, fx.Node],
        extra: dict[str, fx.Node],
        items: list[int | str],
        shared: Shared,
    ) -> dict[Any, fx.Node]:
        """Put the whole site into a function of its own, called under ``torch.utils.checkpoint``."""
        inner = fx.Graph()
        sources = list(dict.fromkeys(node.all_input_nodes))
        inside = {source: inner.placeholder(source.name) for source in sources}
        row = self.calls[node].router if node in self.calls else -1
        given = [shared.scores[row]] if row in shared.scores else []
        scores = {row: inner.placeholder("scores") for row in [row] if given}
        region = inner.placeholder("region") if "region" in extra else None
        own = Shared(region, shared.checked, shared.wanted, shared.risky, scores)
        results = self._emit(inner, node, fx.map_arg(node.args, inside.get), fx.map_arg(node.kwargs, inside.get), items, own)
        made = [] if given else list(own.scores.values())
        inner.output((*results.values(), *made))
        site = ops.checkpointed(compile_graph(inner), f"checkpointed_{node.name}")
        outer = [*(env[source] for source in sources), *given, *([extra["region"]] if region is not None else [])]
        whole = out.call_function(site, (extra["model"], *outer))
        found = [out.call_function(operator.getitem, (whole, i)) for i in range(len(results) + len(made))]
        if made:
            shared.scores[row] = found.pop()
        return dict(zip(results, found, strict=True))
