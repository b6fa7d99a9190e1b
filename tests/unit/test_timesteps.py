"""Timestep regions: which argument, which range, which region; and every way they can be unclear."""

from __future__ import annotations

import threading
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import TimestepError
from diffcr_surgery.timesteps import TimestepRegions, at_timestep, timestep_regions

MODEL = nn.Identity()
FOUR = TimestepRegions(4, "timestep", 0.0, 1000.0)


def settle(arguments: dict[str, Any], **settings: Any) -> TimestepRegions:
    return timestep_regions(DiffCRConfig(**{"timestep_regions": 4} | settings), arguments)


# --- regions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("timestep", "region"), [(0, 0), (249.999, 0), (250, 1), (499.999, 1), (500, 2), (749.999, 2), (750, 3), (999, 3), (1000, 3)]
)
def test_edges_belong_to_the_noisier_region_and_the_top_to_the_last(timestep: float, region: int) -> None:
    assert FOUR.region(timestep) == region


@pytest.mark.parametrize("low", [0, -7])
@pytest.mark.parametrize("span", [10, 999, 1000])
def test_whole_timesteps_are_cut_exactly(low: int, span: int) -> None:
    """As whole numbers divide, also where the quotient is inexact: 290 / 1000 · 100 is less than 29."""
    for count in (1, 3, 4, 7, 10, 12, 100):
        regions = TimestepRegions(count, "t", float(low), float(low + span))
        found = [regions.region(low + step) for step in range(span + 1)]
        assert found == [min(count - 1, step * count // span) for step in range(span + 1)]


@given(st.integers(1, 20), st.floats(-100, 100), st.floats(0.001, 1000), st.floats(0, 1), st.floats(0, 1))
def test_noisier_timesteps_are_in_later_regions(count: int, low: float, span: float, one: float, other: float) -> None:
    regions = TimestepRegions(count, "t", low, low + span)
    cleaner, noisier = (regions.region(min(low + share * span, regions.high)) for share in sorted((one, other)))
    assert 0 <= cleaner <= noisier < count
    assert (regions.region(regions.low), regions.region(regions.high)) == (0, count - 1)


def test_the_end_of_the_range_is_met_in_single_precision_too() -> None:
    """shift · σ / (1 + (shift − 1) · σ), as samplers compute it, is an ulp more than 1 at σ = 1 for some shifts."""
    regions = TimestepRegions(4, "t", 0.0, 1.0)
    assert regions.region(float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))) == 3
    assert regions.region(-1e-7) == 0


@pytest.mark.parametrize("timestep", [-1e-3, 1000.5, float("nan"), float("inf"), -float("inf")])
def test_timesteps_out_of_range_are_refused(timestep: float) -> None:
    with pytest.raises(TimestepError, match=r"lies outside the range \[0, 1000\].*timestep_range") as caught:
        FOUR.of_call(MODEL, {"timestep": torch.tensor([500.0, timestep])})
    assert f"{timestep:g}" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (300, [1]),
        (300.0, [1]),
        (numpy.float32(300), [1]),
        (numpy.array(300), [1]),
        (torch.tensor(300), [1]),
        (torch.tensor([300]), [1]),
        (torch.tensor([[300.0]]), [1]),
        (torch.tensor([900, 100, 600]), [3, 0, 2]),
        (torch.tensor([900.0, 100.0], dtype=torch.bfloat16), [3, 0]),
        (torch.tensor([[900.0], [100.0]]), [3, 0]),
        (torch.tensor([[900], [100]]), [3, 0]),
        (torch.tensor(300.5), [1]),
        (torch.tensor([999, 0, 249, 250], dtype=torch.int32), [3, 0, 0, 1]),
        (torch.tensor([[900, 800], [10, 240]]), [3, 0]),  # tokens with timesteps of their own, all in one region
        (torch.tensor([[[900.0, 751.0]]], requires_grad=True), [3]),
    ],
    ids=repr,
)
def test_one_region_a_sample_whatever_the_form(value: Any, wanted: list[int]) -> None:
    assert FOUR.of_call(MODEL, {"timestep": value}) == wanted


