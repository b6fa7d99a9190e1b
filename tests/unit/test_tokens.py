"""Choosing, gathering and putting back tokens: against plain loops, bit for bit, in every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcr_surgery.config import DEFAULT_BINS
from diffcr_surgery.errors import AlignmentError
from diffcr_surgery.tokens import (
    gather_each,
    gather_tokens,
    keep_tokens,
    kept_count,
    per_sample,
    rank_tokens,
    sample_axes,
    scatter_tokens,
    staying_count,
    staying_tokens,
    top_tokens,
)

BATCHED = (
    "b n c",
    "n b c",
    "b n",
    "n b",
    "b c n",
    "c n b",
    "b h n c",
    "b m+n d",
    "b n+m d",
    "m+n b d",
    "b 1 n n",
    "b m+n m+n",
    "b h n+m n+m",
)
STRETCHED = ("1 n d", "1 1 n n", "1 m+n d", "1 n+m d", "1 n")
SHARED = ("n c", "m+n d", "n+m d", "n n", "n 1 d", "d n", "m+n m+n")
STREAMS = ("b n c", "n b c", "b c n", "b h n c", "b n", "n b")


def tensor(pattern: str, batch: int = 3, tokens: int = 5, fixed: int = 2, other: int = 4) -> Tensor:
    """A tensor of the given layout, no two entries alike."""
    sizes = {"b": batch, "1": 1, "n": tokens, "m+n": fixed + tokens, "n+m": fixed + tokens}
    shape = [sizes.get(word, other) for word in pattern.split()]
    return torch.randperm(math.prod(shape)).reshape(shape).float()


def choose(batch: int, tokens: int, count: int) -> Tensor:
    """Indices `b k`, other ones in each sample, in any order."""
    return torch.stack([torch.randperm(tokens)[:count] for _ in range(batch)])


def gathered_by_hand(x: Tensor, kept: Tensor, pattern: str, tokens: int) -> Tensor:
    """The meaning of an axis pattern, sample by sample and axis by axis."""
    words = pattern.split()
    samples = []
    for index, chosen in enumerate(kept.tolist()):
        own = x.narrow(words.index("b"), index, 1) if "b" in words else x
        for axis, word in enumerate(words):
            extra = x.shape[axis] - tokens
            places = {"n": chosen, "m+n": [*range(extra), *(extra + i for i in chosen)], "n+m": [*chosen, *range(tokens, tokens + extra)]}
            if word in places:
                own = torch.stack([own.select(axis, place) for place in places[word]], axis)
        samples.append(own)
    return torch.cat(samples, words.index("b") if "b" in words else 0)


# --- how many, and which ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", DEFAULT_BINS)
def test_kept_count_is_exact_for_every_length(ratio: float) -> None:
    exact = 1 - Fraction(round(ratio * 10), 10)
    wrong = {n: kept_count(ratio, n) for n in range(1, 2001) if kept_count(ratio, n) != max(1, math.ceil(exact * n))}
    assert not wrong


@given(st.integers(0, 100), st.integers(1, 100_000))
def test_kept_count_is_exact_for_hundredths(hundredths: int, tokens: int) -> None:
    exact = max(1, math.ceil((1 - Fraction(hundredths, 100)) * tokens))
    assert kept_count(hundredths / 100, tokens) == exact
    assert kept_count(float(torch.tensor(hundredths / 100, dtype=torch.float64)), tokens) == exact


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 5000))
def test_kept_count_falls_with_the_ratio_and_is_never_zero(one: float, other: float, tokens: int) -> None:
    fewer, more = kept_count(max(one, other), tokens), kept_count(min(one, other), tokens)
    assert 1 <= fewer <= more <= tokens
    assert type(fewer) is int  # compilers and CUDA graphs need a plain number


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12))
def test_ranking_is_by_score_then_by_index(scores: list[float]) -> None:
    wanted = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert rank_tokens(torch.tensor([scores])).tolist() == [wanted]


def test_samples_are_ranked_apart() -> None:
    assert rank_tokens(torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.1]])).tolist() == [[1, 2, 0], [0, 1, 2]]


def test_equal_scores_keep_the_order_even_of_long_streams() -> None:
    assert torch.equal(rank_tokens(torch.full((2, 4096), 0.5)), torch.arange(4096).expand(2, -1))


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
def test_kept_sets_are_nested(batch: int, tokens: int, seed: int) -> None:
    scores = torch.randint(4, (batch, tokens), generator=torch.Generator().manual_seed(seed)).float()
    order = rank_tokens(scores)
    for count in range(1, tokens + 1):
        kept = keep_tokens(order, count)
        assert kept.shape == (batch, count)
        assert torch.equal(kept[:, :-1], keep_tokens(order, count - 1))
        dropped = scores.scatter(1, kept, -1.0).amax(1)
        assert (scores.gather(1, kept).amin(1) >= dropped).all()


# --- tokens that stay ------------------------------------------------------------------------------------------------
@given(st.integers(1, 3), st.integers(2, 10), st.integers(0, 4), st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.integers(0, 99))
def test_tokens_that_stay_are_kept_and_stand_where_they_stood(batch: int, moving: int, stay: int, ratio: float, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    tokens = moving + stay
    places = [sorted(torch.randperm(tokens, generator=source)[:stay].tolist()) for _ in range(batch)]
    spans = tuple(tuple((place, place + 1) for place in row) for row in places)
    scores = torch.rand(batch, tokens, generator=source)
    mask = staying_tokens(scores, spans)
    assert mask.sum(1).tolist() == [stay] * batch and staying_count(spans) == stay
    kept = keep_tokens(rank_tokens(scores, mask), kept_count(ratio, tokens, stay), in_order=True)
    assert kept.shape[1] == stay + kept_count(ratio, moving)
    for row, held in zip(kept.tolist(), places, strict=True):
        assert row == sorted(set(row)) and set(held) <= set(row)


def test_one_mask_serves_all_samples_where_text_has_one_place() -> None:
    assert staying_tokens(torch.rand(4, 5), (((0, 2),),)).tolist() == [[True, True, False, False, False]]
    assert staying_tokens(torch.rand(2, 3), (((0, 1),), ())).tolist() == [[True, False, False], [False, False, False]]


def test_a_table_without_the_prefix_is_gathered_behind_it() -> None:
    table, kept = torch.arange(6.0).reshape(3, 2), torch.tensor([[0, 1, 2, 4]])  # two tokens stay, then three that may bypass
    assert torch.equal(gather_tokens(table, kept, "n-m c", 5), table[[0, 2]])
    with pytest.raises(AlignmentError, match="does not fit the axes 'n-m c' with n = 2"):
        gather_tokens(table, kept, "n-m c", 2)


# --- gather ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("pattern", BATCHED)
def test_gather_in_every_layout(pattern: str, count: int) -> None:
    x, kept = tensor(pattern), choose(3, 5, count)
    assert torch.equal(gather_tokens(x, kept, pattern, 5), gathered_by_hand(x, kept, pattern, 5))


@pytest.mark.parametrize("pattern", STRETCHED)
@pytest.mark.parametrize("batch", [1, 3])
def test_leading_one_is_stretched_over_the_batch(pattern: str, batch: int) -> None:
    x, kept = tensor(pattern), choose(batch, 5, 2)
    got = gather_tokens(x, kept, pattern, 5)
    assert got.shape[0] == batch
    assert torch.equal(got, gathered_by_hand(x, kept, pattern, 5))


@pytest.mark.parametrize("pattern", ["b n c", "b 1 n n", "b m+n d"])
def test_batch_of_one_is_stretched_too(pattern: str) -> None:
    x, kept = tensor(pattern, batch=1), choose(3, 5, 2)
    assert torch.equal(gather_tokens(x, kept, pattern, 5), gather_tokens(torch.cat([x] * 3), kept, pattern, 5))


@pytest.mark.parametrize("pattern", SHARED)
def test_gather_without_a_batch_axis(pattern: str) -> None:
    x, kept = tensor(pattern), choose(1, 5, 3)
    assert torch.equal(gather_tokens(x, kept, pattern, 5), gathered_by_hand(x, kept, pattern, 5))
    with pytest.raises(AlignmentError, match="without a batch axis cannot be gathered for 2 samples"):
        gather_tokens(x, choose(2, 5, 3), pattern, 5)


@given(
    pattern=st.sampled_from(BATCHED + STRETCHED),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 4),
    fixed=st.integers(0, 4),
    other=st.integers(1, 4),
    data=st.data(),
)
def test_axes_of_equal_length_are_not_mistaken(pattern: str, batch: int, tokens: int, fixed: int, other: int, data: st.DataObject) -> None:
    x = tensor(pattern, batch, tokens, fixed, other)
    kept = choose(batch, tokens, data.draw(st.integers(1, tokens)))
    assert torch.equal(gather_tokens(x, kept, pattern, tokens), gathered_by_hand(x, kept, pattern, tokens))


def test_prefix_and_suffix_stay_where_they_are() -> None:
    kept = torch.tensor([[2, 0]])
    assert gather_tokens(torch.arange(5), kept, "m+n", 3).tolist() == [0, 1, 4, 2]
    assert gather_tokens(torch.arange(5), kept, "n+m", 3).tolist() == [2, 0, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.complex64, torch.float64])
def test_gather_keeps_dtype_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    x, kept = tensor("b n c").to(dtype), choose(3, 5, 2)
    turned = x.mT.contiguous().mT
    got = gather_tokens(turned, kept, "b n c", 5)
    assert got.dtype == dtype and torch.equal(got, gathered_by_hand(x, kept, "b n c", 5))


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [((3, 4, 2), "b n c"), ((3, 6, 2), "b n c"), ((3, 5), "b n c"), ((3, 5, 2, 1), "b n c"), ((4, 2), "m+n d"), ((3, 1, 5, 4), "b 1 n n")],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, ...], pattern: str) -> None:
    with pytest.raises(AlignmentError) as caught:
        gather_tokens(torch.zeros(shape), choose(3, 5, 2), pattern, 5)
    for words in (str(shape), repr(pattern), "n = 5", "plan again", "BlockPattern"):
        assert words in str(caught.value)


# --- scatter ---------------------------------------------------------------------------------------------------------
def scattered_by_hand(stream: Tensor, update: Tensor, kept: Tensor, pattern: str) -> Tensor:
    words = pattern.split()
    batch, axis = (words.index("b") if "b" in words else None), words.index("n")
    out = stream.clone()
    for sample, chosen in enumerate(kept.tolist()):
        for place, token in enumerate(chosen):
            into, source = (out, update) if batch is None else (out.narrow(batch, sample, 1), update.narrow(batch, sample, 1))
            into.select(axis, token).copy_(source.select(axis, place))
    return out


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("pattern", [*STREAMS, "n c", "c n", "1 n c"])
def test_scatter_in_every_layout(pattern: str, count: int) -> None:
    stream = tensor(pattern)
    kept = choose(3 if "b" in pattern else 1, 5, count)
    update = -1 - gather_tokens(stream, kept, pattern, 5)
    before = stream.clone()
    got = scatter_tokens(stream, update, kept, pattern)
    assert torch.equal(got, scattered_by_hand(stream, update, kept, pattern))
    assert torch.equal(stream, before)  # others may read the stream still
    assert torch.equal(gather_tokens(got, kept, pattern, 5), update)


@given(pattern=st.sampled_from(STREAMS), batch=st.integers(1, 4), tokens=st.integers(1, 4), other=st.integers(1, 4), data=st.data())
def test_gather_then_scatter_is_nothing(pattern: str, batch: int, tokens: int, other: int, data: st.DataObject) -> None:
    stream = tensor(pattern, batch, tokens, other=other)
    kept = choose(batch, tokens, data.draw(st.integers(1, tokens)))
    assert torch.equal(scatter_tokens(stream, gather_tokens(stream, kept, pattern, tokens), kept, pattern), stream)


@pytest.mark.parametrize("pattern", ["b n c", "n b c", "b c n", "n c"])
def test_bypassed_tokens_are_the_same_bits(pattern: str) -> None:
    """Even those that arithmetic would change: NaN with its payload, -0.0, infinities, subnormals."""
    bits = torch.tensor([0x7FC00000, 0x7FC12345, -0x003FFFFF, -0x80000000, 0x7F800000, -0x00800000, 1, 0], dtype=torch.int32)
    stream = bits.view(torch.float32)[torch.randint(8, tensor(pattern).shape)]
    kept = torch.tensor([[3, 1]] * (3 if "b" in pattern else 1))
    update = torch.ones_like(gather_tokens(stream, kept, pattern, 5))
    got = scatter_tokens(stream, update, kept, pattern)
    bypassed = torch.tensor([[0, 2, 4]] * len(kept))
    same = [gather_tokens(x, bypassed, pattern, 5).contiguous().view(torch.int32) for x in (got, stream)]
    assert torch.equal(*same)
    assert (gather_tokens(got, kept, pattern, 5) == 1).all()


@pytest.mark.parametrize("pattern", ["b n c", "n b c", "n c"])
def test_gradient_reaches_stream_and_update(pattern: str) -> None:
    stream = tensor(pattern).requires_grad_()
    kept = choose(3 if "b" in pattern else 1, 5, 2)
    update = torch.zeros_like(gather_tokens(stream, kept, pattern, 5)).requires_grad_()
    weight = torch.randn(stream.shape)
    (scatter_tokens(stream, update, kept, pattern) * weight).sum().backward()
    assert stream.grad is not None and update.grad is not None
    assert torch.equal(update.grad, gather_tokens(weight, kept, pattern, 5))
    assert torch.equal(stream.grad, scatter_tokens(weight, torch.zeros_like(update), kept, pattern))


@pytest.mark.parametrize("pattern", ["b n c", "b m+n d", "b 1 n n", "1 n d"])
def test_gradient_of_gather_goes_back_to_its_places(pattern: str) -> None:
    x = tensor(pattern).requires_grad_()
    kept = choose(3, 5, 2)
    picked = gather_tokens(x, kept, pattern, 5)
    picked.sum().backward()
    counts = torch.zeros_like(x).flatten()
    places = gather_tokens(torch.arange(x.numel()).reshape(x.shape), kept, pattern, 5).flatten()
    counts.index_add_(0, places, torch.ones(len(places)))
    assert x.grad is not None and torch.equal(x.grad.flatten(), counts)


def test_the_stream_takes_the_precision_of_an_update_in_another() -> None:
    """Under autocast a block may answer in another than it was given, and the dense model goes on in that."""
    stream, kept = torch.full((2, 3, 4), 0.1), torch.tensor([[0], [2]])
    got = scatter_tokens(stream, torch.ones(2, 1, 4, dtype=torch.bfloat16), kept, "b n c")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[0, 1:], stream[0, 1:].bfloat16()) and (got[0, 0] == 1).all()


# --- sample by sample ------------------------------------------------------------------------------------------------
def rotate(x: Tensor, extra: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A block in small: mixes tokens, reads a table, a mask, a per-sample vector, and something opaque."""
    mixed = torch.einsum("bqk,bkc->bqc", extra["mask"].expand(x.shape[0], -1, -1), x * extra["table"])
    mixed = mixed + extra["vector"][:, None] + extra["opaque"]
    return mixed, {"mean": mixed.mean(1), "word": "kept"}


