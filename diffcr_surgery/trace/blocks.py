"""Which recorded module calls may be transformer blocks.

Judged by what ran, not by names: a call that takes a token stream and returns one of the same shape, that mixes tokens, and that holds an
MLP; and no call inside it does the same. The innermost such call is the block: a container of blocks never is. A call that adds to the
stream it was given is the block all the same when what looks like one inside it is but a part: attention with the MLP beside it in one
module, or attention with a gate and a mixture of experts. A class that has a declared pattern is a block whatever it does.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any

import torch

from diffcr_surgery._tree import flatten, freeze, leaves_of, map_leaves
from diffcr_surgery.patterns import pattern_of
from diffcr_surgery.trace.recorder import Frame, FunctionEvent, Meta, Recorder, Ref, function_name

__all__ = ["block_candidates", "block_kind", "refs_of"]

_ATTENTION = frozenset(
    "scaled_dot_product_attention multi_head_attention_forward flex_attention _native_multi_head_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention flash_attn_func flash_attn_varlen_func".split()
)
_PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ bmm baddbmm einsum".split())
# Gates of attention and of adaptive norms use these too, so they count as an MLP only where they widen the stream.
_WIDENING = frozenset("relu relu_ elu sigmoid sigmoid_ tanh leaky_relu".split())
_ACTIVATIONS = frozenset("gelu silu silu_ glu mish hardswish quick_gelu".split()) | _WIDENING


def refs_of(tree: Any) -> dict[str, int]:
    """Return dotted path -> number of every logged tensor in ``tree``."""
    return {path: ref.value for path, ref in leaves_of(tree, Ref)}


def _is_stream(meta: Meta) -> bool:
    return len(meta.shape) in (2, 3) and meta.dtype.is_floating_point


def _streams(recorder: Recorder, frame: Frame) -> list[int]:
    """Return the number of each argument that is a token stream and of the shape of one that is returned.

    Under autocast a stream may leave in another precision than it came in.
    """
    metas = recorder.meta
    shapes = {metas[value].shape for value in refs_of(frame.output).values() if _is_stream(metas[value])}
    given = refs_of((frame.args, frame.kwargs)).values()
    return [value for value in given if _is_stream(metas[value]) and metas[value].shape in shapes]


def _mixes(recorder: Recorder, event: FunctionEvent) -> bool:
    name = function_name(event.function)
    if name in _ATTENTION:
        return True
    operands = [value for value in refs_of((event.args, event.kwargs)).values() if value not in recorder.fresh]
    return name in _PRODUCTS and len(operands) >= 2


def _activated(recorder: Recorder, event: FunctionEvent, stream: int) -> int:
    """Return how many entries a call passes through the kind of nonlinearity that MLPs have."""
    name = function_name(event.function)
    if name not in _ACTIVATIONS:
        return 0
    sizes = (torch.Size(recorder.meta[value].shape).numel() for value in refs_of((event.args, event.kwargs)).values())
    size = max(sizes, default=0)
    return size if name not in _WIDENING or size > stream else 0


def _work(recorder: Recorder, frame: Frame, size: int) -> tuple[bool, bool]:
    """Return whether a call mixes tokens, and whether it passes a stream of ``size`` entries through the nonlinearity of an MLP."""
    functions = [event for event in frame.walk() if isinstance(event, FunctionEvent)]
    # Summed, since each of the experts of a mixture sees but a part of the tokens.
    return any(_mixes(recorder, each) for each in functions), sum(_activated(recorder, each, size) for each in functions) >= size


def _qualifies(recorder: Recorder, frame: Frame) -> bool:
    sizes = [torch.Size(recorder.meta[value].shape).numel() for value in _streams(recorder, frame)]
    return bool(sizes) and all(_work(recorder, frame, min(sizes)))


def block_candidates(recorder: Recorder, root: Frame) -> dict[int, bool]:
    """Return ``id`` of each module whose call is a transformer block -> whether it is but a half of one.

    Where no module holds attention and MLP together, as in ``for attend, feed in layers: x = attend(x) + x; x = feed(x) + x``, each half is
    taken by itself. So it is in a module that holds several such pairs, one after the other.
    """
    halved: set[int] = set()

    def visit(frame: Frame) -> list[Frame]:
        if frame is not root and pattern_of(frame.module) is not None:
            return [frame]
        inner = [found for event in frame.events if isinstance(event, Frame) for found in visit(event)]
        if frame is root or not _qualifies(recorder, frame):
            return inner
        if not inner:
            halves = _halves(recorder, frame, _main_stream(recorder, frame))
            return take(halves) if _repeats(halves) else [frame]
        parts = len({type(found.module) for found in inner}) == len(inner)
        return [frame] if parts and _adds_to_its_stream(recorder, frame) else inner

    def take(halves: list[tuple[Frame, bool]]) -> list[Frame]:
        halved.update(id(half.module) for half, _ in halves)
        return [half for half, _ in halves]

    found = visit(root)
    if not found:
        shapes = dict.fromkeys(_main_stream(recorder, f) for f in root.walk() if isinstance(f, Frame) and _streams(recorder, f))
        for halves in (_halves(recorder, root, shape) for shape in shapes if len(shape) == 3):
            if len({mixes for _, mixes in halves}) == 2:
                found += take(halves)
    return {id(frame.module): id(frame.module) in halved for frame in found}


def _main_stream(recorder: Recorder, frame: Frame) -> tuple[int, ...]:
    return recorder.meta[_streams(recorder, frame)[0]].shape


def _halves(recorder: Recorder, frame: Frame, shape: tuple[int, ...]) -> list[tuple[Frame, bool]]:
    """Return the innermost calls with weights that map a stream of this shape to one, and whether each mixes tokens or is an MLP."""
    found: list[tuple[Frame, bool]] = []
    for event in frame.events:
        if not isinstance(event, Frame):
            continue
        inner = _halves(recorder, event, shape)
        alike = any(recorder.meta[value].shape == shape for value in _streams(recorder, event))
        if not inner and alike and any(p.ndim > 1 for p in event.module.parameters()):
            mixes, activates = _work(recorder, event, torch.Size(shape).numel())
            inner = [(event, mixes)] if mixes or activates else []
        found += inner
    return found


def _repeats(halves: list[tuple[Frame, bool]]) -> bool:
    """Tell whether attention and MLP come by turns, twice at least."""
    wanted = [True, False, True, False]
    for _, mixes in halves:
        wanted = wanted[1:] if wanted and mixes == wanted[0] else wanted
    return not wanted


def _adds_to_its_stream(recorder: Recorder, frame: Frame) -> bool:
    """Tell whether a call adds something to a stream it was given, outside every inner call."""
    streams = set(map(recorder.origin, _streams(recorder, frame)))
    for event in frame.events:
        if not isinstance(event, FunctionEvent):
            continue
        operands = set(map(recorder.origin, refs_of((event.args, event.kwargs)).values()))
        if operands & streams:
            name = function_name(event.function).strip("_")
            if name in ("add", "iadd", "radd", "addcmul"):
                return True
            if name in ("to", "float", "type", "type_as", "clone", "contiguous"):
                streams |= set(refs_of(event.output).values())
    return False


_HOOKS = {"_hf_hook", "_old_forward", "_diffusers_hook", "forward"}  # of accelerate and diffusers, which may hold all weights
_OF_EVERY_MODULE = (vars(torch.nn.Module()).keys() | _HOOKS) - {"training"}
_DEPTH = 6  # of values within values that are looked into
_MANY = 1 << 16  # entries; more integers than that are packed weights


def _structure(module: torch.nn.Module) -> Hashable:
    return tuple(
        (
            name,
            type(m),
            tuple((k, _likeness(v, _DEPTH if _plain_weights(m) else 1)) for k, v in vars(m).items() if k not in _OF_EVERY_MODULE),
            tuple(p.shape for p in m.parameters(recurse=False)),
            tuple((k, _likeness(b)) for k, b in m._buffers.items()),
        )
        for name, m in module.named_modules()
    )


def _plain_weights(module: torch.nn.Module) -> bool:
    """Tell whether a module's weights are numbers, not packed ones with a state beside them that is as good as a weight."""
    return all(p is None or p.dtype.is_floating_point for p in module._parameters.values())


