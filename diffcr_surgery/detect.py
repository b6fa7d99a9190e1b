"""Stage 2, detect: which blocks work on the denoising stream, and in which argument it reaches them.

Candidates come from the trace; here the dataflow from the latent input tells the denoising stream from text refiners and context
encoders. A joint block carries two streams; after the first one both stem from the latent, so a stream is followed from output to
output, not by ancestry alone.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx

from diffcr_surgery._tree import Slot, map_leaves

__all__ = ["Lineage", "bound_arguments", "latent_input", "named_leaves"]


def latent_input(graph: fx.Graph, output_shapes: list[tuple[int, ...]]) -> fx.Node | None:
    """Return the input the model denoises: the first one shaped like an output, up to one axis (its channels).

    Falls back to the first floating-point input, in the order of the forward signature.
    """
    inputs: list[fx.Node] = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and getattr(node.meta.get("dtype"), "is_floating_point", False) and len(node.meta["shape"]) >= 2
    ]
    for node in inputs:
        shape = node.meta["shape"]
        for output in output_shapes:
            if len(shape) == len(output) and sum(a != b for a, b in zip(shape, output, strict=True)) <= 1:
                return node
    return inputs[0] if inputs else None


def bound_arguments(module: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return a block call's arguments by the names of the block's forward, however they were passed."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return arguments


def named_leaves(module: torch.nn.Module, args: Any, kwargs: Any, kind: type) -> dict[str, tuple[str, Any]]:
    """Return path by argument name -> (path within ``(args, kwargs)``, leaf), for every leaf of a type in a block call."""
    raw: list[str] = []
    leaves: list[Any] = []

    def take(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, kind):
            return leaf
        raw.append(path)
        leaves.append(leaf)
        return Slot(len(leaves) - 1)

    named: dict[str, tuple[str, Any]] = {}

    def visit(path: str, leaf: Any) -> None:
        if isinstance(leaf, Slot):
            named[path] = (raw[leaf.index], leaves[leaf.index])

    map_leaves(bound_arguments(module, *map_leaves((args, kwargs), take)), visit)
    return named


class Lineage:
    """Follows the latent's tokens through a graph, node by node in order."""

    def __init__(self, latent: fx.Node | None) -> None:
        self._members = set() if latent is None else {latent}
        self._only: dict[fx.Node, Any] = {}  # a block with several outputs -> the one item that carries on the stream
        self._everything = latent is None

    def follow(self, node: fx.Node) -> None:
        """Take in a node that is no block: it carries the latent if any of its inputs does."""
        if len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in self._only and node.target is operator.getitem:
            if node.args[1] == self._only[node.all_input_nodes[0]]:
                self._members.add(node)
            return
        if any(source in self._members for source in node.all_input_nodes):
            self._members.add(node)

    def streams(self, module: torch.nn.Module, node: fx.Node) -> list[str]:
        """Return the paths of a block call's arguments that carry the latent, in signature order."""
        leaves = named_leaves(module, node.args, node.kwargs, fx.Node)
        return [path for path, (_, source) in leaves.items() if self._everything or source in self._members]

    def settle(self, node: fx.Node, output_path: str | None) -> None:
        """Take in a block: only the output that continues its stream carries the latent (all, if ``None``)."""
        self._members.add(node)
        if output_path:
            head = output_path.split(".")[0]
            self._only[node] = int(head) if head.isdigit() else head
