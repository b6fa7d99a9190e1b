"""Stage 2, detect: which blocks work on the denoising stream, and in which argument it reaches them.

Candidates come from the trace; here the dataflow from the latent input tells the denoising stream from text refiners and context
encoders. A joint block carries two streams; after the first one both stem from the latent, so a stream is followed from output to
output, not by ancestry alone.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import fx

from diffcr_surgery._tree import Slot, map_leaves
from diffcr_surgery.tokens import Spans

__all__ = ["Lineage", "bound_arguments", "latent_input", "named_leaves", "residual_after"]

# These move entries without looking at them, so they work on marks as they do on the tensors.
_MOVES = frozenset(
    """
    cat concat concatenate stack getitem reshape view flatten unflatten permute transpose swapaxes swapdims movedim t chunk split
    split_with_sizes tensor_split unbind narrow select pad expand expand_as repeat repeat_interleave tile squeeze unsqueeze flip roll
    contiguous clone detach pad_sequence view_as reshape_as broadcast_to hstack vstack T mT setitem copy_
    """.split()
)


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
    """Follows the latent through a graph, node by node in order, entry by entry.

    Every tensor gets a mark of its own shape that tells which entries stem from the latent. What moves entries (``cat``, slices,
    reshapes, padding) is carried out on the marks; what maps them one by one joins the marks of its operands. So text in front of the
    image tokens, registers and class tokens stay known, wherever the model puts them.
    """

    def __init__(self, latent: fx.Node | None) -> None:
        self._marks: dict[fx.Node, Any] = {}
        self._latent = latent

    def follow(self, node: fx.Node) -> None:
        """Take in a node that is no block."""
        if node.op == "placeholder":
            self._mark(node, node is self._latent or self._latent is None)
        elif node.op in ("call_function", "call_method", "call_module"):
            self._marks[node] = self._through(node)

    def streams(self, module: torch.nn.Module, node: fx.Node) -> list[str]:
        """Return the paths of a block call's arguments that carry the latent, in signature order."""
        leaves = named_leaves(module, node.args, node.kwargs, fx.Node)
        return [path for path, (_, source) in leaves.items() if _any(self._marks.get(source))]

    def staying(self, stream: fx.Node, tokens: int, batch: int | None) -> Spans:
        """Return which tokens of a block's stream do not stem from the latent: text, registers, class tokens. They never bypass."""
        mark = self._marks[stream].any(-1)
        if batch is None:
            rows = mark[None]
        else:
            rows = mark if (batch, tokens) == (0, 1) else mark.T
        if not bool(rows.any(1).all()):
            return ()
        spans = tuple(_spans(row) for row in rows.logical_not().tolist())
        return () if not any(spans) else spans[:1] if len(set(spans)) == 1 else spans

    def settle(self, node: fx.Node, stream: fx.Node | None, output_path: str | None, *, spread: bool = False) -> None:
        """Take in a block.

        Args:
            node: Its call.
            stream: The stream it routes; only the output that continues it carries the latent.
            output_path: Path of that output.
            spread: Whether all outputs carry the latent, as those of a block do that reads it and cannot be routed.
        """
        source = None if stream is None else self._marks[stream]
        head = (output_path or "").split(".")[0]
        if "shape" in node.meta:
            self._mark(node, spread, source)
            return
        for user in node.users:
            own = source is not None and user.target in (operator.getitem, getattr) and str(user.args[1]) == head
            self._mark(user, spread, source if own else None)

    def _mark(self, node: fx.Node, value: bool, mark: torch.Tensor | None = None) -> None:
        shape = node.meta.get("shape")
        if shape is not None:
            self._marks[node] = torch.full((), value).expand(shape) if mark is None else mark

    def _through(self, node: fx.Node) -> Any:
        if node in self._marks:  # an item of a block's output, settled with the block
            return self._marks[node]
        sources = [self._marks[source] for source in node.all_input_nodes if _any(self._marks.get(source))]
        if not sources and not _writes(node):
            return None if "shape" not in node.meta else torch.zeros((), dtype=torch.bool).expand(node.meta["shape"])
        name = getattr(node.target, "__name__", node.target) if node.op != "call_module" else ""
        if name in ("getitem", "getattr") and isinstance(self._marks.get(node.args[0]), _Spread):  # type: ignore[arg-type]
            return _joined(node, self._marks[node.args[0]].sources)  # type: ignore[index]
        if name in _MOVES:
            try:
                return self._moved(node)
            except Exception:  # an index that only the run knows, or arguments a mark cannot stand for
                pass
        return _joined(node, [tensor for mark in sources for tensor in _flat(mark)])

    def _moved(self, node: fx.Node) -> Any:
        """Carry a node that moves entries out on the marks."""

        def mark(source: fx.Node) -> Any:
            if source not in self._marks or self._marks[source] is None:
                raise LookupError(source)
            return self._marks[source]

        args: Any = fx.map_arg(node.args, mark)
        kwargs: Any = fx.map_arg(node.kwargs, mark)
        target: Any = node.target
        if _writes(node):
            target_node: Any = node.args[0]
            self._marks[target_node] = args[0].clone()
            args = (self._marks[target_node], *args[1:])
        made = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
        if isinstance(made, torch.Tensor) and tuple(made.shape) != tuple(node.meta["shape"]):
            raise LookupError(node)
        return made


