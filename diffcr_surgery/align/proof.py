"""The permutation proof: a block is routable when permuting its tokens permutes its output and nothing else.

The proof runs a copy of the block whose weights are shaken, so that zero-initialised gates hide nothing, on arguments the block
was really called with, shaken too, so that a mask of ones or a table of zeros hides nothing. The user's weights are never touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import fill, flatten, leaves_of, map_leaves
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.caches import bare_copy
from diffcr_surgery.tokens import gather_each, gather_tokens, per_sample, sample_axes
from diffcr_surgery.trace.key import device_of
from diffcr_surgery.trace.perturb import generator, normal
from diffcr_surgery.trace.reference import OUT_OF_MEMORY
from diffcr_surgery.trace.undisturbed import equal

__all__ = ["Stream", "Subject", "tolerance"]

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def tolerance(tensor: Tensor) -> float:
    """Return how far an output may differ and still count as equal, in units of its spread.

    Under autocast an output in single precision may stem from products in less, so the coarser of the two counts.
    """
    device = tensor.device.type
    dtypes = {tensor.dtype} | ({torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set())
    return max(_TOLERANCE.get(dtype, 1e-1) for dtype in dtypes)


@dataclass(frozen=True)
class Stream:
    """A way to read one argument as a stream of tokens.

    Attributes:
        index: Its index among the tensors.
        pattern: Its axes.
        moving: Which tokens may move, ``b n``; the others stay in their places.
    """

    index: int
    pattern: str
    moving: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens it has, those that stay among them."""
        return self.moving.shape[1]

    @property
    def batch(self) -> int | None:
        """Its batch axis, ``None`` if it is packed."""
        return parse_axes(self.pattern).batch


