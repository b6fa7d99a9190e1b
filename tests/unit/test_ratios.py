"""Arithmetic of ratios: brackets, rounding that keeps the mean, and projection to a mean."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcr_surgery.config import DEFAULT_BINS
from diffcr_surgery.ratios import Budget, bracket

SLACK = 1e-6  # single precision holds a ratio no better
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
UNEVEN = (0.0, 0.05, 0.3, 0.35, 0.8)

bins_drawn = st.sampled_from([DEFAULT_BINS, QUARTERS, UNEVEN, (0.0, 1.0)])


@st.composite
def tables(draw: st.DrawFn, top: float = 0.9) -> Tensor:
    """Ratios `l r` in single precision; some on a bin, some at the bounds, some alike."""
    rows, regions = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    on_bin = st.sampled_from([b for b in DEFAULT_BINS if b <= top])
    entry = on_bin | st.floats(0, top) | st.integers(0, int(100 * top)).map(lambda n: n / 100)
    return torch.tensor(draw(st.lists(entry, min_size=rows * regions, max_size=rows * regions))).reshape(rows, regions)


@st.composite
def weights(draw: st.DrawFn, regions: int) -> Tensor:
    raw = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=regions, max_size=regions)), dtype=torch.float64)
    return raw / raw.sum()


def round_to_bins(table: Tensor, bins: tuple[float, ...], share: Tensor) -> Tensor:
    return Budget.of_tokens(len(table), bins, share, bins[-1]).round(table)


def project_to_mean(table: Tensor, mean: float, top: float, share: Tensor) -> Tensor:
    return Budget.of_tokens(len(table), DEFAULT_BINS, share, top).project(table, mean)


def weighted_mean(table: Tensor, share: Tensor) -> Tensor:
    """What a budget of tokens saves."""
    return Budget.of_tokens(len(table), DEFAULT_BINS, share, 0.9).saving(table)


def uniform(table: Tensor) -> Tensor:
    return torch.full((table.shape[1],), 1 / table.shape[1])


# --- bracket ---------------------------------------------------------------------------------------------------------
@given(bins_drawn, st.floats(0, 1))
def test_bracket_is_a_pair_of_neighbours_around_the_ratio(bins: tuple[float, ...], ratio: float) -> None:
    ratio = min(ratio, bins[-1])
    lower, upper = bracket(ratio, bins)
    assert (lower, upper) in itertools.pairwise(bins)
    assert lower - SLACK <= ratio <= upper + SLACK
    weight = (ratio - lower) / (upper - lower)
    assert (1 - weight) * lower + weight * upper == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize("bins", [DEFAULT_BINS, QUARTERS, UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bracket_begins_on_a_bin_whatever_the_precision_makes_of_it(bins: tuple[float, ...], dtype: torch.dtype) -> None:
    for lower, upper in itertools.pairwise(bins):
        assert bracket(torch.tensor(lower, dtype=dtype).item(), bins) == (lower, upper)


def test_bracket_at_the_ends() -> None:
    assert bracket(0.0, DEFAULT_BINS) == (0.0, 0.1)
    assert bracket(1.0, DEFAULT_BINS) == (0.9, 1.0)
    assert bracket(-0.2, DEFAULT_BINS) == (0.0, 0.1)
    assert bracket(1.2, DEFAULT_BINS) == (0.9, 1.0)


# --- weighted mean ---------------------------------------------------------------------------------------------------
def test_weighted_mean_counts_regions_by_weight_and_layers_alike() -> None:
    table = torch.tensor([[0.0, 0.4], [0.2, 0.8]], requires_grad=True)
    mean = weighted_mean(table, torch.tensor([0.75, 0.25]))
    assert mean.item() == pytest.approx((0.75 * 0.0 + 0.25 * 0.4 + 0.75 * 0.2 + 0.25 * 0.8) / 2)
    mean.backward()
    assert torch.allclose(table.grad, torch.tensor([[0.375, 0.125]] * 2))  # type: ignore[arg-type]


# --- rounding --------------------------------------------------------------------------------------------------------
def on_bin(table: Tensor, bins: tuple[float, ...]) -> Tensor:
    return (table.double()[..., None] - torch.tensor(bins, dtype=torch.float64)).abs().amin(-1) < SLACK


@given(tables(top=0.8), bins_drawn)
def test_rounding_stays_within_each_entrys_bracket(table: Tensor, bins: tuple[float, ...]) -> None:
    rounded = round_to_bins(table, bins, uniform(table))
    assert rounded.shape == table.shape and rounded.dtype == torch.float32
    for value, result in zip(table.flatten().tolist(), rounded.flatten().tolist(), strict=True):
        assert min(abs(result - b) for b in bracket(value, bins)) < SLACK


@given(tables(top=0.8), bins_drawn)
def test_entries_on_a_bin_stay_there(table: Tensor, bins: tuple[float, ...]) -> None:
    there = on_bin(table, bins)
    moved = (round_to_bins(table, bins, uniform(table)) - table).abs()
    assert (moved[there] < 2 * SLACK).all()


@given(tables(top=0.8), bins_drawn)
def test_rounding_keeps_the_mean_to_half_a_bin_over_the_movable_entries(table: Tensor, bins: tuple[float, ...]) -> None:
    movable = int((~on_bin(table, bins)).sum())
    widest = max(b - a for a, b in itertools.pairwise(bins))
    gap = abs(float((round_to_bins(table, bins, uniform(table)).double() - table.double()).mean()))
    assert gap <= (widest / 2 / movable if movable else 0.0) + 2 * SLACK


@given(st.data(), tables(top=0.8))
def test_rounding_keeps_the_weighted_mean_to_half_a_bin_of_the_heaviest_region(data: st.DataObject, table: Tensor) -> None:
    share = data.draw(weights(table.shape[1]))
    rounded = round_to_bins(table, DEFAULT_BINS, share)
    gap = abs(float(weighted_mean(rounded.double(), share) - weighted_mean(table.double(), share)))
    assert gap <= 0.05 * float(share.max()) / table.shape[0] + 2 * SLACK


def test_rounding_each_by_itself_would_miss_the_mean() -> None:
    table = torch.full((10, 1), 0.34)
    rounded = round_to_bins(table, DEFAULT_BINS, torch.ones(1))
    assert sorted(round(v, 6) for v in rounded.flatten().tolist()) == [0.3] * 6 + [0.4] * 4


def test_entries_nearest_the_middle_change_sides_first() -> None:
    table = torch.tensor([[0.31], [0.34], [0.33], [0.32]])  # 1.3 in all: one of four goes up
    rounded = round_to_bins(table, DEFAULT_BINS, torch.ones(1)).flatten()
    assert torch.allclose(rounded, torch.tensor([0.3, 0.4, 0.3, 0.3]))


def test_rounding_leaves_its_input_alone_and_takes_a_parameter() -> None:
    table = torch.nn.Parameter(torch.tensor([[0.13, 0.27]]))
    rounded = round_to_bins(table, DEFAULT_BINS, torch.tensor([0.5, 0.5]))
    assert not rounded.requires_grad
    assert torch.equal(table.detach(), torch.tensor([[0.13, 0.27]]))


# --- projection ------------------------------------------------------------------------------------------------------
wild = st.floats(-3, 3, width=32)


@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.5, 0.9]))
def test_projection_hits_the_mean_in_range_and_keeps_the_order(data: st.DataObject, rows: int, regions: int, top: float) -> None:
    table = torch.tensor(data.draw(st.lists(wild, min_size=rows * regions, max_size=rows * regions))).reshape(rows, regions)
    share, mean = data.draw(weights(regions)), data.draw(st.floats(0, top))
    got = project_to_mean(table, mean, top, share)
    assert got.dtype == table.dtype and got.shape == table.shape
    assert float(weighted_mean(got.double(), share)) == pytest.approx(mean, abs=SLACK)
    assert ((got >= 0) & (got.double() <= top + SLACK / 10)).all()
    order = table.flatten().argsort()
    assert (got.flatten()[order].diff() >= 0).all()
    inside = (got > 0) & (got < top - SLACK)
    shift = (got.double() - table.double())[inside]
    assert shift.numel() == 0 or float(shift.max() - shift.min()) < 2 * SLACK  # one shift for all that no bound holds


@given(tables(), st.floats(0, 0.9))
def test_projection_twice_is_projection_once(table: Tensor, mean: float) -> None:
    once = project_to_mean(table, mean, 0.9, uniform(table))
    assert torch.allclose(project_to_mean(once, mean, 0.9, uniform(table)), once, atol=SLACK)


@pytest.mark.parametrize(("mean", "wanted"), [(0.0, 0.0), (0.9, 0.9)])
def test_projection_to_a_bound_fills_the_table_with_it(mean: float, wanted: float) -> None:
    table = torch.tensor([[0.1, -4.0], [0.5, 7.0]])
    assert torch.equal(project_to_mean(table, mean, 0.9, torch.tensor([0.3, 0.7])), torch.full((2, 2), wanted))


def test_projection_makes_a_new_table() -> None:
    table = torch.tensor([[0.1], [0.3]])
    project_to_mean(table, 0.5, 0.9, torch.ones(1))
    assert torch.equal(table, torch.tensor([[0.1], [0.3]]))


# --- the dial --------------------------------------------------------------------------------------------------------
@st.composite
def dials(draw: st.DrawFn) -> tuple[Budget, Tensor]:
    sites, regions = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    bins = draw(st.sampled_from([DEFAULT_BINS[:10], (0.0, 0.5, 1.0), (0.0, 0.2, 0.25, 0.9)]))
    falls = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 9), min_size=len(bins), max_size=len(bins)), min_size=sites, max_size=sites))
    )
    costs = falls.double().flip(1).cumsum(1).flip(1) + torch.tensor([[1.0] + [0.0] * (len(bins) - 1)])
    weights = torch.tensor(draw(st.lists(st.integers(1, 5), min_size=regions, max_size=regions))).double()
    table = draw(st.lists(st.integers(0, 90), min_size=sites * regions, max_size=sites * regions))
    return Budget(bins, costs, weights / weights.sum(), 0.9), torch.tensor(table).float().reshape(sites, regions) / 100


@given(dials(), st.floats(0, 1), st.floats(0, 1))
def test_the_dial_is_monotone_and_nearest_on_its_way(drawn: tuple[Budget, Tensor], one: float, other: float) -> None:
    budget, table = drawn
    less, more = (budget.dial(table, saving) for saving in sorted((one, other)))
    assert bool((less <= more).all())
    assert all(any(abs(value - b) < 1e-6 for b in budget.bins) for value in more.flatten().tolist())
    reached = [float(budget.saving(budget.dial(table, target / 50).double())) for target in range(51)]
    wanted = max(one, other)
    assert abs(float(budget.saving(more.double())) - wanted) <= min(abs(value - wanted) for value in reached) + 1e-6
    assert not budget.dial(table, 0.0).any() or float(budget.saving(budget.dial(table, 0.0).double())) < 1e-9


def test_the_dial_keeps_what_the_table_tells_apart() -> None:
    budget = Budget.of_tokens(3, DEFAULT_BINS[:10], torch.ones(1), 0.9)
    dialled = budget.dial(torch.tensor([[0.0], [0.7], [0.3]]), 0.2)
    assert dialled.flatten().tolist() == pytest.approx([0.0, 0.5, 0.1])
