"""Find out how the calls of a model are cut into samples, by running some of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffcr_surgery._tree import flatten, map_leaves, map_tensors
from diffcr_surgery.align.proof import tolerance
from diffcr_surgery.caches import is_quantized
from diffcr_surgery.errors import CannotCutError
from diffcr_surgery.split import Splitting, join, places, rows_of, select
from diffcr_surgery.trace.key import Call, copies, model_device
from diffcr_surgery.trace.perturb import generator
from diffcr_surgery.trace.recorder import writes
from diffcr_surgery.trace.reference import OUT_OF_MEMORY
from diffcr_surgery.trace.undisturbed import own_modules, undisturbed

__all__ = ["find_splitting"]

Run = Callable[[Call, list[Tensor]], Any]

# By these a hook that moves or casts the stored weights reads and writes them, and must not find noise there.
_STORES = frozenset("__get__ to cpu cuda float half bfloat16 double type clone detach pin_memory record_stream".split())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; a converted model goes on choosing its ratios as it did."""
    training = [module for module in own_modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Awake(TorchFunctionMode):
    """Puts noise in the place of weights that are all zero, as before training: they would hide every difference.

    It does so for the functions that this thread calls; the weights stay what they are, for another thread may be running the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        plain = [p for p in model.parameters() if not (p.is_meta or is_quantized(p)) and p.is_floating_point()]
        self.noise = {id(p): _other(p) * (p.shape[-1] if p.ndim > 1 else 25) ** -0.5 for p in plain if not p.any()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        written = {"out": kwargs["out"]} if "out" in kwargs else {}
        if getattr(func, "__name__", "") not in _STORES and not writes(func, {**kwargs, "out": None}):
            args, kwargs = map_tensors((args, kwargs), self._awake)
        return func(*args, **kwargs | written)

    def _awake(self, tensor: Tensor) -> Tensor:
        noise = self.noise.get(id(tensor))
        return tensor if noise is None else noise.to(tensor.device, tensor.dtype)  # a hook may have moved or cast the weight meanwhile


@torch.no_grad()
def find_splitting(model: nn.Module, forward: Callable[..., Any], call: Call, batch: int) -> Splitting:
    """Find out how calls like this one are cut into samples, and prove it: a sample alone is what it is in the batch.

    What has another length than the batch is shared. If the first and the last sample run alone do not equal the batch, other inputs
    are shared too: those whose other rows or entries touch the first sample.

    Args:
        model: The model.
        forward: Its unconverted forward.
        call: A call with ``batch`` samples, two or more.
        batch: b.
    """
    inputs = places(call.arguments)
    shared = frozenset(path for path, value in inputs.items() if len(value) != batch)
    found = _searched(model, forward, call, batch, shared)
    if not found.refusal or not any(module.training for module in model.modules()):
        return found
    with _evaluating(model):  # which other threads see, so it is left for models that have dropout
        return _searched(model, forward, call, batch, shared)


def _searched(model: nn.Module, forward: Callable[..., Any], call: Call, batch: int, shared: frozenset[str]) -> Splitting:
    awake = _Awake(model)
    with undisturbed(model, model_device(model, call.tensors)) as rewind:

        def run(call: Call, tensors: list[Tensor]) -> Any:
            rewind()
            args, kwargs = call.on(copies(tensors))
            with awake:
                return forward(*args, **kwargs)

        whole = run(call, call.tensors)
        if not all(bool(t.isfinite().all()) for t in flatten(whole)[1]):
            return Splitting(shared, refusal="its output holds what is no finite number, which cannot be compared")
        # Models round by themselves, too (Kandinsky 5 to bfloat16); a wrong cut is no matter of rounding.
        of_each_dtype = {t.dtype: t for t in (*model.parameters(), *flatten(whole)[1]) if t.is_floating_point()}
        limit = max(1e-2, *map(tolerance, of_each_dtype.values()))
        tried = _tried(run, call, whole, batch, shared, limit)
        if not tried.refusal:
            return tried
        alike = {path: value for path, value in places(call.arguments).items() if len(value) == batch}
        touching = shared | {path for path, value in alike.items() if _touches_first_sample(run, call, whole, value, batch)}
        plain = touching | {path for path, value in alike.items() if not flatten(value)[1]}  # numbers cannot be shaken
        for guess in dict.fromkeys((touching, plain)):
            found = _tried(run, call, whole, batch, guess, limit)
            if not found.refusal:
                return found
        return tried


def _tried(run: Run, call: Call, whole: Any, batch: int, shared: frozenset[str], limit: float) -> Splitting:
    """Cut the first and the last sample out of a call and compare."""
    ends = (0, batch - 1)
    try:
        cut = [select(call, [row], batch, shared) for row in ends]
        parts = [run(part, part.tensors) for part in cut]
        one, many = places(parts[0]), places(whole)
        lists = frozenset(p for p, value in many.items() if isinstance(value, list) and (len(value), len(one.get(p, ()))) == (batch, 1))
        wanted = map_leaves(whole, lambda _, leaf: rows_of(leaf, ends, batch), stop=lambda path, _: path in lists)
        gap = _gap(flatten(join(parts, [[0], [1]], lists))[1], flatten(wanted)[1])
    except CannotCutError as error:
        return Splitting(shared, refusal=error.why)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # whatever a model raises on a sample that was cut wrongly
        return Splitting(shared, refusal=f"one sample alone made the model raise {type(error).__name__}: {error}")
    if gap <= limit:
        return Splitting(shared, lists)
    return Splitting(shared, refusal="one sample alone gave another output than within its batch")


def _gap(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference relative to the spread; other shapes, and what is not finite, are infinitely far apart."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if b.numel()]
    gaps = [float((a - b).abs().max() / (b.std(correction=0) + 1e-30)) for a, b in pairs]
    return max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)


def _touches_first_sample(run: Run, call: Call, whole: Any, value: Any, batch: int) -> bool:
    """Tell whether changing all but the first row or entry of one input changes the first sample of the output."""
    if isinstance(value, list):
        swap = {id(t): _other(t) for t in flatten(value[1:])[1]}
    else:
        swap = {id(value): torch.cat([value[:1], _other(value[1:])])}
    try:
        changed = run(call, [swap.get(id(t), t) for t in call.tensors])
    except OUT_OF_MEMORY:
        raise
    except Exception:  # a value the model cannot take tells nothing; the comparison of samples is what decides
        return False

    def first(tree: Any) -> list[Tensor]:
        stop = lambda _, value: isinstance(value, list) and len(value) == batch  # noqa: E731
        return flatten(map_leaves(tree, lambda _, leaf: rows_of(leaf, (0,), batch), stop=stop))[1]

    return _gap(first(changed), first(whole)) > 1e-5


def _other(tensor: Tensor) -> Tensor:
    """Return a tensor with other entries; whole numbers, which may be indices, stay at 0 or go down by one."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor + torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator(0), device="cpu").to(tensor.device)
    return tensor - (tensor > 0).to(tensor.dtype)
