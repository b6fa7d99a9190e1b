"""Fold a recorded run into a ``torch.fx.Graph`` in which blocks, and modules without blocks, are single nodes."""

from __future__ import annotations

import operator
import re
import types
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from diffcr_surgery._shards import is_sharded
from diffcr_surgery._tree import is_dataclass_value, leaves_of
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace.blocks import refs_of
from diffcr_surgery.trace.recorder import Effect, Frame, FunctionEvent, Recorder, Ref, function_name, has_hooks

__all__ = ["BuiltGraph", "StaleRecordingError", "build", "build_flow", "expect"]

_INLINE = (int, float, bool, str, complex, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)
_SIZED_BY_CONTENT = ("nonzero", "argwhere", "unique", "masked_select", "bincount")


class StaleRecordingError(Exception):
    """A value that the recording was specialised on came out differently; the caller records again."""


def expect(value: Any, recorded: Any) -> None:
    """Guard node: stop the run if a value read out of a tensor is not the recorded one."""
    if not _same(value, recorded):
        raise StaleRecordingError(f"recorded {recorded!r}, now {value!r}")


def _same(value: Any, recorded: Any) -> bool:
    """Tell whether two values, or lists or arrays of them, are equal; NaN, which is unlike itself, is as good as another."""
    same = value == recorded
    if bool(same.all() if hasattr(same, "all") else same):
        return True
    if type(value).__module__ == "numpy":
        value, recorded = value.tolist(), recorded.tolist()
    if isinstance(value, (list, tuple)):
        return len(value) == len(recorded) and all(map(_same, value, recorded))
    return bool(value != value and recorded != recorded)


@dataclass
class BuiltGraph:
    """A graph at block granularity.

    Attributes:
        graph: One placeholder per input tensor, then one per constant; the output is the tuple of output tensors.
        constants: Values of the constant placeholders: tensors and objects that stem from neither inputs nor parameters.
        output: The output's structure with a slot for each tensor.
        frames: The recorded call of each ``call_module`` node.
    """

    graph: fx.Graph
    constants: list[Any]
    output: Any
    frames: dict[fx.Node, Frame] = field(default_factory=dict)


def _unlogged(args: Any, kwargs: Any) -> None:
    """Stand in for what a module did unseen, in a graph that is never run."""


class _LeakError(Exception):
    """A tensor made inside a leaf module is used outside without having been returned."""