@dataclass
class Subject:
    """A shaken block with shaken arguments, on trial.

    Attributes:
        block: Callable copy of the block.
        tensors: Its tensor arguments.
        template: ``(args, kwargs)`` with slots.
        paths: Path of each tensor within ``(args, kwargs)``.
        baseline: Output tensors on these arguments.
        outputs: Path of each output tensor (``""`` for a lone one).
        read: Indices of the outputs that are used.
        overwritten: Indices of the arguments the block writes into.
        off: Paths of flags that say a mask is causal: true of tokens in order alone, so the mask has to speak for itself.
        original: The block as it is.
        upcast: Whether the copy is in single precision, autocast or not.
        draw: Number of the permutations it is tried on.
    """

    block: Callable[..., Any]
    tensors: list[Tensor]
    template: Any
    paths: list[str]
    baseline: list[Tensor]
    outputs: list[str]
    read: list[int]
    overwritten: set[int]
    off: dict[str, bool]
    original: nn.Module
    upcast: bool
    draw: int = 0

    @classmethod
    def prepare(cls, block: nn.Module, args: Any, kwargs: Any, unread: frozenset[str] = frozenset()) -> Subject:
        """Copy and shake ``block`` and its arguments; single precision where the block can, else its own."""
        paths, tensors, template = flatten((args, kwargs))
        off = _causal_flags(block, template, tensors)
        template = map_leaves(template, lambda path, leaf: off.get(path, leaf))
        failure: Exception | None = None
        for upcast, shake in ((True, True), (False, True), (True, False), (False, False)):
            twin = _shaken_copy(block, upcast, device_of(tensors))
            trial = [_shaken(t, generator(i + 1), upcast) if shake else _raised(t, upcast) for i, t in enumerate(tensors)]
            given = [t.clone() for t in trial]
            try:
                outputs, baseline = _call(twin, template, given)
            except OUT_OF_MEMORY:
                raise
            except Exception as error:  # whatever a block raises at values or dtypes it cannot take, the next form is milder
                failure = error
                continue
            read = [i for i, path in enumerate(outputs) if path not in unread]
            if all(bool(baseline[i].isfinite().all()) for i in read if baseline[i].is_floating_point()):
                written = {i for i, (t, before) in enumerate(zip(given, trial, strict=True)) if not equal(t, before)}
                return cls(twin, trial, template, paths, [t.clone() for t in baseline], outputs, read, written, off, block, upcast)
        raise RuntimeError(f"it cannot be run on its own: {failure or 'its output is not finite'}")

    def again(self) -> Iterator[Subject]:
        """Yield the same with two more draws of permutations, arguments and, shaken less, weights, as far as the block can take them."""
        for draw in (1, 2):
            twin = _shaken_copy(self.original, self.upcast, device_of(self.tensors), draw, by=0.5)
            other = self.on((_shaken(t, generator(1000 * draw + i), upcast=False) for i, t in enumerate(self.tensors)), twin)
            if other is not None:
                yield replace(other, draw=draw)

    def leveled(self, axes: dict[str, set[int]], but: Collection[str]) -> Subject | None:
        """Return the same with arguments that do not vary along given axes, except for some; ``None`` where the block cannot take them."""
        named = zip(self.paths, self.tensors, strict=True)
        return self.on(t if path in but else _level(t, axes.get(path, set())) for path, t in named)

    def on(self, tensors: Iterable[Tensor], block: Callable[..., Any] | None = None) -> Subject | None:
        """Return the same with other arguments, ``None`` where the block cannot take them."""
        block = self.block if block is None else block
        try:
            tensors = list(tensors)
            baseline = _call(block, self.template, [t.clone() for t in tensors])[1]
        except OUT_OF_MEMORY:
            raise
        except Exception:  # values out of its range, say
            return None
        if not all(bool(baseline[i].isfinite().all()) for i in self.read if baseline[i].is_floating_point()):
            return None
        return replace(self, block=block, tensors=tensors, baseline=[t.clone() for t in baseline])

    def error(self, patterns: dict[str, str], stream: Stream, outputs: Sequence[int], counts: dict[str, int] | None = None) -> float:
        """Return the largest relative error of equivariance under a random permutation of the moving tokens, another for each sample.

        Args:
            patterns: Path -> axis pattern of the arguments that move with the tokens (and ``"b"`` for batched ones).
            stream: The stream.
            outputs: Indices of the outputs that have to be permuted, and have its axes; all others have to stay.
            counts: Path -> another value for a number among the arguments.
        """
        order = _permutations(stream.moving, generator(self.draw)).to(self.tensors[stream.index].device)
        moved = self.run(patterns, stream, order, counts)
        plain = torch.arange(stream.tokens, device=order.device).expand_as(order)
        baseline = self.baseline if counts is None else self.run(patterns, stream, plain, counts)
        wanted = [gather_tokens(t, order, stream.pattern, stream.tokens) if i in outputs else t for i, t in enumerate(baseline)]
        if any(moved[i].shape != wanted[i].shape for i in self.read):
            return float("inf")
        return max(_gap(moved[i], wanted[i]) for i in self.read)

    def tolerance(self, output: Tensor) -> float:
        """Return how far an output may differ and still count as equal, in units of its spread."""
        return _TOLERANCE.get(output.dtype, 1e-1) if self.upcast else tolerance(output)

    def mixes(self, stream: int, output: int, axis: int) -> bool:
        """Tell whether changing the first half of the stream along ``axis`` changes the output of the rest."""
        size = self.tensors[stream].shape[axis]
        if size < 2:
            return False
        subjects = itertools.chain([self], self.again())  # sharp attention may look elsewhere
        return any(subject._heard(stream, axis, size // 2, output, axis, seed) for subject in subjects for seed in range(4))

    def shares(self, argument: int, axis: int, stream: int, batch: int) -> bool:
        """Tell whether samples share the entries of an argument along ``axis``: changing the first one changes other samples too."""
        shape = self.tensors[stream].shape
        outputs = [i for i in self.read if self.baseline[i].shape == shape]
        # In all of them, for one may be the text's, with its batch on another axis.
        return all(any(self._heard(argument, axis, 1, output, batch, seed) for seed in range(4)) for output in outputs)

    def _heard(self, argument: int, axis: int, count: int, output: int, along: int, seed: int) -> bool:
        """Tell whether changing the first entries of an argument along an axis changes all but as many of an output along another."""
        other = self._with_other(argument, axis, count, seed)
        if other is None:
            return False
        rest = self.baseline[output].shape[along] - count
        changed, before = (each.baseline[output].narrow(along, count, rest) for each in (other, self))
        return _gap(changed, before) > self.tolerance(before)

    def _with_other(self, argument: int, axis: int, count: int, seed: int) -> Subject | None:
        """Return the same with other first entries of an argument along an axis, ``None`` where the block cannot take them."""
        tensors = list(self.tensors)
        tensors[argument] = tensors[argument].clone()
        first = tensors[argument].narrow(axis, 0, count)
        first.copy_(_shaken(first, generator(seed), upcast=False))  # not shifted: a norm takes the same amount off every channel again
        return self.on(tensors)

    def batches(self, stream: Stream, output: int) -> dict[int, int] | None:
        """Return each output whose batch axis is not the stream's -> that axis, told by what changing the first sample changes.

        ``None`` where the block takes no other first sample, so that it cannot be told.
        """
        if not stream.batch:
            return {}
        samples = self.tensors[stream.index].shape[stream.batch]
        unsure = [i for i in self.read if i != output and self.baseline[i].shape[:1] == (samples,)]
        if not unsure:
            return {}
        other = next(filter(None, (self._with_other(stream.index, stream.batch, 1, seed) for seed in range(4))), None)
        if other is None:
            return None

        def of_samples(i: int, axis: int) -> bool:
            differs = other.baseline[i] != self.baseline[i]
            return axis < differs.ndim and differs.shape[axis] == samples and not bool(differs.narrow(axis, 1, samples - 1).any())

        return {i: 0 for i in unsure if not of_samples(i, stream.batch) and of_samples(i, 0)}

    @torch.no_grad()
    def run(self, patterns: dict[str, str], stream: Stream, kept: Tensor, counts: dict[str, int] | None = None) -> list[Tensor]:
        """Call the block on the chosen tokens, with everything that moves gathered alike.

        Args:
            patterns: Path -> axis pattern of what moves.
            stream: The stream.
            kept: Indices ``b k``.
            counts: Path -> another value for a number among the arguments.
        """
        template = map_leaves(self.template, lambda path, leaf: (counts or {}).get(path, leaf))
        apart = needs_samples(patterns, kept.shape[0])
        gathered = [
            _gathered(t, kept, patterns[path], stream.tokens, apart) if parse_axes(patterns.get(path, "-")).tokens else t.clone()
            for path, t in zip(self.paths, self.tensors, strict=True)
        ]
        if not apart:
            return _call(self.block, template, gathered)[1]
        args, kwargs = fill(template, gathered)
        return flatten(per_sample(self.block, args, kwargs, sample_axes(patterns), kept.shape[0], stream.batch or 0))[1]


def _permutations(moving: Tensor, source: torch.Generator) -> Tensor:
    """Return indices ``b n`` that permute the moving tokens of each sample at random; not those of all samples into where they were."""
    order = torch.arange(moving.shape[1], device="cpu").repeat(moving.shape[0], 1)
    places = [mark.nonzero().flatten().cpu() for mark in moving]
    for row, own in zip(order, places, strict=True):
        row[own] = own[torch.randperm(len(own), generator=source, device="cpu")]
    if bool((order.diff(dim=1) == 1).all()):
        for row, own in zip(order, places, strict=True):
            row[own] = own.roll(1)
    return order


def _causal_flags(block: nn.Module, template: Any, tensors: list[Tensor]) -> dict[str, bool]:
    """Return the flags that say of a mask that it is causal, switched off, if the mask then does the same by itself."""
    found = {path: False for path, flag in leaves_of(template, bool) if flag and path.endswith("is_causal")}
    if not found:
        return {}
    twin = bare_copy(block, device_of(tensors)).eval()
    without = map_leaves(template, lambda path, leaf: found.get(path, leaf))
    try:
        _, flagged = _call(twin, template, [t.clone() for t in tensors])
        _, masked = _call(twin, without, [t.clone() for t in tensors])
        same = all(_gap(a, b) <= tolerance(a) for a, b in zip(masked, flagged, strict=True))
    except OUT_OF_MEMORY:
        raise
    except Exception:  # a mask that does not fit, say; such a block is tried with its flags as they are
        return {}
    return found if same else {}


def _gathered(t: Tensor, kept: Tensor, pattern: str, tokens: int, apart: bool) -> Tensor:
    return (gather_each if apart and parse_axes(pattern).batch is None else gather_tokens)(t, kept, pattern, tokens)


def needs_samples(patterns: dict[str, str], samples: int) -> bool:
    """Tell whether a block has to run sample by sample: a token-indexed argument is shared by several samples."""
    return samples > 1 and any(parse_axes(p).tokens and parse_axes(p).batch is None for p in patterns.values())


@torch.no_grad()
def _call(block: Callable[..., Any], template: Any, tensors: list[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Call a block on tensors of its own: it may write into them."""
    args, kwargs = fill(template, tensors)
    paths, outputs, _ = flatten(block(*args, **kwargs))
    return paths, outputs


def _gap(one: Tensor, other: Tensor) -> float:
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    spread = float(other.double().std()) if other.numel() > 1 else 0.0
    gap = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    return gap / max(spread, 1e-6)


def _raised(t: Tensor, upcast: bool) -> Tensor:
    return t.float() if upcast and t.dtype in (torch.float16, torch.bfloat16) else t


def _shaken(t: Tensor, source: torch.Generator, upcast: bool) -> Tensor:
    """Return other values of the kind of ``t``, all entries distinct where the dtype allows."""
    t = _raised(t, upcast)
    if t.dtype == torch.bool:
        flips = torch.rand(t.shape, generator=source, device="cpu").to(t.device) < 0.25
        return t ^ flips
    if not (t.is_floating_point() or t.is_complex()):
        return t
    noise = normal(t.shape, source).to(t.device).to(t.dtype)
    finite = t[t.isfinite()]
    spread = finite.abs().std() if finite.numel() > 1 else finite.new_zeros(())
    return t + 0.5 * noise * torch.where(spread > 1e-6, spread, torch.ones_like(spread)).to(noise.dtype)


def _level(t: Tensor, axes: set[int]) -> Tensor:
    """Return ``t`` without change along some axes: everywhere the largest value, which a mask lets through; of complex ones the first."""
    for axis in axes:
        one = t.narrow(axis, 0, 1) if t.is_complex() else t.amax(axis, keepdim=True)
        t = one.expand_as(t)
    return t.contiguous()


def _shaken_copy(block: nn.Module, upcast: bool, device: torch.device, seed: int = 0, by: float = 1.0) -> Callable[..., Any]:
    twin = bare_copy(block, device).eval()
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters())
    if upcast and low:
        twin = twin.float()
    pool = normal((65_537,), generator(seed))  # drawing millions of numbers would cost as much as running the block
    with torch.no_grad():
        for p in twin.parameters():
            p.requires_grad_(False)
            if p.is_floating_point():
                fan_in = p.shape[-1] if p.ndim > 1 else 25
                noise = pool.repeat(-(-p.numel() // len(pool)))[: p.numel()].reshape(p.shape).to(p.device, p.dtype)
                p.add_(noise, alpha=by * fan_in**-0.5)
    return _without_autocast(twin, device) if upcast else twin


def _without_autocast(block: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return a block that runs in the precision of its weights, whatever is asked for around it."""
    if not torch.is_autocast_enabled(device.type):
        return block

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return block(*args, **kwargs)

    return run
