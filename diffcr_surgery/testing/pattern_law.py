"""Law 7, for one block: a declared pattern is true of it, says no more than is needed, and the library's own proof agrees."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import flatten, map_leaves, map_tensors
from diffcr_surgery.align import align_block
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.detect import named_leaves
from diffcr_surgery.patterns import BlockPattern, names_class
from diffcr_surgery.testing.by_hand import gather
from diffcr_surgery.testing.compare import LawError, first_difference
from diffcr_surgery.trace.reference import OUT_OF_MEMORY, BlockSample

__all__ = ["check_pattern"]

_LAW = "check_pattern"
_TOLERANCE = 1e-4


def check_pattern(pattern: BlockPattern, block: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> None:
    """Check law 7: permuting the tokens of all declared arguments permutes the block's output and nothing else.

    And: it runs on fewer tokens; every declared argument has to move; the library's own proof accepts the pattern, and rejects it with any
    argument left out. The block and its arguments are copied, onto the CPU, and shaken first, so that zero gates and masks of ones hide
    nothing. Of the outputs, the number of axes is compared. Declared arguments that the call leaves out, or gives as ``None``, are not
    tested.

    Args:
        pattern: The declaration.
        block: A block of the class it is for, in single precision.
        inputs: Arguments of one call of the block: keyword arguments, or a tuple of positional ones. At least two tokens.

    Raises:
        LawError: Naming the argument, sample or token.

    Example:
        >>> from diffcr_surgery.testing import Architecture, Denoiser
        >>> block = Denoiser(Architecture(rotary="shared")).blocks[0]
        >>> angles = torch.randn(5, 4)
        >>> pattern = BlockPattern("example", "diffcr_surgery.testing.denoisers:Block", {"x": "b n c", "rotary.0": "n d"})
        >>> try:
        ...     check_pattern(pattern, block, {"x": torch.randn(2, 5, 4), "rotary": (angles.cos(), angles.sin())})
        ... except LawError as error:
        ...     print(str(error).split(". ")[-1])
        'rotary.1' has to move with the tokens too, as 'n d'.
    """
    name = f"{type(block).__module__}:{type(block).__qualname__}"
    if not any(names_class(pattern.target, cls) for cls in type(block).__mro__):
        raise LawError(f"{_LAW}: {pattern.name!r} is for {pattern.target}; the block is a {name}.")
    parameters = inspect.signature(block.forward).parameters
    unknown = [argument for argument in pattern.inputs if argument.split(".")[0] not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise LawError(f"{_LAW}: {pattern.name!r} declares {unknown}; the forward of {name} takes {sorted(parameters)}.")
    trial = _Trial(pattern, block, inputs)
    declared = dict(pattern.inputs)
    complaint = trial.complaint(declared)
    if complaint is not None:
        raise LawError(f"{_LAW}: {pattern.name!r} does not hold for {name}: {complaint}{trial.remedy(declared)}")
    for argument in [argument for argument in trial.moving(declared) if argument != trial.stream]:
        fewer = {other: words for other, words in declared.items() if other != argument}
        if trial.complaint(fewer) is None:
            raise LawError(f"{_LAW}: {pattern.name!r} moves {argument!r}, which need not move: routing would throw its content away.")
    trial.check_proof(pattern, declared)


class _Trial:
    def __init__(self, pattern: BlockPattern, block: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> None:
        self.block = _shaken_block(block)
        block = copy.deepcopy(block).cpu()
        given = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
        args, kwargs = map_tensors(given, lambda tensor: tensor.detach().cpu())
        self.original, self.raw = block, (args, kwargs)
        self.given = self._bearable((args, kwargs))
        self.named = named_leaves(self.block, self.given[0], self.given[1], Tensor)
        self.stream, words = next(iter(pattern.inputs.items()))
        if self.stream not in self.named:
            raise LawError(f"{_LAW}: {pattern.name!r} names the stream {self.stream!r}; the call's tensors are {sorted(self.named)}.")
        self._check_declared(pattern)
        self.axes = parse_axes(words)
        shape = self.named[self.stream][1].shape
        if len(self.axes.words) != len(shape):
            raise LawError(f"{_LAW}: {pattern.name!r} writes {words!r} for {self.stream!r}, which has the shape {tuple(shape)}.")
        self.tokens = shape[self.axes.tokens[0]]
        self.samples = 1 if self.axes.batch is None else shape[self.axes.batch]
        if self.tokens < 2:
            raise LawError(f"{_LAW}: the stream {self.stream!r} of shape {tuple(shape)} holds a single token; give at least two.")
        ahead = [self.tokens - self._size(name, w) for name, w in pattern.inputs.items() if "n-m" in w.split() and name in self.named]
        self.ahead = max(ahead, default=0)
        self.plain = self._run({}, [torch.arange(self.tokens)] * self.samples)
        ranks = [t.ndim for t in self.plain[1]]
        if pattern.outputs and [len(parse_axes(words).words) for words in pattern.outputs] != ranks:
            raise LawError(f"{_LAW}: {pattern.name!r} writes its outputs {list(pattern.outputs)}; they have {ranks} axes.")

    def _check_declared(self, pattern: BlockPattern) -> None:
        """Refuse what is declared to move, is no tensor of this call, and belongs to an argument that was given."""
        leaves = named_leaves(self.block, self.given[0], self.given[1], object)
        empty = {name for name, (_, leaf) in leaves.items() if leaf is None}
        given = {name.split(".")[0] for name in leaves.keys() - empty}
        declared = [name for name, words in pattern.inputs.items() if parse_axes(words).tokens and name.split(".")[0] in given]
        unknown = [name for name in declared if name not in self.named.keys() | empty]
        if unknown:
            raise LawError(f"{_LAW}: {pattern.name!r} declares {unknown}; the call's tensors are {sorted(self.named)}.")

    def _size(self, name: str, words: str) -> int:
        size: int = self.named[name][1].shape[words.split().index("n-m")]
        return size

    def _bearable(self, given: Any) -> Any:
        """Return the arguments shaken, or as they are where the block cannot bear that (a mask may not hide all)."""
        source = torch.Generator().manual_seed(1)

        def shake(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.dtype == torch.bool:
                return leaf ^ (torch.rand(leaf.shape, generator=source) < 0.25)
            return leaf + 0.5 * torch.randn(leaf.shape, generator=source) if leaf.is_floating_point() else leaf

        shaken = map_leaves(given, shake)
        try:
            with torch.no_grad():
                sound = all(bool(t.isfinite().all()) for t in flatten(self.block(*shaken[0], **shaken[1]))[1])
        except OUT_OF_MEMORY:
            raise
        except Exception:  # whatever a block raises at values it cannot take
            sound = False
        return shaken if sound else given

    def moving(self, declared: Mapping[str, str]) -> list[str]:
        """Return the declared arguments that this call has, and that move."""
        return [name for name, words in declared.items() if name in self.named and parse_axes(words).tokens]

    @torch.no_grad()
    def _run(self, declared: Mapping[str, str], orders: list[Tensor]) -> tuple[list[str], list[Tensor]]:
        """Run the block with the tokens of all that moves in the given order; each sample in a run of its own, all gathered alike."""
        paths: list[str] = []
        rows: list[list[Tensor]] = []
        for sample, order in enumerate(orders):
            moved = {}
            for name in self.moving(declared):
                raw, leaf = self.named[name]
                moved[raw] = gather(leaf, declared[name].split(), order, self.tokens)
            args, kwargs = self._with(moved)
            paths, outputs, _ = flatten(self.block(*args, **kwargs))
            if self.axes.batch is None:
                return paths, outputs
            rows.append([self._row(output, sample) for output in outputs])
        return paths, [torch.stack(column) for column in zip(*rows, strict=True)]

    def _with(self, moved: Mapping[str, Tensor]) -> Any:
        """Return the arguments with some exchanged, all the block's to write into."""

        def own(path: str, leaf: Any) -> Any:
            return moved.get(path, leaf.clone() if isinstance(leaf, Tensor) else leaf)

        return map_leaves(self.given, own)

    def _row(self, output: Tensor, sample: int) -> Tensor:
        """Return one sample of an output, its tokens in front if it is like the stream."""
        batch, token = self.axes.batch or 0, self.axes.tokens[0]
        stream = self.named[self.stream][1]
        if output.ndim == stream.ndim and output.shape[-1] == stream.shape[-1] and output.shape[batch] == self.samples:
            return output.movedim((batch, token), (0, 1))[sample]
        return output[sample] if output.ndim and output.shape[0] == self.samples else output

    def complaint(self, declared: Mapping[str, str]) -> str | None:
        """Return what is wrong with a declaration; ``None`` if it is true."""
        for name in self.moving(declared):
            problem = self._fits(name, declared[name])
            if problem:
                return problem
        source = torch.Generator().manual_seed(0)
        orders = []
        for _ in range(self.samples):
            own = torch.arange(self.tokens)
            own[self.ahead :] = self.ahead + _mixed(self.tokens - self.ahead, source)
            orders.append(own)
        try:
            paths, moved = self._run(declared, orders)
            _, kept = self._run(declared, [torch.arange(self.ahead + (self.tokens - self.ahead + 1) // 2)] * self.samples)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # a wrong declaration may break the block in any way
            said = str(error).partition("\n")[0][:200]
            return f"the block raises {type(error).__name__} on permuted or on fewer tokens: {said}. "
        baseline = self.plain[1]
        streams = [i for i, t in enumerate(baseline) if self._like_stream(t)]
        complaints = [self._compare(paths, moved, baseline, orders, i) for i in streams]
        if not complaints:
            return f"none of its outputs has the form of {self.stream!r}. "
        if all(complaints):
            return complaints[0]
        stream_at = streams[complaints.index(None)]
        if kept[stream_at].shape[-2] >= baseline[stream_at].shape[-2]:
            return f"given half of the tokens, it still returns {kept[stream_at].shape[-2]}. "
        return None

    def _like_stream(self, output: Tensor) -> bool:
        stream = self.named[self.stream][1]
        return output.ndim == stream.ndim and output.shape[-2:] == (self.tokens, stream.shape[-1])

    def _compare(self, paths: list[str], moved: list[Tensor], baseline: list[Tensor], orders: list[Tensor], stream_at: int) -> str | None:
        for i, (path, one, other) in enumerate(zip(paths, moved, baseline, strict=True)):
            rows = orders if self.axes.batch is not None else orders[:1]
            wanted = other
            if i == stream_at:
                wanted = (
                    torch.stack([t[order] for t, order in zip(other, rows, strict=True)]) if self.axes.batch is not None else other[rows[0]]
                )
            if one.shape != wanted.shape:
                return f"its output {path or 'alone'} changes its shape. "
            index = first_difference(one, wanted, _TOLERANCE)
            if index is None:
                continue
            gap = abs(float(one[index]) - float(wanted[index]))
            if i != stream_at:
                return f"with the tokens permuted, its output {path} changes by {gap:.2g}, and should not. "
            sample, token = (index[0], index[1]) if self.axes.batch is not None else (0, index[0])
            return f"with the tokens permuted, token {int(rows[sample][token])} of sample {sample} comes out different by {gap:.2g}. "
        return None

    def _fits(self, name: str, words: str) -> str | None:
        shape, axes = self.named[name][1].shape, parse_axes(words)
        if len(shape) != len(axes.words):
            return f"{name!r} is written {words!r}, and has the shape {tuple(shape)}. "
        for word, size in zip(axes.words, shape, strict=True):
            wrong = {"n": size != self.tokens, "m+n": size < self.tokens, "n+m": size < self.tokens, "n-m": size > self.tokens}
            if wrong.get(word, False) or (word == "b" and size != self.samples):
                return f"{name!r} is written {words!r}, and has the shape {tuple(shape)} where n = {self.tokens} and b = {self.samples}. "
        return None

    def remedy(self, declared: Mapping[str, str]) -> str:
        """Return what one change would make the declaration true, for the message."""
        for name in [name for name in self.moving(declared) if name != self.stream]:
            if self.complaint({other: words for other, words in declared.items() if other != name}) is None:
                return f"It holds if {name!r} does not move."
        for name, (_, leaf) in self.named.items():
            for words in () if name in self.moving(declared) else _readings(leaf, self.tokens, self.samples):
                if self.complaint({**declared, name: words}) is None:
                    return f"{name!r} has to move with the tokens too, as {words!r}."
        return "No single argument more or less makes it true."

    def check_proof(self, pattern: BlockPattern, declared: dict[str, str]) -> None:
        """Require the library's proof to accept the declaration, and to reject it with an argument left out."""
        args, kwargs = self.raw  # which the proof shakes itself
        shape = self.named[self.stream][1].shape[:-1]
        mark = torch.ones(shape, dtype=torch.bool)
        mark.narrow(self.axes.tokens[0], 0, self.ahead).fill_(False)
        sample = BlockSample(self.original, args, kwargs)
        found = align_block(sample, {self.stream: mark}, dict(declared), search=False)
        if not found.routable:
            raise LawError(f"{_LAW}: {pattern.name!r} is true, but the library's proof rejects it: {found.reason}.")
        for name in [name for name in self.moving(declared) if name != self.stream]:
            fewer = {other: words for other, words in declared.items() if other != name}
            if align_block(sample, {self.stream: mark}, fewer, search=False).routable:
                raise LawError(f"{_LAW}: the library's proof accepts {pattern.name!r} without {name!r}, which has to move.")


def _shaken_block(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block).eval()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 25
                parameter.add_(torch.randn(parameter.shape, generator=source), alpha=fan_in**-0.5)
    return twin


def _mixed(count: int, source: torch.Generator) -> Tensor:
    """Return a permutation that leaves no token in its place where there are two or more."""
    order = torch.randperm(count, generator=source)
    turned = torch.empty_like(order)
    turned[order] = order.roll(1)
    return turned


def _readings(leaf: Tensor, tokens: int, samples: int) -> list[str]:
    """Return how a tensor could be indexed by token: one or two axes of that length."""
    names = "efghij"
    plain = [
        "b" if i == 0 and size == samples and leaf.ndim > 2 else "d" if i == leaf.ndim - 1 else names[i]
        for i, size in enumerate(leaf.shape)
    ]
    single = [" ".join("n" if i == at else word for i, word in enumerate(plain)) for at in range(leaf.ndim) if leaf.shape[at] == tokens]
    square = leaf.ndim >= 2 and leaf.shape[-1] == leaf.shape[-2] == tokens
    longer = [" ".join("m+n" if i == at else word for i, word in enumerate(plain)) for at in range(leaf.ndim) if leaf.shape[at] > tokens]
    return single + ([" ".join([*plain[:-2], "n", "n"])] if square else []) + longer