@pytest.mark.parametrize(
    ("high", "value", "wanted"),
    [
        (1.0, 0.3, [1]),
        (1.0, 1, [3]),
        (1.0, torch.tensor(0.3), [1]),
        (1.0, torch.tensor([0.9, 0.1]), [3, 0]),
        (1.0, torch.tensor([[0.9], [0.5]], dtype=torch.float16), [3, 2]),
        (80.0, torch.tensor([0.002, 79.9]), [0, 3]),
        (14.6, 7.4, [2]),
    ],
    ids=repr,
)
def test_flow_times_and_sigmas(high: float, value: Any, wanted: list[int]) -> None:
    assert TimestepRegions(4, "sigma", 0.0, high).of_call(MODEL, {"sigma": value}) == wanted


def test_timesteps_per_token_in_several_regions_are_refused_by_name() -> None:
    with pytest.raises(TimestepError, match=r"timestep per token.*timestep_regions=1.*at_timestep"):
        FOUR.of_call(MODEL, {"timestep": torch.tensor([[10.0, 20.0], [10.0, 900.0]])})


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty_timesteps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TimestepError, match="is empty") as caught:
        FOUR.of_call(MODEL, {"timestep": torch.zeros(shape)})
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("value", [[1, 2], object(), {}, "noon", numpy.array([1, 2])], ids=lambda v: type(v).__name__)
def test_what_is_no_timestep(value: Any) -> None:
    with pytest.raises(TimestepError, match=f"The timestep is a {type(value).__name__}; expected a number or a tensor `b`"):
        FOUR.of_call(MODEL, {"timestep": value})


@pytest.mark.parametrize("arguments", [{}, {"timestep": None}, {"timestep": 5000}, {"timestep": torch.zeros(0)}], ids=str)
def test_one_region_asks_for_nothing(arguments: dict[str, Any]) -> None:
    assert TimestepRegions(1, None, 0.0, 1.0).of_call(MODEL, arguments) == [0]


def test_a_call_without_timestep_says_where_it_was_looked_for() -> None:
    with pytest.raises(TimestepError, match=r"Identity has 4 timestep regions.*'timestep' is None.*at_timestep"):
        FOUR.of_call(MODEL, {"timestep": None})
    with pytest.raises(TimestepError, match=r"its forward takes none"):
        TimestepRegions(4, None, 0.0, 1000.0).of_call(MODEL, {"timestep": 5})


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (TimestepRegions(1, None, 0, 1), "one timestep region"),
        (FOUR, "4 timestep regions over [0, 1000], from argument 'timestep'"),
        (TimestepRegions(2, None, 0.002, 80.0), "2 timestep regions over [0.002, 80], from at_timestep(...)"),
    ],
    ids=str,
)
def test_printed_for_the_plan(regions: TimestepRegions, words: str) -> None:
    assert str(regions) == words


# --- at_timestep -----------------------------------------------------------------------------------------------------
def test_at_timestep_goes_before_the_argument_and_ends_with_the_block() -> None:
    arguments = {"timestep": 10}
    with at_timestep(MODEL, 900):
        assert FOUR.of_call(MODEL, arguments) == [3]
    assert FOUR.of_call(MODEL, arguments) == [0]


def test_at_timestep_nests_and_tells_models_apart() -> None:
    other = nn.Identity()
    nameless = TimestepRegions(4, None, 0.0, 1000.0)
    with at_timestep(MODEL, 300), at_timestep(other, torch.tensor([900, 10])):
        with at_timestep(MODEL, 600):
            assert nameless.of_call(MODEL, {}) == [2]
            assert nameless.of_call(other, {}) == [3, 0]
        assert nameless.of_call(MODEL, {}) == [1]
    with pytest.raises(TimestepError):
        nameless.of_call(MODEL, {})


def test_at_timestep_ends_when_the_call_raises() -> None:
    with pytest.raises(ZeroDivisionError), at_timestep(MODEL, 900):
        _ = 1 / 0
    assert FOUR.of_call(MODEL, {"timestep": 10}) == [0]


def test_at_timestep_is_one_threads_own() -> None:
    found: list[list[int]] = []
    with at_timestep(MODEL, 900):
        thread = threading.Thread(target=lambda: found.append(FOUR.of_call(MODEL, {"timestep": 10})))
        thread.start()
        thread.join()
    assert found == [[0]]


