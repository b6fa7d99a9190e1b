"""Take over what a plan has proven where a block cannot be put on trial again: ``fully_shard`` leaves a process shards of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from diffcr_surgery._tree import flatten
from diffcr_surgery.align import Alignment
from diffcr_surgery.align.candidates import complete, prefix_of
from diffcr_surgery.axes import Axes, parse_axes
from diffcr_surgery.detect import by_sample, named_leaves
from diffcr_surgery.trace.reference import BlockSample

__all__ = ["align_as_planned"]


def align_as_planned(sample: BlockSample, streams: Mapping[str, Tensor], known: Alignment) -> Alignment:
    """Return what was proven of a block, for other arguments of the same form.

    The block is the same, so what moves with its tokens is too. That arguments are of the same form is checked: none is new, and those that
    move have as many entries as there are tokens or samples.

    Args:
        sample: Arguments the block was called with.
        streams: As for :func:`diffcr_surgery.align.align_block`.
        known: What was proven of the unsharded block.
    """
    if not known.stream:
        return known
    leaves = named_leaves(sample.module, sample.args, sample.kwargs, Tensor)
    numbers = {name: number for name, (_, number) in named_leaves(sample.module, sample.args, sample.kwargs, int).items()}
    if known.stream not in leaves or known.stream not in streams:
        return _refused(f"its argument {known.stream} does not carry the denoising stream, as it did when planned")
    if leaves.keys() - known.given:
        return _refused(f"it was planned without the arguments {sorted(leaves.keys() - known.given)}")
    pattern = known.axes[known.stream]
    batch = parse_axes(pattern).batch
    stream, mark = leaves[known.stream][1], streams[known.stream]
    moving = by_sample(mark, batch)
    samples, tokens, most = moving.shape[0], moving.shape[1], int(moving.sum(1).max())
    if most < 2:
        return dataclasses.replace(_refused("its stream holds a single token that stems from the latent"), tokens=1)
    if int(moving.sum(1).min()) < 1:
        return _refused("the stream of a sample holds no token that stems from the latent")
    moved = {name: words for name, words in known.axes.items() if parse_axes(words).tokens and name in leaves}
    sizes = {"n": (tokens,), "n-m": (tokens - prefix_of(moving),), "b": (samples,), "1": (1,)}
    for name, words in moved.items():
        tensor = leaves[name][1]
        if not _fits(tensor, parse_axes(words), sizes, tokens):
            shape = tuple(tensor.shape)
            return _refused(f"its argument {name} has the shape {shape}, which does not fit {words!r} with n = {tokens} and b = {samples}")
    counts = {name: word for name, word in known.counts.items() if name in numbers}
    wrong = sorted(name for name, word in counts.items() if word != "off" and numbers[name] != (most if word == "n" else tokens))
    if wrong:
        given = [numbers[name] for name in wrong]
        return _refused(f"its arguments {wrong} count the tokens ({tokens}, of which {most} may bypass), and are {given}")
    paths, tensors, _ = flatten((sample.args, sample.kwargs))
    at = None if batch is None else stream.shape[batch]
    by_path = {leaves[name][0]: words for name, words in moved.items()}
    names = {path: name for name, (path, _) in leaves.items()}
    axes = {names[path]: words for path, words in complete(by_path, dict(zip(paths, tensors, strict=True)), at, batch).items()}
    return dataclasses.replace(known, axes=axes, tokens=tokens, counts=counts)


def _fits(tensor: Tensor, axes: Axes, sizes: Mapping[str, tuple[int, ...]], tokens: int) -> bool:
    if tensor.ndim != len(axes.words):
        return False
    for word, size in zip(axes.words, tensor.shape, strict=True):
        fits = size >= tokens if word in ("m+n", "n+m") else size in sizes.get(word, (size,))
        if not fits:
            return False
    return True


def _refused(reason: str) -> Alignment:
    return Alignment(False, f"{reason}. Its weights are sharded, so that nothing can be proven anew: plan with such inputs, then shard")
