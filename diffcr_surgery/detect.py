"""Stage 2, detect: which blocks work on the denoising stream, and in which argument it reaches them.

Candidates come from the trace; here the dataflow from the latent input tells the denoising stream from text refiners and context
encoders. A joint block carries two streams; after the first one both stem from the latent, so a stream is followed from output to
output, not by ancestry alone.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from diffcr_surgery._tree import Slot, by_name, leaves_of, map_leaves
from diffcr_surgery.tokens import Spans
from diffcr_surgery.trace.reference import OUT_OF_MEMORY

__all__ = ["MOVES", "Lineage", "by_sample", "function_of", "latent_inputs", "named_leaves", "residual_after", "sources_of", "spans"]

# These move entries without looking at them, so they work on marks as they do on the tensors.
MOVES = frozenset(
    """
    cat concat concatenate stack getitem reshape view flatten unflatten permute transpose swapaxes swapdims movedim t chunk split
    split_with_sizes tensor_split unbind narrow select pad expand expand_as repeat repeat_interleave tile squeeze unsqueeze flip roll
    contiguous clone detach pad_sequence view_as reshape_as broadcast_to hstack vstack T mT H mH setitem copy index_select gather
    take_along_dim index_copy index_put scatter where adjoint data
    """.split()
)


def latent_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the input the model denoises: the first one shaped like an output, up to one axis (its channels).

    Falls back to the first floating-point input, in the order of the forward signature. Of a list of tensors, one a sample, all count.
    """
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = [tuple(node.meta["shape"]) for node in output.args[0] if "shape" in node.meta]
    inputs = [node for node in graph.nodes if node.op == "placeholder" and _is_float(node) and len(node.meta["shape"]) >= 2]
    alike = (node for node in inputs if any(_alike(node.meta["shape"], shape) for shape in results))
    found = next(alike, inputs[0] if inputs else None)
    if found is None:
        return set()
    owner = found.meta["path"].split(".")[0]
    return {node for node in inputs if node.meta["path"].split(".")[0] == owner}


