"""Move tokens: choose the kept ones, gather them from any layout, put them back.

Shapes: ``b`` samples, ``n`` tokens, ``k`` kept tokens, ``c`` channels. ``kept`` is always ``b k``, an index into the tokens per sample.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffcr_surgery._tree import fill, flatten, map_leaves
from diffcr_surgery.axes import Axes, parse_axes
from diffcr_surgery.errors import AlignmentError

__all__ = [
    "Spans",
    "gather_each",
    "gather_tokens",
    "keep_tokens",
    "kept_count",
    "per_sample",
    "rank_tokens",
    "sample_axes",
    "scatter_tokens",
    "scatter_tokens_",
    "staying_count",
    "staying_tokens",
    "top_tokens",
]

# Tokens that never bypass, as runs (start, stop): one tuple of runs for all samples or one for each; none at all if empty.
Spans = tuple[tuple[tuple[int, int], ...], ...]

_ROUNDING = 1e-6  # (1 - 0.7) * 10 is 3.0000000000000004 in floating point, and k must be 3


def kept_count(ratio: float, tokens: int, staying: int = 0) -> int:
    """Return k = ⌈(1 - ratio) · n⌉, at least 1, and all of those that stay besides.

    Args:
        ratio: Share of the n tokens that bypass.
        tokens: n, and those that stay.
        staying: Tokens among them that never bypass.

    Example:
        >>> kept_count(0.7, 10), kept_count(0.9, 4), kept_count(0.0, 5), kept_count(0.5, 13, staying=3)
        (3, 1, 5, 8)
    """
    moving = tokens - staying
    if moving < 1:
        return tokens
    return staying + max(1, min(moving, math.ceil((1.0 - ratio) * moving - _ROUNDING)))


def staying_count(spans: Spans) -> int:
    """Return how many tokens of a sample stay: of the one with the most, since all samples keep equally many.

    Example:
        >>> staying_count((((0, 3),), ((0, 2), (5, 6))))
        3
    """
    return max((sum(stop - start for start, stop in row) for row in spans), default=0)


def staying_tokens(scores: Tensor, spans: Spans) -> Tensor:
    """Return which tokens never bypass, ``b n`` or ``1 n`` booleans, for scores ``b n``."""
    mask = torch.zeros(len(spans), scores.shape[1], dtype=torch.bool, device=scores.device)
    for row, runs in enumerate(spans):
        for start, stop in runs:
            mask[row, start:stop] = True
    return mask


def rank_tokens(scores: Tensor, staying: Tensor | None = None) -> Tensor:
    """Return token indices from most to least important, ``b n`` -> ``b n``; ties go to the lower index.

    The first k of them are the kept tokens, so kept sets of rising k are nested. Tokens marked in ``staying`` come first.
    """
    if staying is not None:
        scores = scores.masked_fill(staying, math.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def keep_tokens(order: Tensor, count: int, in_order: bool = False) -> Tensor:
    """Return the ``count`` most important tokens of a ranking, ``b n`` -> ``b k``.

    With ``in_order`` they stand as they stood in the stream; a block may tell a prefix that stays from the rest by its place.
    """
    kept = order[:, :count]
    return kept.sort(dim=1).values if in_order else kept


def top_tokens(scores: Tensor, count: int, staying: Tensor | None = None) -> Tensor:
    """Return the first ``count`` tokens of :func:`rank_tokens`, ``b n`` -> ``b k``, without ranking them.

    Their order is open, but the same whenever it is asked. With ``staying`` all stand as they stood in the stream.

    Args:
        scores: ``b n``, float32 and not negative.
        count: k.
        staying: Which tokens are kept before all others.
    """
    if staying is not None:
        scores = scores.masked_fill(staying, math.inf)
    # As whole numbers such scores keep their order; with the index below them, no two tokens are alike, on any device and in any batch.
    keys = scores.detach().view(torch.int32).long() * 2**32 - torch.arange(scores.shape[1], device=scores.device)
    kept = keys.topk(count, dim=-1, sorted=False).indices
    return kept if staying is None else kept.sort(dim=1).values


def _rows(kept: Tensor, tokens: int) -> Tensor:
    """Return indices ``b k`` as row numbers ``(b k)`` of a stream flattened to ``(b n) c``."""
    if kept.shape[0] == 1:
        return kept[0]
    start = torch.arange(0, kept.shape[0] * tokens, tokens, device=kept.device)
    return rearrange(kept + start[:, None], "b k -> (b k)")


def _stretched(kept: Tensor, word: str, size: int, tokens: int) -> Tensor:
    """Return the index into an axis of ``size``: the kept tokens, and every entry of a prefix or suffix."""
    if word == "n":
        return kept
    if word == "n-m":
        first = tokens - size  # tokens in front of the stream that stay, and have no entry here; kept ones stand in order
        return kept[:, first:] - first
    fixed = torch.arange(size - tokens, device=kept.device).expand(kept.shape[0], -1)
    if word == "m+n":
        return torch.cat([fixed, kept + (size - tokens)], dim=1)
    return torch.cat([kept, fixed + tokens], dim=1)


def _check(x: Tensor, axes: Axes, tokens: int, pattern: str) -> None:
    fits = {"n": operator.eq, "m+n": operator.ge, "n+m": operator.ge, "n-m": operator.le}
    sizes_fit = all(fits[axes.words[axis]](x.shape[axis], tokens) for axis in axes.tokens if axis < x.ndim)
    if x.ndim != len(axes.words) or not sizes_fit:
        raise AlignmentError(
            f"A tensor of shape {tuple(x.shape)} does not fit the axes {pattern!r} with n = {tokens}. The block got arguments of another "
            "form than those it was planned with; plan again with these inputs, or register a BlockPattern."
        )


def gather_tokens(x: Tensor, kept: Tensor, pattern: str, tokens: int) -> Tensor:
    """Keep the chosen tokens of ``x`` along every token axis of its pattern.

    Args:
        x: Any tensor, such as a stream ``b n c`` or a rotary table ``m+n d``.
        kept: Indices ``b k``.
        pattern: Axis pattern of ``x``. Without a batch axis, all of ``kept`` must be one sample (see :func:`per_sample`).
        tokens: n.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 3, 2)
        >>> gather_tokens(x, torch.tensor([[2, 0]]), "b n c", 3)[0, :, 0].tolist()
        [4.0, 0.0]
    """
    axes = parse_axes(pattern)
    _check(x, axes, tokens, pattern)
    for axis in axes.tokens:
        index = _stretched(kept, axes.words[axis], x.shape[axis], tokens)
        x = _select(x, index, axis, axes.batch)
    return x


def _select(x: Tensor, index: Tensor, axis: int, batch: int | None) -> Tensor:
    if batch is None or index.shape[0] == 1:
        if index.shape[0] != 1:
            raise AlignmentError(f"A tensor without a batch axis cannot be gathered for {index.shape[0]} samples at once.")
        return x.index_select(axis, index[0])
    if x.shape[batch] == 1:
        x = x.expand(*(index.shape[0] if i == batch else -1 for i in range(x.ndim)))
    ahead = x.movedim((batch, axis), (0, 1))
    size = ahead.shape[1]
    picked = rearrange(ahead, "b n ... -> (b n) ...").index_select(0, _rows(index, size))
    return rearrange(picked, "(b k) ... -> b k ...", b=index.shape[0]).movedim((0, 1), (batch, axis))


def scatter_tokens(stream: Tensor, update: Tensor, kept: Tensor, pattern: str) -> Tensor:
    """Put processed tokens back: the skip connection that carries bypassed tokens round the block.

    Args:
        stream: The tokens as they entered, ``b n c`` or another layout with a token axis.
        update: The kept tokens as they left, same layout with k in place of n.
        kept: Indices ``b k``.
        pattern: Axis pattern of both.

    Returns:
        A new tensor in the precision of ``update``; a bypassed token is bit for bit what it was, as far as that can hold it.
    """
    axes = parse_axes(pattern)
    (axis,) = axes.tokens
    stream = stream.to(update.dtype)  # under autocast a block may leave another than it was given, and what follows is made for that
    if axes.batch is None:
        return stream.index_copy(axis, kept[0], update)
    order = (axes.batch, axis)
    whole, part = stream.movedim(order, (0, 1)), update.movedim(order, (0, 1))
    rows = rearrange(whole, "b n ... -> (b n) ...")
    merged = rows.index_copy(0, _rows(kept, whole.shape[1]), rearrange(part, "b k ... -> (b k) ..."))
    return rearrange(merged, "(b n) ... -> b n ...", b=whole.shape[0]).movedim((0, 1), order)


def scatter_tokens_(stream: Tensor, update: Tensor, kept: Tensor, pattern: str) -> Tensor:
    """Put processed tokens back into ``stream`` itself; see :func:`scatter_tokens`. For streams that no one else reads."""
    axes = parse_axes(pattern)
    (axis,) = axes.tokens
    viewable = axes.batch is None or ((axes.batch, axis) == (0, 1) and stream.is_contiguous())
    if not viewable or stream.dtype != update.dtype:
        return scatter_tokens(stream, update, kept, pattern)
    if axes.batch is None:
        return stream.index_copy_(axis, kept[0], update)
    rows = stream.view(-1, *stream.shape[2:])
    rows.index_copy_(0, _rows(kept, stream.shape[1]), update.flatten(0, 1))
    return stream


def gather_each(x: Tensor, kept: Tensor, pattern: str, tokens: int) -> Tensor:
    """Gather what all samples share once for each of them: ``n d`` -> ``b k d``, with the samples in front.

    Args:
        x: A tensor whose pattern has no batch axis, such as a rotary table.
        kept: Indices ``b k``.
        pattern: Axis pattern of ``x``.
        tokens: n.
    """
    axes = parse_axes(pattern)
    if len(axes.tokens) > 1:  # such as a mask ``n n``
        return torch.stack([gather_tokens(x, row[None], pattern, tokens) for row in kept])
    _check(x, axes, tokens, pattern)
    (axis,) = axes.tokens
    index = _stretched(kept, axes.words[axis], x.shape[axis], tokens)
    picked = x.index_select(axis, index.flatten())
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]).movedim(axis, 0)


def sample_axes(patterns: Mapping[str, str]) -> dict[str, int | None]:
    """Return how :func:`per_sample` takes one sample from each argument: along which axis, or ``None`` after :func:`gather_each`.

    Args:
        patterns: Path -> axis pattern of all arguments that move with the tokens or belong to samples.
    """
    return {path: parse_axes(pattern).batch for path, pattern in patterns.items()}


def per_sample(block: Callable[..., Any], args: Any, kwargs: Any, axes: Mapping[str, int | None], batch: int, joined: int = 0) -> Any:
    """Run ``block`` sample by sample, for arguments that are indexed by token but shared by all samples.

    Each sample keeps other tokens, so a rotary table ``n d`` that all share has no common gathered form. The block sees batches of one.

    Args:
        block: The block.
        args: Positional arguments, gathered; what is shared by :func:`gather_each`.
        kwargs: Keyword arguments, likewise.
        axes: Dotted path in ``(args, kwargs)`` -> axis of the samples (length b, or 1 for all), or ``None`` for what ``gather_each`` made.
        batch: b.
        joined: Axis of the samples in the stream; an output whose length there is not 1 has them in front.

    Returns:
        The block's output.
    """
    outputs = []
    for index in range(batch):

        def cut(path: str, leaf: Any, index: int = index) -> Any:
            if path not in axes:
                return leaf
            axis = axes[path]
            if axis is None:
                return leaf[index]
            return leaf.narrow(axis, index, 1) if leaf.shape[axis] > 1 else leaf

        own_args, own_kwargs = map_leaves((args, kwargs), cut)
        outputs.append(block(*own_args, **own_kwargs))
    parts = [flatten(output) for output in outputs]
    columns = zip(*(tensors for _, tensors, _ in parts), strict=True)
    return fill(parts[0][2], [torch.cat(tensors, _joined(tensors[0], joined)) for tensors in columns])


def _joined(output: Tensor, axis: int) -> int:
    """Return the batch axis of one sample's output: the stream's, or the first where a text in front of ``n b c`` tokens has it there."""
    return axis if axis < output.ndim and output.shape[axis] == 1 else 0