class _Builder:
    def __init__(self, recorder: Recorder, root: Frame, leaves: Collection[int], *, flow: bool = False) -> None:
        self.recorder = recorder
        self.flow = flow
        self.root = root
        self.leaves = leaves
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.frames: dict[fx.Node, Frame] = {}
        self.constants: list[Any] = []
        self.constant_nodes: dict[int, fx.Node] = {}
        self.last_placeholder: fx.Node | None = None
        self.grad = root.grad
        self.names = {id(tensor): name for name, tensor in root.module.named_buffers(remove_duplicate=False)}
        self.names.update({id(tensor): name for name, tensor in root.module.named_parameters(remove_duplicate=False)})

    # --- operands ------------------------------------------------------------------------------------------------
    def node_of(self, value: int) -> fx.Node:
        here: int | None = value
        while here is not None:
            if here in self.nodes:
                return self.nodes[here]
            if here in self.recorder.fresh:
                return self._fresh(here)
            here = self.recorder.alias.get(here)
        if self.flow and is_sharded(self.root.module):  # a weight that fully_shard has gathered inside a block
            self.nodes[value] = self._constant(object(), "gathered")
            return self.nodes[value]
        raise _LeakError(value)

    def _fresh(self, value: int) -> fx.Node:
        tensor = self.recorder.fresh[value]
        name = self.names.get(id(tensor))
        if name is None:
            node = self._constant(tensor, "constant")
        else:
            node = self.graph.get_attr(name)
        self.nodes[value] = node
        return node

    def _constant(self, value: Any, hint: str) -> fx.Node:
        if id(value) not in self.constant_nodes:
            self.constants.append(value)
            after = self.last_placeholder
            with self.graph.inserting_after(after) if after else self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.graph.placeholder(f"{hint}_{len(self.constants) - 1}")
            self.last_placeholder = self.constant_nodes[id(value)] = node
        return self.constant_nodes[id(value)]

    def operand(self, tree: Any) -> Any:
        """Turn a logged argument into an fx argument: nodes for tensors, constants for opaque objects."""
        if isinstance(tree, Ref):
            return self.node_of(tree.value)
        if is_dataclass_value(tree):
            fields = {name: self.operand(value) for name, value in vars(tree).items() if not name.startswith("_")}
            return self.graph.call_function(type(tree), kwargs=fields)
        if isinstance(tree, tuple):
            items = tuple(map(self.operand, tree))
            return type(tree)(*items) if hasattr(tree, "_fields") else items
        if isinstance(tree, list):
            return [self.operand(item) for item in tree]
        if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
            return {key: self.operand(value) for key, value in tree.items()}
        if isinstance(tree, slice):
            return slice(self.operand(tree.start), self.operand(tree.stop), self.operand(tree.step))
        if type(tree) in _INLINE:
            return tree
        return self._constant(tree, "object")

    def assign(self, node: fx.Node, output: Any) -> None:
        """Let the tensors of a logged output be known as ``node``, or as items taken out of it."""
        if isinstance(output, Ref):
            self.nodes[output.value] = node
            meta = self.recorder.meta[output.value]
            node.meta["shape"], node.meta["dtype"] = meta.shape, meta.dtype
            if self.flow and output.value in self.recorder.indices:
                node.meta["content"] = self.recorder.indices[output.value]
        elif is_dataclass_value(output):
            for name, value in vars(output).items():
                if refs_of(value):
                    self.assign(self.graph.call_function(getattr, (node, name)), value)
        elif isinstance(output, (tuple, list)):
            for index, value in enumerate(output):
                if refs_of(value):
                    self.assign(self.graph.call_function(operator.getitem, (node, index)), value)
        elif isinstance(output, dict):
            for key, value in output.items():
                if refs_of(value):
                    self.assign(self.graph.call_function(operator.getitem, (node, key)), value)

    # --- events --------------------------------------------------------------------------------------------------
    def emit(self, frame: Frame) -> None:
        for event in frame.events:
            if isinstance(event, FunctionEvent):
                self._state(event, function_name(event.function))
                self._function(event)
            elif id(event.module) in self.leaves:
                self._state(event, event.path)
                node = self.graph.call_module(event.path, self.operand(event.args), self.operand(event.kwargs))
                self.frames[node] = event
                if self.flow:
                    node.meta["outputs"] = event.output
                self.assign(node, event.output)
                if any(isinstance(inner, FunctionEvent) and self._sized_by_content(inner) for inner in event.walk()):
                    self._expect_shapes(event.output)
            else:
                self._refuse_hooks(event)
                self.emit(event)
                if self.flow:
                    self._close(event)

    def _refuse_hooks(self, frame: Frame) -> None:
        if not self.flow and has_hooks(frame.module):
            called = (inner.path for inner in frame.walk() if isinstance(inner, Frame) and id(inner.module) in self.leaves)
            raise TraceError(
                f"There is a hook on {frame.path!r} ({type(frame.module).__name__}), which holds blocks; the graph calls those and not the "
                f"module around them, so the hook would never run. Put it on a module that is called, such as {next(called, 'a block')!r}, "
                "or on the model itself, or take it off."
            )

    def _close(self, frame: Frame) -> None:
        """Let an output of a module that no logged function made (a custom kernel's) stem from all the module was given."""
        for value in refs_of(frame.output).values():
            try:
                self.node_of(value)
            except _LeakError:
                meta = self.recorder.meta[value]
                node = self.graph.call_function(_unlogged, (self.operand(frame.args), self.operand(frame.kwargs)))
                node.meta["shape"], node.meta["dtype"] = meta.shape, meta.dtype
                self.nodes[value] = node

    def _state(self, event: FunctionEvent | Frame, what: str) -> None:
        if self.flow:
            return
        if event.autocast != self.root.autocast:
            raise TraceError(
                f"{what} runs under another autocast state than the model itself ({event.autocast} inside, {self.root.autocast} outside). "
                "Move the autocast region into a submodule, which is kept whole, or run the whole model under autocast."
            )
        if event.inside is not None:
            name = f"{event.inside.__module__}.{event.inside.__qualname__}"
            raise TraceError(
                f"{what} runs inside the forward of {name}, a custom autograd function, and a recording cannot tell what its backward does "
                "with it. Call the function in a submodule, which is kept whole; if it is there for gradient checkpointing, use "
                "torch.utils.checkpoint with use_reentrant=False instead."
            )
        if event.grad != self.grad:
            self.graph.call_function(torch._C._set_grad_enabled, (event.grad,))
            self.grad = event.grad

    def _function(self, event: FunctionEvent) -> None:
        args, kwargs = self.operand(event.args), self.operand(event.kwargs)
        node = self._call(event.function, args, kwargs)
        if event.effect == Effect.READS and self.flow:
            return
        if event.effect == Effect.READS:
            inline = type(event.output) in (*_INLINE, list, tuple)
            if not inline and type(event.output).__module__ != "numpy":
                raise TraceError(
                    f"The model's forward passes a tensor to {function_name(event.function)}, which returns a "
                    f"{type(event.output).__name__}; no recording can tell whether its content changed. Move that part "
                    "into a submodule, which is kept whole."
                )
            recorded = self.operand(event.output) if inline else self._constant(event.output, "object")
            self.graph.call_function(expect, (node, recorded))
        else:
            self.assign(node, event.output)
            if self._sized_by_content(event):
                self._expect_shapes(event.output)

    def _sized_by_content(self, event: FunctionEvent) -> bool:
        """Tell whether the shape a call returns depends on what a tensor holds, as that of ``nonzero`` or ``x[mask]`` does.

        Wherever a tensor of whole numbers or booleans takes part other than entry by entry, it might.
        """
        recorder = self.recorder
        operands = [value for value in refs_of((event.args, event.kwargs)).values() if value in recorder.dynamic]
        if event.effect != Effect.MAKES or not operands:
            return False
        if function_name(event.function).startswith(_SIZED_BY_CONTENT):
            return True
        if function_name(event.function) == "__getitem__" and any(recorder.meta[v].dtype in (torch.bool, torch.uint8) for v in operands):
            return True
        discrete = [value for value in operands if not recorder.meta[value].dtype.is_floating_point]
        shapes = [recorder.meta[value].shape for value in operands]
        return bool(discrete) and any(recorder.meta[value].shape not in shapes for value in refs_of(event.output).values())

    def _expect_shapes(self, output: Any) -> None:
        if self.flow:
            return
        for value in refs_of(output).values():
            shape = self.graph.call_function(getattr, (self.node_of(value), "shape"))
            self.graph.call_function(expect, (shape, self.recorder.meta[value].shape))

    def _call(self, function: Any, args: Any, kwargs: Any) -> fx.Node:
        name = function_name(function)
        if getattr(function, "__name__", "") == "__get__":
            return self.graph.call_function(getattr, (args[0], name))
        if getattr(function, "__name__", "") == "__set__":
            return self.graph.call_function(setattr, (args[0], name, args[1]))
        if name in ("__getitem__", "__setitem__"):
            return self.graph.call_function(getattr(operator, name.strip("_")), args, kwargs)
        method = isinstance(function, (types.MethodDescriptorType, types.WrapperDescriptorType))
        method |= getattr(function, "__qualname__", "").startswith(("Tensor.", "TensorBase."))
        if method and hasattr(torch.Tensor, name) and args and isinstance(args[0], fx.Node):
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(function, args, kwargs)