# --- what the examples say -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (torch.tensor([999]), (0.0, 1000.0)),
        (torch.tensor([2]), (0.0, 1000.0)),
        (torch.tensor([999.0]), (0.0, 1000.0)),
        (torch.tensor(1000), (0.0, 1000.0)),
        (torch.tensor([0, 3]), (0.0, 1000.0)),
        (501, (0.0, 1000.0)),
        (torch.tensor([1.0]), (0.0, 1.0)),
        (torch.tensor([0.0, 0.25]), (0.0, 1.0)),
        (torch.tensor([0.25], dtype=torch.bfloat16), (0.0, 1.0)),
        (0.5, (0.0, 1.0)),
    ],
    ids=repr,
)
def test_range_read_off_the_example(value: Any, wanted: tuple[float, float]) -> None:
    regions = settle({"x": torch.ones(1), "timestep": value})
    assert (regions.argument, regions.low, regions.high, regions.count) == ("timestep", *wanted, 4)


OPEN = [
    torch.tensor([0]),
    torch.tensor([1]),
    1,
    torch.tensor([0.0]),
    torch.tensor([-0.5, 0.5]),
    torch.tensor([1001]),
    torch.tensor([float("nan")]),
]


@pytest.mark.parametrize("value", OPEN, ids=repr)
def test_range_the_example_leaves_open_is_asked_for(value: Any) -> None:
    """1 may be the last of 1000 steps or the noisiest of flow matching; 0 may be anything."""
    with pytest.raises(TimestepError, match=r'timestep_range="auto" cannot tell.*timestep=.*set timestep_range'):
        settle({"timestep": value})


@pytest.mark.parametrize("name", ["sigma", "sigmas", "noise_level"])
@pytest.mark.parametrize("value", [0.7, 14.6, torch.tensor([80.0])], ids=repr)
def test_range_of_a_noise_level_is_asked_for(name: str, value: Any) -> None:
    """Sigmas end at 1, 14.6, 80 or elsewhere: no example tells, and a wrong guess puts every step into one region."""
    with pytest.raises(TimestepError, match=f'timestep_range="auto" cannot tell.*{name}='):
        settle({name: value})
    assert settle({name: value}, timestep_range=(0, 100)).high == 100


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "time"])
def test_argument_found_by_name(name: str) -> None:
    assert settle({"x": torch.ones(1), name: torch.tensor([500])}).argument == name


def test_arguments_that_are_none_are_passed_over() -> None:
    assert settle({"timestep": None, "t": torch.tensor([500])}).argument == "t"


def test_argument_named_by_the_user_goes_first() -> None:
    arguments = {"timestep": torch.tensor([500]), "when": torch.tensor([0.5])}
    regions = settle(arguments, timestep_argument="when")
    assert (regions.argument, regions.high) == ("when", 1.0)


@pytest.mark.parametrize("count", [1, 4])
def test_unknown_argument_is_refused_beside_the_known(count: int) -> None:
    with pytest.raises(TimestepError, match=r"timestep_argument='sigma' is no argument.*\['timestep', 'x'\].*\"auto\""):
        settle({"x": torch.ones(1), "timestep": 5}, timestep_argument="sigma", timestep_regions=count)


def test_models_without_timestep_need_a_range_or_one_region() -> None:
    with pytest.raises(
        TimestepError, match=r"timestep_regions=4 needs a timestep.*\['emb', 'x'\].*timestep_argument.*at_timestep.*timestep_regions=1"
    ):
        settle({"x": torch.ones(1), "emb": torch.ones(1)})
    assert settle({"x": torch.ones(1)}, timestep_range=(0, 1)) == TimestepRegions(4, None, 0.0, 1.0)
    assert settle({"x": torch.ones(1)}, timestep_regions=1).count == 1


def test_named_argument_that_the_example_leaves_out_needs_a_range() -> None:
    with pytest.raises(TimestepError, match="from the example t=None: set timestep_range"):
        settle({"t": None}, timestep_argument="t")
    assert settle({"t": None}, timestep_argument="t", timestep_range=(0, 1)) == TimestepRegions(4, "t", 0.0, 1.0)


@pytest.mark.parametrize("value", [torch.tensor([500, 2000]), torch.tensor([[1.0, -1.0]]), 1000.5], ids=repr)
def test_range_that_the_examples_contradict_is_refused_at_once(value: Any) -> None:
    with pytest.raises(TimestepError, match=r"lies outside the range \[0, 1000\]"):
        settle({"timestep": value}, timestep_range=(0, 1000))