PATTERNS = {"0.0": "b n c", "1.extra.table": "n c", "1.extra.mask": "b n n", "1.extra.vector": "b"}


@pytest.mark.parametrize("mask_batch", [1, 3])
def test_per_sample_equals_a_loop_by_hand(mask_batch: int) -> None:
    x, table, mask, vector = torch.randn(3, 5, 4), torch.randn(5, 4), torch.randn(mask_batch, 5, 5), torch.randn(3, 4)
    opaque = torch.randn(4)
    kept = choose(3, 5, 2)
    gathered = {
        "table": gather_each(table, kept, "n c", 5),
        "mask": gather_tokens(mask, kept, "b n n", 5),
        "vector": vector,
        "opaque": opaque,
    }
    got, more = per_sample(rotate, (gather_tokens(x, kept, "b n c", 5),), {"extra": gathered}, sample_axes(PATTERNS), batch=3)
    for i, chosen in enumerate(kept.tolist()):
        own_mask = mask[i if mask_batch > 1 else 0][chosen][:, chosen][None]
        own = {"table": table[chosen], "mask": own_mask, "vector": vector[i : i + 1], "opaque": opaque}
        wanted, wanted_more = rotate(x[i : i + 1, chosen], own)
        assert torch.equal(got[i : i + 1], wanted)
        assert torch.equal(more["mean"][i : i + 1], wanted_more["mean"])
    assert more["word"] == "kept"