def _leaves(root: Frame, blocks: Collection[int]) -> set[int]:
    """Modules called as one node: the blocks, and whatever holds none of them."""
    holders = {id(outer) for outer in root.module.modules() if any(id(m) in blocks for m in outer.modules())}
    return {id(m) for m in root.module.modules() if m is not root.module and (id(m) in blocks or id(m) not in holders)}


def build(recorder: Recorder, root: Frame, inputs: list[tuple[str, torch.Tensor]], output: Any, blocks: Collection[int]) -> BuiltGraph:
    """Fold the log of a run into a graph.

    Args:
        recorder: The recorder of the run.
        root: Its root frame.
        inputs: Name and tensor of each input, in placeholder order.
        output: The run's output structure with slots, in the order of the refs in ``root.output``.
        blocks: ``id`` of each module that is to be one node although it may hold others.

    Raises:
        TraceError: If a block hands a tensor to its surroundings other than by returning it.
    """
    leaves = _leaves(root, blocks)
    while True:
        builder = _Builder(recorder, root, leaves)
        try:
            return _fold(builder, inputs, output)
        except _LeakError as leak:
            culprit = _maker(root, leak.args[0], leaves)
            if culprit is None or id(culprit.module) in blocks:
                where = culprit.path if culprit else "an unknown place"
                raise TraceError(
                    f"A tensor made inside {where} is used outside of it without being returned; a recording cannot "
                    "cut the module there. Return the tensor from the module's forward."
                ) from None
            leaves = leaves - {id(m) for m in culprit.module.modules()} | {id(m) for m in culprit.module.children()}


def build_flow(recorder: Recorder, root: Frame, inputs: list[tuple[str, torch.Tensor]], blocks: Collection[int]) -> BuiltGraph:
    """Fold the log into a graph in which the blocks alone are nodes and all other modules are spread out, to follow data through.

    It is read, never run. Integer and boolean tensors carry their content in ``node.meta["content"]``.
    """
    return _fold(_Builder(recorder, root, blocks, flow=True), inputs, None)


def _maker(frame: Frame, value: int, leaves: Collection[int]) -> Frame | None:
    """Return the leaf frame inside which tensor ``value`` was made."""
    for event in frame.walk():
        if isinstance(event, Frame) and id(event.module) in leaves:
            for inner in event.walk():
                if value in refs_of(inner.output).values():
                    return event
    return None


def _fold(builder: _Builder, inputs: list[tuple[str, torch.Tensor]], output: Any) -> BuiltGraph:
    for name, tensor in inputs:
        node = builder.last_placeholder = builder.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
        node.meta["path"] = name
        if builder.flow and not (tensor.is_floating_point() or tensor.is_complex()):
            node.meta["content"] = tensor
        builder.nodes.setdefault(builder.recorder.origin(builder.recorder.number(tensor)), node)  # the first, of one tensor given twice
    builder.emit(builder.root)
    builder.graph.output(tuple(builder.node_of(ref.value) for _, ref in leaves_of(builder.root.output, Ref)))
    _drop_unused_items(builder.graph)
    builder.graph.lint()
    return BuiltGraph(builder.graph, builder.constants, output, builder.frames)


def _drop_unused_items(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in (operator.getitem, getattr) and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr" and not node.users:
            graph.erase_node(node)