def _likeness(value: Any, depth: int = _DEPTH) -> Any:
    """Return what two values must share to mean the same to a block: content, or of an object its class and parts. Hashable."""
    if depth == 0 or isinstance(value, torch.nn.Module):
        return type(value)
    if isinstance(value, torch.Tensor):
        packed = value.numel() > _MANY and not value.dtype.is_floating_point and value.dtype != torch.bool
        return (value.shape, value.dtype, None if packed else _content(value))
    if isinstance(value, types.ModuleType):
        return value
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, types.MethodType):
        value = (value.__func__, value.__self__)
    if isinstance(value, types.FunctionType):
        value = (value.__code__, value.__defaults__, _closed_over(value))
    if isinstance(value, (tuple, list)):
        return (type(value), *(_likeness(each, depth - 1) for each in value))
    if isinstance(value, Mapping):
        return (type(value), *((key, _likeness(each, depth - 1)) for key, each in value.items()))
    attributes = None if isinstance(value, type) else getattr(value, "__dict__", None)
    if attributes is not None:
        return (type(value), _likeness(dict(attributes), depth - 1))
    value = frozenset(value) if isinstance(value, set) else value
    try:
        hash(value)
    except TypeError:
        return type(value)
    return (type(value), value)


def _content(tensor: torch.Tensor) -> int | None:
    """Return a hash of a tensor's bytes, if it gives them away; a sharded one or one on the meta device does not."""
    if tensor.is_meta or hasattr(tensor, "full_tensor"):
        return None
    try:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        return hash(plain.view(torch.uint8).numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError):  # a tensor of another kind
        return None


def _closed_over(function: types.FunctionType) -> list[Any]:
    """Return the values a function finds around its definition, if all of them are there."""
    with suppress(ValueError):
        return [cell.cell_contents for cell in function.__closure__ or ()]
    return []


def block_kind(recorder: Recorder, frame: Frame) -> Hashable:
    """Return what two block calls must share for one proof to serve both: structure of the module and of its arguments."""
    _, _, template = flatten((frame.args, frame.kwargs))
    shapes = tuple((path, recorder.meta[value]) for path, value in refs_of(template).items())
    anonymous = map_leaves(template, lambda _, leaf: None if isinstance(leaf, Ref) else leaf)
    return (_structure(frame.module), freeze(anonymous), shapes)
