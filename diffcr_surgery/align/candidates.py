"""Which axis patterns a tensor's shape allows, and in what order they are worth a trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from diffcr_surgery.align.proof import needs_samples
from diffcr_surgery.axes import TOKEN_WORDS

__all__ = ["by_likelihood", "combinations", "complete", "options_of", "prefix_lengths", "prefix_of", "stream_patterns"]

_NAMES = "cdefghijkl"


def complete(
    moved: dict[str, str],
    tensors: Mapping[str, Tensor],
    samples: int | None,
    batch: int | None,
    shares: Callable[[str, int], bool] = lambda path, axis: False,
) -> dict[str, str]:
    """Add the arguments that are batched besides those that move, where a block has to be run sample by sample.

    Args:
        moved: Path -> axis pattern of those that move.
        tensors: Path -> each argument.
        samples: b; ``None`` for a packed stream.
        batch: Axis of the batch in the stream; where another argument has that length elsewhere alone, it is there.
        shares: Tells of a path and an axis as long as the batch whether it is so by chance.
    """
    if samples is None or not needs_samples(moved, samples):
        return moved
    rest = {path: t.shape for path, t in tensors.items() if path not in moved}
    axes = {path: [at for at in _batch_axes(shape, (), samples, batch) if not shares(path, at)] for path, shape in rest.items()}
    return moved | {path: _words(rest[path], {}, found[0]) for path, found in axes.items() if found}


def by_likelihood(options: dict[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """Yield the options of each argument in four rounds, from the likely ones to all.

    Plain tokens come before tokens with a prefix or suffix, and patterns that leave the batch axis to the batch before those that take it.
    """
    plain = {"n", "n-m"}
    for words, with_batch in ((plain, True), (plain, False), (set(TOKEN_WORDS), True), (set(TOKEN_WORDS), False)):
        likely = {}
        for path, found in options.items():
            fitting = [o for o in found if words >= set(o.split()) & set(TOKEN_WORDS) and (not with_batch or o[0] != "z")]
            likely[path] = [o for o in fitting if with_batch and "b" in o.split()] or fitting
        yield likely


def combinations(groups: list[list[str]], options: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """Yield path -> axis pattern for sets of groups, the smallest first; the paths of a group move alike."""
    for size in range(len(groups) + 1):
        for chosen in itertools.combinations(groups, size):
            for patterns in itertools.product(*(options[group[0]] for group in chosen)):
                yield {path: axes for group, axes in zip(chosen, patterns, strict=True) for path in group}


def stream_patterns(stream: Tensor) -> list[str]:
    """Return the patterns a stream may have, the usual one first; none if it has too few or too many axes."""
    return {2: ["n c"], 3: ["b n c", "n b c"]}.get(stream.ndim, [])


def _batch_axes(shape: torch.Size, tokens: Collection[int], samples: int | None, batch: int | None) -> list[int]:
    """Return where the batch axis may be: where the stream has its own, or first."""
    order = dict.fromkeys(axis for axis in (batch, 0) if axis is not None)
    return [axis for axis in order if axis < len(shape) and axis not in tokens and shape[axis] == samples]


def _words(shape: torch.Size, tokens: Mapping[int, str], at: int | None) -> str:
    """Spell out a pattern: given token axes, then the batch axis, then plain names."""
    names = iter(_NAMES)
    return " ".join(tokens.get(i) or ("b" if i == at else "1" if shape[i] == 1 else next(names)) for i in range(len(shape)))


def prefix_of(moving: Tensor) -> int:
    """Return how many tokens stay in front of those that may bypass, 0 where it is not the same in all samples."""
    lengths = moving.sum(1)
    ahead = moving.shape[1] - int(lengths[0])
    return ahead if bool((lengths == lengths[0]).all()) and bool(moving[:, ahead:].all()) else 0


def prefix_lengths(tensors: Collection[Tensor]) -> set[int]:
    """Return the lengths a prefix or suffix may have: the sizes seen anywhere in the arguments."""
    sizes = {size for t in tensors for size in t.shape}
    return sizes | {a + b for a in sizes for b in sizes}


def options_of(t: Tensor, tokens: int, samples: int | None, batch: int | None, prefixes: set[int], ahead: int) -> list[str]:
    """Return the patterns under which ``t`` could be indexed by token, the plain ones first."""
    found: list[str] = []
    longer = {size for size in t.shape if size > tokens and size - tokens in prefixes}
    sizes = {"n": {tokens}, "m+n": longer, "n+m": longer, "n-m": {tokens - ahead} if ahead else set()}
    for word in TOKEN_WORDS:
        axes = [i for i, size in enumerate(t.shape) if size in sizes[word]]
        for count in (1, 2):
            for chosen in itertools.combinations(axes, count):
                if len({t.shape[i] for i in chosen}) > 1:
                    continue
                # Last, that none is the batch's: a table for all samples has an axis as long as the batch by chance.
                for at in (*_batch_axes(t.shape, chosen, samples, batch), None):
                    found.append(_words(t.shape, dict.fromkeys(chosen, word), at))
    # A leading 1 is stretched over the batch; a block that cannot take that may still run sample by sample.
    return found + [pattern.replace("1", "z", 1) for pattern in found if pattern.startswith("1 ") and samples != 1]
