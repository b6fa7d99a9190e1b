"""Passes over the routed graph of a specialised model: fewer gathers, fewer scatters, fewer copies; the values stay, bit for bit.

Two sites that share a router and a ratio keep the same tokens. From

    kept_3   = top_tokens(scores_3, 45)              kept_4   = top_tokens(scores_3, 45)
    tokens_3 = gather_tokens(stream, kept_3, ...)    tokens_4 = gather_tokens(stream_3, kept_4, ...)
    ...                                              ...
    stream_3 = scatter_tokens(stream, gated_3, ...)  stream_4 = scatter_tokens(stream_3, gated_4, ...)

:class:`ShareGathers` makes ``kept_4`` the same node as ``kept_3``, :class:`FuseSites` lets the second block read ``gated_3`` and drops
``stream_3``, and :class:`ScatterInPlace` puts ``gated_4`` into the stream's own memory where no one else reads that.
"""

from __future__ import annotations

import operator

from torch import fx

from diffcr_surgery.rewrite import ops
from diffcr_surgery.tokens import gather_each, gather_tokens, scatter_tokens, scatter_tokens_, top_tokens
from diffcr_surgery.trace.builder import expect
from diffcr_surgery.trace.recorder import function_name, writes_by_name

__all__ = ["FuseSites", "ScatterInPlace", "ShareGathers", "writes"]


def writes(node: fx.Node) -> bool:
    """Tell whether a node of a recorded graph writes into a value that others may read, by itself or through a view."""
    if node.target is scatter_tokens_ or node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else function_name(node.target)
    return node.target in (operator.setitem, setattr) or writes_by_name(name, node.kwargs)


def _written_between_sites(graph: fx.Graph) -> bool:
    """Tell whether the model itself writes into values after the first site: then one value may be two, before and after."""
    nodes = list(graph.nodes)
    first = next((i for i, node in enumerate(nodes) if node.target is top_tokens), len(nodes))
    return any(writes(node) for node in nodes[first:])


class ShareGathers:
    """The pass that computes once what several nodes compute from the same values: kept tokens, gathered tables, gate factors."""

    PURE = (top_tokens, gather_tokens, gather_each, ops.gate_factor, ops.take_factors)

    def __call__(self, graph: fx.Graph) -> bool:
        """Change ``graph``; return whether it was modified."""
        first: dict[tuple[object, ...], fx.Node] = {}
        modified = False
        if _written_between_sites(graph):
            return False
        for node in list(graph.nodes):
            if node.target not in self.PURE:
                continue
            same = first.setdefault((node.target, *node.args), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                modified = True
        graph.lint()
        return modified


class FuseSites:
    """The pass that leaves out a scatter, and the gather of the same tokens right after it."""

    def __call__(self, graph: fx.Graph) -> bool:
        """Change ``graph``; return whether it was modified."""
        modified = _forget_shapes(graph)
        if _written_between_sites(graph):
            return modified
        for node in list(graph.nodes):
            stream = node.args[0] if node.target in (gather_tokens, scatter_tokens) else None
            if not isinstance(stream, fx.Node) or stream.target is not scatter_tokens:
                continue
            before, update, kept, pattern = stream.args
            if node.target is gather_tokens and node.args[1:3] == (kept, pattern):
                node.replace_all_uses_with(update)
                graph.erase_node(node)
                modified = True
            elif node.target is scatter_tokens and node.args[2:] == (kept, pattern):
                node.args = (before, *node.args[1:])
                modified = True
        for node in reversed(list(graph.nodes)):
            if node.target is scatter_tokens and not node.users:
                graph.erase_node(node)
        graph.lint()
        return modified


def _forget_shapes(graph: fx.Graph) -> bool:
    """Take out the guards on the shape of what a scatter returns: it is that of the stream, whatever the block did."""
    modified = False
    for stream in graph.find_nodes(op="call_function", target=scatter_tokens):
        for shape in [user for user in stream.users if user.target is getattr and user.args[1] == "shape"]:
            if all(guard.target is expect for guard in shape.users):
                for node in (*shape.users, shape):
                    graph.erase_node(node)
                modified = True
    return modified


class ScatterInPlace:
    """The pass for inference that saves a copy of the stream a site: scatter into it where no one else reads it.

    That is the case where the stream was made by the scatter of the site before, and read by this site's router and gather alone;
    a long skip or a residual that reads it keeps the copy.
    """

    def __call__(self, graph: fx.Graph) -> bool:
        """Change ``graph``; return whether it was modified."""
        modified = False
        for node in graph.find_nodes(op="call_function", target=scatter_tokens):
            stream = node.args[0]
            readers = set(stream.users) - {node}
            own = all(self._copies(reader) for reader in readers)
            if stream.target in (scatter_tokens, scatter_tokens_) and own and all(reader < node for reader in readers):
                node.target = scatter_tokens_
                modified = True
        graph.lint()
        return modified

    def _copies(self, reader: fx.Node) -> bool:
        router = reader.op == "call_module" and str(reader.target).startswith("diffcr.routers.")
        return router or reader.target is gather_tokens