def _alike(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(shape) == len(other) and sum(a != b for a, b in zip(shape, other, strict=True)) <= 1


def _is_float(node: fx.Node) -> bool:
    return getattr(node.meta.get("dtype"), "is_floating_point", False)


def named_leaves(module: torch.nn.Module, args: Any, kwargs: Any, kind: type) -> dict[str, tuple[str, Any]]:
    """Return path by argument name -> (path within ``(args, kwargs)``, leaf), for every leaf of a type in a block call."""
    found: list[tuple[str, Any]] = []

    def take(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, kind):
            return leaf
        found.append((path, leaf))
        return Slot(len(found) - 1)

    args, kwargs = map_leaves((args, kwargs), take)
    arguments = by_name(inspect.signature(module.forward).bind(*args, **kwargs))
    return {path: found[slot.index] for path, slot in leaves_of(arguments, Slot)}


def sources_of(module: torch.nn.Module, node: fx.Node) -> dict[str, fx.Node]:
    """Return path by argument name -> node that a block call gets there, in signature order."""
    return {path: source for path, (_, source) in named_leaves(module, node.args, node.kwargs, fx.Node).items()}


class Lineage:
    """Follows the latent through the flow of a recording, node by node in order, entry by entry.

    Every tensor gets a mark of its own shape that tells which entries stem from the latent. What moves entries (``cat``, slices,
    reshapes, padding, indexing) is carried out on the marks; what maps them one by one joins the marks of its operands. So text in front
    of the image tokens, registers and class tokens stay known, wherever the model puts them.

    Attributes:
        pinned: Inputs whose content says where entries move; what was found holds for that content alone.
    """

    def __init__(self, latent: set[fx.Node]) -> None:
        self.pinned: set[fx.Node] = set()
        self._marks: dict[fx.Node, Any] = {}
        self._latent = latent

    def follow(self, node: fx.Node) -> None:
        """Take in a node that is no block."""
        if node.op == "placeholder":
            self._mark(node, node in self._latent or not self._latent)
        elif node.op in ("call_function", "call_method") and node not in self._marks:  # an item of a block is settled with the block
            self._marks[node] = self._through(node)

    def streams(self, sources: Mapping[str, fx.Node]) -> dict[str, torch.Tensor]:
        """Return path -> mark ``b n`` of those arguments of a block call that carry the latent, in their order."""
        found = {path: self._marks.get(source) for path, source in sources.items() if _is_float(source)}
        return {path: mark.any(-1) for path, mark in found.items() if isinstance(mark, torch.Tensor) and mark.ndim > 1 and mark.any()}

    def carries(self, node: fx.Node) -> bool:
        """Tell whether anything in a node's value stems from the latent."""
        return _any(self._marks.get(node))

    def settle(self, node: fx.Node, stream: fx.Node, output_path: str) -> None:
        """Take in a routed block: only the output that continues its stream carries the latent, token by token as it came."""
        head = output_path.split(".")[0]
        for output in self._outputs(node):
            own = output is node or str(output.args[1]) == head
            self._mark(output, False, self._marks[stream] if own else None)

    def settle_dense(self, module: torch.nn.Module, node: fx.Node) -> None:
        """Take in a block that is not routed: an output shaped like a stream it read carries that on, any other all of the latent."""
        marks = map(self._marks.get, sources_of(module, node).values())
        marked = [mark for mark in marks if _any(mark) and isinstance(mark, torch.Tensor)]
        for output in self._outputs(node):
            alike = next((mark for mark in marked if tuple(mark.shape) == output.meta.get("shape")), None)
            self._mark(output, bool(marked), alike)

    def _outputs(self, node: fx.Node) -> list[fx.Node]:
        return [node] if "shape" in node.meta else [user for user in node.users if user.target in (operator.getitem, getattr)]

    def _mark(self, node: fx.Node, value: bool, mark: torch.Tensor | None = None) -> None:
        shape = node.meta.get("shape")
        if shape is not None:
            self._marks[node] = _uniform(value, shape) if mark is None else mark

    def _through(self, node: fx.Node) -> Any:
        sources = [self._marks[source] for source in node.all_input_nodes if _any(self._marks.get(source))]
        if not sources:
            return None if "shape" not in node.meta else _uniform(False, node.meta["shape"])
        owner: Any = node.args[0] if node.args else None
        if node.target in (operator.getitem, getattr) and isinstance(self._marks.get(owner), _Spread):
            return _joined(node, self._marks[owner].sources)
        if function_of(node) in MOVES:
            try:
                return self._moved(node)
            except OUT_OF_MEMORY:
                raise
            except Exception:  # an index whose content is not known, or arguments a mark cannot stand for
                pass
        return _joined(node, [tensor for mark in sources for tensor in _flat(mark)])

    def _moved(self, node: fx.Node) -> Any:
        """Carry a node that moves entries out on the marks."""
        pins: set[fx.Node] = set()

        def mark(source: fx.Node) -> Any:
            found = self._marks.get(source)
            if "content" in source.meta and not _any(found):
                pins.update(_origins(source))
                return source.meta["content"].cpu()  # marks live there
            if found is None:
                raise LookupError(source)
            return found

        args: Any = fx.map_arg(node.args, mark)
        kwargs: Any = fx.map_arg(node.kwargs, mark)
        target: Any = node.target
        if _writes(node) and 0 in args[0].stride():  # one entry stands for many; else a write through a view reaches its base, as it should
            args = (args[0].clone(), *args[1:])
        made = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
        if node.target is operator.setitem:
            owner: Any = node.args[0]
            self._marks[owner], made = args[0], None
        elif isinstance(made, torch.Tensor) and (tuple(made.shape) != tuple(node.meta["shape"]) or made.dtype != torch.bool):
            raise LookupError(node)
        self.pinned |= pins
        return _compact(made)


def residual_after(output: fx.Node, stream: fx.Node, blocks: Container[fx.Node], lineage: Lineage) -> bool | None:
    """Tell whether a block's output is added to the stream it came from, as in ``x + gate * block(norm(x))`` or ``x + (a(y) + b(y))``.

    Args:
        output: Node of the block's output that continues the stream, in the flow of the recording.
        stream: Node of the stream that entered.
        blocks: The block calls.
        lineage: What stems from the latent, so far.

    Returns:
        ``None`` if the two meet in a way that an update of zero might not leave the stream as it was.
    """
    ancestors = _ancestors(stream, blocks, lineage, mixed=True)  # what may be the stream, or a part of it only
    sources = _ancestors(stream, blocks, lineage, mixed=False)
    here = output
    while len(here.users) == 1:
        (user,) = here.users
        if function_of(user) in ("add", "iadd") and any(_holds(other, sources) for other in user.all_input_nodes if other is not here):
            return True
        if function_of(user) == "addcmul" and user.args[0] is not here and _holds(user.all_input_nodes[0], sources):
            return True
        sums_or_scales = function_of(user) in ("add", "iadd", "radd", "mul")  # with other updates, perhaps, on the way to the stream
        if not (sums_or_scales or (function_of(user) in _KEEPS_ZERO and user.args[0] is here)):
            break
        here = user
    return None if _meets(output, ancestors, blocks) else False


def _ancestors(stream: fx.Node, blocks: Container[fx.Node], lineage: Lineage, *, mixed: bool) -> set[fx.Node]:
    """Return what a stream was made from, as far as no block lies between; what two streams were mixed to only if so asked.

    A token of a sum is neither of its terms: `x0 + block(norm(x0 + y))` does not give back what the block was given.
    """
    found: set[fx.Node] = set()
    waiting = [stream]
    while waiting:
        node = waiting.pop()
        if node in found or not lineage.carries(node):
            continue
        found.add(node)
        sources = [] if node in blocks else list(filter(lineage.carries, node.all_input_nodes))
        if not mixed and len(sources) > 1 and function_of(node) not in ("cat", "concat", "concatenate"):
            sources = [source for source in sources if source.meta.get("shape") == node.meta.get("shape")]  # the rest modulates
            sources = sources if len(sources) == 1 else []
        waiting += sources
    return found


def _meets(output: fx.Node, sources: set[fx.Node], blocks: Container[fx.Node]) -> bool:
    """Tell whether what a block made comes together with the stream it came from before the next block."""
    seen, waiting = {output}, list(output.users)
    while waiting:
        node = waiting.pop()
        if node in seen or node in blocks:
            continue
        seen.add(node)
        if any(_holds(other, sources) for other in node.all_input_nodes if other not in seen):
            return True
        waiting += node.users
    return False


def _holds(node: fx.Node, sources: set[fx.Node]) -> bool:
    """Tell whether a node is the stream, or a sum with it: parallel branches are added one after the other."""
    return node in sources or (function_of(node) in ("add", "iadd") and any(_holds(other, sources) for other in node.all_input_nodes))


_KEEPS_ZERO = frozenset(
    """
    imul div to type float half bfloat16 contiguous clone dropout getitem view reshape flatten unflatten permute transpose movedim
    T mT H mH adjoint data squeeze unsqueeze narrow
    """.split()
)


def function_of(node: fx.Node) -> str:
    """Return the short name of the function or method that a node calls, or of the attribute that it reads."""
    if node.target is getattr:
        return str(node.args[1])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_")


def _origins(node: fx.Node) -> set[fx.Node]:
    """Return the inputs an index stems from.

    Raises:
        LookupError: If one is a floating-point tensor, or stems from a block, so that its content differs from call to call.
    """
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        if here.op == "call_module" or (here.op == "placeholder" and "content" not in here.meta):
            raise LookupError(here)
        found |= {here} if here.op == "placeholder" else set()
        waiting += here.all_input_nodes
    return found


def by_sample(mark: torch.Tensor, batch: int | None) -> torch.Tensor:
    """Return which tokens of a stream stem from the latent, ``b n``.

    Args:
        mark: The same as the stream has its axes: ``b n``, ``n b``, or ``n``.
        batch: Batch axis.
    """
    return mark[None] if batch is None else mark if batch == 0 else mark.T


def spans(mark: torch.Tensor, batch: int | None) -> Spans:
    """Return which tokens of a stream do not stem from the latent, for :func:`staying_tokens`; of the arguments of :func:`by_sample`."""
    found = tuple(_runs(row) for row in by_sample(mark, batch).logical_not().tolist())
    return () if not any(found) else found[:1] if len(set(found)) == 1 else found


def _writes(node: fx.Node) -> bool:
    return node.target is operator.setitem or (isinstance(node.target, str) and node.target.endswith("_"))


def _flat(mark: Any) -> list[torch.Tensor]:
    return [mark] if isinstance(mark, torch.Tensor) else [t for item in mark for t in _flat(item)] if mark is not None else []


class _Spread(NamedTuple):
    """Marks that went into a call with several outputs."""

    sources: list[torch.Tensor]


def _any(mark: Any) -> bool:
    if isinstance(mark, torch.Tensor):
        return bool(mark.any())
    return any(map(_any, mark)) if isinstance(mark, (tuple, list)) else False


def _uniform(value: bool, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full((), value, device="cpu").expand(shape)


def _compact(mark: Any) -> Any:
    """Let one entry stand for all channels of a large mark that tells none from another: marks are as large as activations otherwise."""
    if isinstance(mark, torch.Tensor) and mark.numel() > 1 << 20 and mark.stride(-1) != 0 and bool((mark == mark[..., :1]).all()):
        return mark[..., :1].clone().expand(mark.shape)
    return mark


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _joined(node: fx.Node, sources: list[torch.Tensor]) -> Any:
    """Join marks entry by entry where shapes broadcast, else token by token; a function that does neither spreads the latent everywhere."""
    shape = node.meta.get("shape")
    if shape is None:
        return _Spread(sources)
    if not shape:
        return _uniform(any(map(_any, sources)), shape)
    narrow = all(mark.ndim and (mark.shape[-1] == 1 or mark.stride(-1) == 0) for mark in sources)
    made = torch.zeros((*shape[:-1], 1) if narrow else shape, dtype=torch.bool, device="cpu")
    for mark in sources:
        tokens = mark[..., :1] if narrow else mark
        if _broadcasts(tokens.shape, made.shape):
            made |= tokens
        elif len(shape) > 1 and mark.shape[:-1] == made.shape[:-1]:
            made |= mark.any(-1, keepdim=True)
        else:
            return _uniform(True, shape)
    return _compact(made.expand(shape) if narrow else made)


def _runs(row: list[bool]) -> tuple[tuple[int, int], ...]:
    """Return the runs of true entries as (start, stop).

    Example:
        >>> _runs([True, True, False, True])
        ((0, 2), (3, 4))
    """
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([False, *row, False])) if a != b]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
