"""A long shift: thousands of calls and steps of one model, of every form a user mixes, and nothing may grow.

What a model keeps is bounded: graphs for each form of call and each set of ratios, the oldest of which go (`MAX_RECORDINGS`, `MAX_VARIANTS`
and `MAX_GRAPHS`). Growth is looked for in the second half of a shift, when all of that is warm: tensors alive and graphs kept are to be the
same in number after every round of the same calls, and neither the memory of the process nor what Python allocates may tend upwards.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery.runtime.execute import MAX_GRAPHS
from diffcr_surgery.trace.recording import MAX_RECORDINGS, MAX_VARIANTS
from tests.models import CASES, Size, output, snapshot, trained

CASE = CASES["pixart"]
SIZES = (Size(2, 2), Size(1, 3), Size(2, 5), Size(3, 3))
REGIONS = 3
PAGE = 4096
LEAK = 128  # bytes a call of the process: less than one tensor object of Python takes, which is over 400 with its storage
CRUMB = 8  # bytes a call of Python: less than any object of it takes
READING = 512  # bytes a round that a test itself keeps of it


@dataclass(frozen=True)
class Reading:
    """What there is at the end of a round."""

    tensors: int
    objects: int
    graphs: int
    recordings: int
    python: int
    resident: int


def read(model: nn.Module) -> Reading:
    """Count after a full collection; `python` and `resident` are bytes."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in objects)
    state = getattr(model, "diffcr", None)
    graphs, recordings = (0, 0) if state is None else (len(state.graphs()), len(state.recordings))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Reading(tensors, len(objects), graphs, recordings, tracemalloc.get_traced_memory()[0], pages * PAGE)