def test_per_sample_passes_gradients_to_every_sample() -> None:
    x, table = torch.randn(2, 4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    kept = torch.tensor([[0, 1], [3, 1]])
    own = (gather_tokens(x, kept, "b n c", 4), gather_each(table, kept, "n c", 4))
    per_sample(torch.mul, own, {}, {"0.0": 0, "0.1": None}, batch=2).sum().backward()
    assert x.grad is not None and table.grad is not None
    assert (x.grad != 0).any(2).tolist() == [[True, True, False, False], [False, True, False, True]]
    assert torch.allclose(table.grad, torch.stack([x[0, 0], x[0, 1] + x[1, 1], torch.zeros(3), x[1, 3]]))


def test_gather_each_equals_a_loop_of_gathers() -> None:
    kept = choose(3, 5, 2)
    for pattern, table in {
        "n c": torch.randn(5, 4),
        "m+n c": torch.randn(7, 4),
        "c n": torch.randn(4, 5),
        "n n": torch.randn(5, 5),
    }.items():
        got = gather_each(table, kept, pattern, 5)
        assert torch.equal(got, torch.stack([gather_tokens(table, row[None], pattern, 5) for row in kept]))


# --- the most important, unranked ------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 3, 6])
def test_top_tokens_are_the_first_of_the_ranking(count: int) -> None:
    scores = torch.rand(4, 6).mul(5).round().div(5)  # with ties
    assert torch.equal(top_tokens(scores, count).sort().values, keep_tokens(rank_tokens(scores), count).sort().values)


def test_top_tokens_that_stay_are_kept_and_all_stand_in_order() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.7, 0.2]])
    staying = torch.tensor([[False, True, False, False, True]])
    assert top_tokens(scores, 3, staying).tolist() == [[0, 1, 4]]