def residual_after(output: fx.Node, stream: fx.Node, blocks: Container[fx.Node], is_update: Callable[[fx.Node], bool]) -> bool:
    """Tell whether a block's output is added to the stream it came from, as in ``x + block(norm(x))``.

    Args:
        output: Node of the block's output that continues the stream.
        stream: Node of the stream that entered.
        blocks: The block calls of the graph.
        is_update: Tells whether a module node maps zero to zero, so that an update may pass through it.
    """
    sources = _same_shape_ancestors(stream, blocks)
    here = output
    while len(here.users) == 1:
        (user,) = here.users
        name = "" if user.op == "call_module" else str(getattr(user.target, "__name__", user.target)).strip("_")
        if name in ("add", "iadd"):
            return any(other in sources for other in user.all_input_nodes if other is not here)
        scales = name == "mul" or (name in ("imul", "to", "contiguous", "clone", "dropout") and user.args[0] is here)
        lone = user.op == "call_module" and user not in blocks and user.args == (here,) and not user.kwargs
        if not (scales or (lone and is_update(user))):
            return False
        here = user
    return False


def _same_shape_ancestors(stream: fx.Node, blocks: Container[fx.Node]) -> set[fx.Node]:
    """Return the stream and what it was made from, as far back as the shape stays and no block lies between."""
    found, waiting = set(), [stream]
    while waiting:
        node = waiting.pop()
        if node not in found and node.meta.get("shape") == stream.meta["shape"]:
            found.add(node)
            waiting += [] if node in blocks else node.all_input_nodes
    return found


def _writes(node: fx.Node) -> bool:
    return node.target in (operator.setitem, "copy_")


def _flat(mark: Any) -> list[torch.Tensor]:
    return [mark] if isinstance(mark, torch.Tensor) else [t for item in mark for t in _flat(item)] if mark is not None else []


class _Spread(NamedTuple):
    """Marks that went into a call with several outputs."""

    sources: list[torch.Tensor]


def _any(mark: Any) -> bool:
    if isinstance(mark, torch.Tensor):
        return bool(mark.any())
    return any(map(_any, mark)) if isinstance(mark, (tuple, list)) else False


def _joined(node: fx.Node, sources: list[torch.Tensor]) -> Any:
    """Join marks entry by entry where shapes broadcast, else token by token; a function that does neither spreads the latent everywhere."""
    shape = node.meta.get("shape")
    if shape is None:
        return _Spread(sources)
    made = torch.zeros(shape, dtype=torch.bool)
    for mark in sources:
        try:
            made |= mark
        except RuntimeError:
            if len(shape) > 1 and mark.shape[:-1] == tuple(shape)[:-1]:
                made |= mark.any(-1, keepdim=True)
            else:
                made.fill_(True)
    return made


def _spans(row: list[bool]) -> tuple[tuple[int, int], ...]:
    """Return the runs of true entries as (start, stop).

    Example:
        >>> _spans([True, True, False, True])
        ((0, 2), (3, 4))
    """
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([False, *row, False])) if a != b]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