def slope(values: list[int], calls: int) -> float:
    """Return the growth a call, as a line through the values has it."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    rise = sum((index - middle) * (value - mean) for index, value in enumerate(values))
    return rise / sum((index - middle) ** 2 for index in range(len(values))) / calls


def steady(readings: list[Reading], calls: int) -> None:
    """Check the second half of a shift with so many calls a round, and print its figures."""
    late = readings[len(readings) // 2 :]
    figures = {
        "tensors": [one.tensors for one in late], "objects": [one.objects for one in late], "graphs": [one.graphs for one in late],
        "python, bytes a call": slope([one.python for one in late], calls),
        "resident, bytes a call": slope([one.resident for one in late], calls),
        "resident at the end, MiB": late[-1].resident / 2**20,
    }  # fmt: skip
    print(figures)
    assert len(set(figures["tensors"])) == 1, figures
    assert len(set(figures["graphs"])) == 1 and len({one.recordings for one in late}) == 1, figures
    assert slope([one.objects for one in late], calls) < 0.3, figures  # a call; readings and threads of other tests add a few a round
    if len(readings) * calls > 1000:
        assert figures["python, bytes a call"] < CRUMB + READING / calls, figures
        assert figures["resident, bytes a call"] < LEAK, figures
    else:  # a few calls do not fill what Python keeps for later use, and the pages of the process say nothing
        assert slope([one.python for one in late], 1) < 4096, figures


@dataclass(frozen=True)
class Length:
    """How long a shift is: rounds, how often a round makes each call, and which share of the batches there are."""

    rounds: int
    repeats: int = 1
    every: int = 1


def lengths(short: Length, long: Length) -> Any:
    """Run a short shift, and a long one in the slow tier."""
    return pytest.mark.parametrize("length", [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _untraced() -> Iterator[None]:
    yield
    tracemalloc.stop()


def fresh() -> tuple[nn.Module, dcs.SurgeryPlan]:
    model = CASE.build(0, label_dropout=False)
    config = dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=REGIONS, timestep_range=CASE.timestep_range)
    return model, dcs.plan(model, CASE.inputs(model, 2, 1), config)


def batches(model: nn.Module) -> list[dict[str, Any]]:
    """One batch of each size, length and kind: of one region, of the same in another order, of several."""
    kinds = ([0], [1], [2, 2], [0, 1], [2, 0, 1])
    return [
        CASE.inputs(model, len(regions), 3, timesteps=CASE.times(REGIONS, regions), size=size)
        for size, regions in itertools.product(SIZES, kinds)
    ]


def call(model: nn.Module, given: dict[str, Any], training: bool) -> None:
    """Run once, in training with a backward pass."""
    model.train(training)
    with torch.set_grad_enabled(training):
        result = output(model(**given))
    if training:
        result.square().mean().backward()
        model.zero_grad()


def shift(model: nn.Module, rounds: int, round_: Callable[[], int]) -> tuple[list[Reading], int]:
    """Work for so many rounds, of which each makes the same calls in another order; returns a reading of each, and its calls.

    What Python allocates is counted, which takes time, from a little before the second half: what is then exchanged was not counted yet.
    """
    readings = []
    for number in range(rounds):
        if number == max(0, rounds // 2 - max(3, rounds // 10)):
            tracemalloc.start()
        calls = round_()
        readings.append(read(model))
    return readings, calls


def everything(model: nn.Module, planned: dcs.SurgeryPlan, order: random.Random, length: Length) -> int:
    """Call a converted model in eval and in training, specialise it, call it, and restore it."""
    given = batches(model)[:: length.every] * length.repeats
    work = list(itertools.product(given, (False, True)))
    trained(dcs.convert_(model, planned))
    for one, training in order.sample(work, len(work)):
        call(model, one, training)
    dcs.specialize_(model)
    for one in order.sample(given, len(given)):
        call(model, one, False)
    dcs.restore_(model)
    return len(work) + len(given)


@lengths(Length(8, every=7), Length(20, repeats=9))
def test_cycles_of_converting_specialising_and_restoring(length: Length) -> None:
    """The long shift makes 10,800 calls in 20 cycles."""
    model, planned = fresh()
    before, order = snapshot(model), random.Random(0)
    steady(*shift(model, length.rounds, lambda: everything(model, planned, order, length)))
    assert snapshot(model.eval()) == before


@pytest.mark.parametrize("specialised", [False, True])
@lengths(Length(6, every=3), Length(50, repeats=5))
def test_calls_of_one_model(length: Length, specialised: bool) -> None:
    """In eval and in training by turns, 10,000 calls in the long shift; specialised in eval alone, 5,000."""
    model, planned = fresh()
    given, order = batches(model)[:: length.every] * length.repeats, random.Random(0)
    trained(dcs.convert_(model, planned))
    if specialised:
        dcs.specialize_(model)
    work = list(itertools.product(given, (False,) if specialised else (False, True)))

    def round_() -> int:
        for one, training in order.sample(work, len(work)):
            call(model, one, training)
        return len(work)

    steady(*shift(model, length.rounds, round_))


@lengths(Length(6, every=4), Length(150))
def test_steps_of_training(length: Length) -> None:
    """Ratios move from step to step, and with them the graphs: as many are kept as may be, and no tensor more. The long shift has 3,000."""
    model, planned = fresh()
    given, order = batches(model)[:: length.every], random.Random(0)
    dcs.convert_(model, planned).train()
    ratios = dcs.RatioOptimizer(model, total_steps=length.rounds * len(given), lr=0.05)
    optimizer = torch.optim.SGD(dcs.parameter_groups(model, lr=1e-4, router_lr=1e-3, weight_decay=0.0))

    def round_() -> int:
        for one in order.sample(given, len(given)):
            output(model(**one)).square().mean().backward()
            for each in (optimizer, ratios):
                each.step()
                each.zero_grad()
        return len(given)

    readings, calls = shift(model, length.rounds, round_)
    late = readings[len(readings) // 2 :]
    print(
        {"tensors": {one.tensors for one in late}, "graphs": late[-1].graphs, "resident": [one.resident for one in late[:: len(late) // 3]]}
    )
    assert len({one.tensors for one in late}) == 1
    assert len({one.recordings for one in late}) == 1
    settled = [one.objects for one in late if one.graphs == late[-1].graphs]  # each graph more is some hundred objects more
    if len(settled) > 3:
        assert slope(settled, calls) < 0.3, settled
    assert max(len(recording.derived.graphs()) for recording in model.diffcr.recordings) <= MAX_GRAPHS


def test_graphs_of_changing_ratios_are_bounded() -> None:
    model, planned = fresh()
    trained(dcs.convert_(model, planned))
    given = CASE.inputs(model, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(MAX_GRAPHS + 40):
        with torch.no_grad():
            table = dcs.ratio_table(model)
            table.copy_(0.9 * torch.rand(table.shape, generator=generator))
        call(model, given, False)
    (recording,) = model.diffcr.recordings
    assert len(recording.derived.graphs()) == MAX_GRAPHS
    twin = copy.deepcopy(model)
    assert torch.equal(output(model(**given)), output(twin(**given)))


def test_recordings_of_changing_shapes_are_bounded() -> None:
    """The oldest are forgotten, and made again when their shape comes back."""
    model, planned = fresh()
    trained(dcs.convert_(model, planned))
    first = CASE.inputs(model, 1, 1, size=Size(1, 2, 1))
    with torch.no_grad():
        wanted = output(model(**first))
        for words in range(1, MAX_RECORDINGS + 8):
            model(**CASE.inputs(model, 1, 1, size=Size(1, 2, words)))
        assert len(model.diffcr.recordings) == MAX_RECORDINGS
        assert torch.equal(output(model(**first)), wanted)
    assert len(model.diffcr.recordings) == MAX_RECORDINGS
    assert all(len(variants) <= MAX_VARIANTS for variants in model.diffcr.recordings._entries.values())
