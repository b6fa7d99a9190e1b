"""Faults at every stage: whatever is being done, an error from anywhere inside leaves nothing behind, and the next attempt works.

An operation is run once and every call it makes is noted: of functions of this package, by the place they are called from, and of torch's.
Then it is run again, once for each such place, and the call there raises. A place that is passed many times raises at its first, its middle
or its last passage. Short operations are also stopped between any two lines of the package's code, as Ctrl-C does it. The next attempt is
another thread's, which waits in vain for a lock that was left locked.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery.runtime import convert
from tests.attack.faults import Faults, Place, comes_from, raw, surroundings
from tests.models import CASES, Case, output, snapshot, trained

ERRORS = (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)
PATIENCE = 120  # seconds that an attempt may take
ATTACKS = 60  # on one operation, at most, in the slow test; a fifth on further models and between lines, which take longer
CASE_NAMES = ("dit", "flux", "hunyuan")  # labels dropped at random and a conditional tail; two streams; long skips


@dataclass
class Situation:
    """A model about to be worked on.

    Attributes:
        model: The model.
        act: Does it.
        read: Makes of what `act` returns something by which two outcomes can be compared.
        watched: Returns everything that has to stay as it is if `act` fails.
        in_place: Whether `act` returns the model, changed.
    """

    model: nn.Module
    act: Callable[[], Any]
    read: Callable[[Any], Any]
    watched: Callable[[], Any]
    in_place: bool = False


def config(case: Case) -> dcs.DiffCRConfig:
    return dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=4, timestep_range=case.timestep_range)


@cache
def original(name: str) -> nn.Module:
    return CASES[name].build(0, label_dropout=False)


@cache
def planned(name: str) -> dcs.SurgeryPlan:
    return dcs.plan(original(name), inputs(CASES[name]), config(CASES[name]))


@cache
def converted(name: str) -> nn.Module:
    """A model that routes, and was never called."""
    model = dcs.convert_(copy.deepcopy(original(name)), planned(name))
    with torch.no_grad():
        dcs.ratio_table(trained(model))[0] = 0.0
    return model


def inputs(case: Case, *regions: int) -> dict[str, Any]:
    times = case.times(4, list(regions or (1, 1)))
    return case.inputs(original(case.name), len(times), 1, timesteps=times)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a converted model that outlives a call; graphs recorded so far are a cache, and may grow."""
    found = snapshot(model) | {
        "values of gradients": {name: None if p.grad is None else raw(p.grad) for name, p in model.named_parameters()}
    }
    if hasattr(model, "diffcr"):
        own = model.diffcr
        found |= {"plan": id(own.plan), "fixed": own.fixed, "achieved": own.achieved, "visits": raw(own.visits)}
    return found


def values(model: nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def answers(model: nn.Module, given: dict[str, Any]) -> bytes:
    with torch.no_grad():
        return raw(output(model(**given)))


def read_model(case: Case, model: nn.Module) -> Any:
    """What is to be known of a model that was converted, specialised or restored."""
    achieved = str(model.diffcr.achieved) if hasattr(model, "diffcr") else "dense"
    return type(model), values(model), achieved, model.training, answers(model, inputs(case, 0, 3))


def on_model(case: Case, model: nn.Module, act: Callable[[nn.Module], Any], read: Callable[[Any], Any] | None = None) -> Situation:
    """`act` on a model; without `read` it works in place."""
    in_place = read is None
    return Situation(model, lambda: act(model), read or (lambda made: read_model(case, made)), lambda: state(model), in_place)


def plain(case: Case) -> nn.Module:
    return copy.deepcopy(original(case.name))


def routing(case: Case, *, training: bool = False) -> nn.Module:
    return copy.deepcopy(converted(case.name)).train(training)


def plan(case: Case, _: Path) -> Situation:
    return on_model(case, plain(case), lambda model: dcs.plan(model, inputs(case), config(case)), lambda made: (str(made), str(made.graph)))


def convert_from_inputs(case: Case, _: Path) -> Situation:
    return on_model(case, plain(case), lambda model: dcs.convert_(model, inputs(case), config(case)))


def convert_from_plan(case: Case, _: Path) -> Situation:
    return on_model(case, plain(case), lambda model: dcs.convert_(model, planned(case.name)))


def first_call(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case), lambda model: answers(model, inputs(case)), lambda made: made)


def first_mixed_call(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case), lambda model: answers(model, inputs(case, 3, 0, 3)), lambda made: made)


def _step(model: nn.Module, given: dict[str, Any]) -> Any:
    result = output(model(**given))
    gradients = torch.autograd.grad(result.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return raw(result), [None if gradient is None else raw(gradient) for gradient in gradients], raw(model.diffcr.visits)


def first_training_call(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case, training=True), lambda model: _step(model, inputs(case)), lambda made: made)


def first_mixed_training_call(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case, training=True), lambda model: _step(model, inputs(case, 3, 0, 3)), lambda made: made)


def specialize(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case, training=True), dcs.specialize_)


def specialize_to_a_budget(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case), lambda model: dcs.specialize_(model, budget=0.8, cost="flops", example_inputs=inputs(case)))


def restore(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case), dcs.restore_)


def save(case: Case, folder: Path) -> Situation:
    """Over an earlier adapter; whatever happens, that or the new one can be loaded."""
    model, earlier = routing(case), routing(case)
    with torch.no_grad():
        dcs.ratio_table(earlier).zero_()
    dcs.save_adapter(earlier, folder)

    def written(_: Any) -> Any:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def watched() -> Any:
        loaded = dcs.load_adapter_(plain(case), folder, inputs(case))
        sound = any(values(loaded) == values(one) for one in (model, earlier))
        return state(model) | {"sound": sound, "files": sorted(path.name for path in folder.iterdir())}

    return Situation(model, lambda: dcs.save_adapter(model, folder), written, watched)


def load(case: Case, folder: Path) -> Situation:
    dcs.save_adapter(converted(case.name), folder)
    return on_model(case, plain(case), lambda model: dcs.load_adapter_(model, folder, inputs(case)))


def optimizer_step(case: Case, _: Path) -> Situation:
    model = routing(case, training=True)
    optimizer = dcs.RatioOptimizer(model, total_steps=9)
    for regions in ((0, 1), (2, 3)):
        output(model(**inputs(case, *regions))).square().sum().backward()
        if regions == (0, 1):
            optimizer.step()

    def inside() -> dict[str, Any]:
        kept = optimizer.state_dict()["state"][0]
        return {name: raw(value) if isinstance(value, torch.Tensor) else value for name, value in kept.items()}

    return Situation(model, optimizer.step, lambda _: (state(model)["visits"], values(model), inside()), lambda: state(model) | inside())


def deep_copy(case: Case, _: Path) -> Situation:
    return on_model(case, routing(case), copy.deepcopy, lambda twin: read_model(case, twin))


def pickled(case: Case, _: Path) -> Situation:
    def act(model: nn.Module) -> Any:
        written = io.BytesIO()
        torch.save(model, written)
        written.seek(0)
        return pickle.loads(pickle.dumps(model)), torch.load(written, weights_only=False)

    return on_model(case, routing(case), act, lambda twins: [read_model(case, twin) for twin in twins])


LONG = (
    plan, convert_from_inputs, first_call, first_mixed_call, first_training_call, first_mixed_training_call, specialize,
    specialize_to_a_budget, load,
)  # fmt: skip
SHORT = (convert_from_plan, restore, save, optimizer_step, deep_copy, pickled)


@dataclass
class Undisturbed:
    """What an operation does when nothing fails: its result, and what it passes on its way."""

    result: Any
    passed: dict[Place, int]


_KNOWN: dict[Any, Undisturbed] = {}


def undisturbed(operation: Callable[..., Situation], case: Case, folder: Path, *, lines: bool = False) -> Undisturbed:
    key = (operation, case.name, lines)
    if key not in _KNOWN:
        operation(case, folder / "warm-up").act()  # what is imported or cached once for all is no part of the operation
        situation = operation(case, folder / "undisturbed")
        with Faults(lines=lines) as seen:
            made = situation.act()
        _KNOWN[key] = Undisturbed(situation.read(made), seen.passed)
    return _KNOWN[key]


def attack(
    operation: Callable[..., Situation], case: Case, folder: Path, error: BaseException, place: Place, passage: int, lines: bool
) -> str:
    """Fail once at a place and try again; returns what went wrong, in words."""
    wanted = undisturbed(operation, case, folder.parent, lines=lines).result
    situation = operation(case, folder)
    before, around = situation.watched(), surroundings()
    raised: BaseException | None = None
    with Faults(error, place, passage, lines=lines) as fault:
        try:
            situation.act()
        except BaseException as caught:
            raised = caught
    if not fault.fired:
        return "the place was not passed again"
    if raised is None:
        return "the error was swallowed"
    if not comes_from(raised, error):
        return f"it came out as {type(raised).__name__}: {raised}"
    raised = error = None  # frames of its traceback hold the model
    if surroundings() != around:
        return "a context was left open"
    after = situation.watched()
    if after != before:
        # Stopped after its last step, an operation is done all the same; in between there must be nothing.
        done = situation.in_place and situation.read(situation.model) == wanted
        return "" if done else f"the model changed: {[name for name in before if before[name] != after.get(name)]}"
    again: list[Any] = []
    other = threading.Thread(target=lambda: again.append(situation.read(situation.act())), daemon=True)
    other.start()
    other.join(PATIENCE)
    return "" if again == [wanted] else "the next attempt waits for a lock" if other.is_alive() else f"the next attempt gave {again}"


def places(operation: Callable[..., Situation], case: Case, folder: Path, lines: bool) -> list[tuple[Place, int]]:
    """Return each place with each passage at which it is to fail."""
    passed = undisturbed(operation, case, folder, lines=lines).passed
    return [(place, passage) for place, count in passed.items() for passage in sorted({0, count // 2, count - 1})]


def by(operations: Sequence[Callable[..., Situation]], lines: bool) -> list[Any]:
    return [pytest.param(each, lines, id=f"{each.__name__}, {'lines' if lines else 'calls'}") for each in operations]


@pytest.mark.parametrize(("operation", "lines"), by((*LONG, *SHORT), False) + by(SHORT, True))
@given(data=st.data(), error=st.sampled_from(ERRORS))
@settings(max_examples=2, deadline=None)
def test_an_error_from_anywhere_leaves_nothing_behind(
    operation: Callable[..., Situation],
    lines: bool,
    data: st.DataObject,
    error: type[BaseException],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("attack")
    place, passage = data.draw(st.sampled_from(places(operation, CASES["dit"], folder, lines)))
    assert attack(operation, CASES["dit"], folder / "model", error("planted"), place, passage, lines) == ""


def test_restoring_goes_on_where_it_was_stopped() -> None:
    """Between the class and `diffcr` the model is dense again and has `diffcr` still; restoring it once more takes that away."""
    model = copy.deepcopy(original("dit"))
    before = snapshot(model)
    lines = {line for _, _, line in convert._take_back.__code__.co_lines() if line is not None}
    for line in lines:
        dcs.convert_(model, planned("dit"))

        def stop(frame: types.FrameType, event: str, _: Any, line: int = line) -> Any:
            if event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return stop if frame.f_code is convert._take_back.__code__ else None

        tracer = sys.gettrace()
        sys.settrace(stop)
        try:
            dcs.restore_(model)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        if hasattr(model, "diffcr"):
            dcs.restore_(model)
        assert snapshot(model) == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [*((name, False) for name in CASE_NAMES), (CASE_NAMES[0], True)])
@pytest.mark.parametrize("operation", (*LONG, *SHORT))
def test_an_error_from_each_place_leaves_nothing_behind(
    operation: Callable[..., Situation], name: str, lines: bool, tmp_path: Path
) -> None:
    """Of long operations every so many places, of short ones all of them: calls on each model, lines on one."""
    found = places(operation, CASES[name], tmp_path, lines)
    most = ATTACKS // 5 if lines or name != CASE_NAMES[0] else ATTACKS
    wrong = {}
    for number, (place, passage) in enumerate(found[:: math.ceil(len(found) / most)]):
        error = ERRORS[number % len(ERRORS)]
        said = attack(operation, CASES[name], tmp_path / str(number), error("planted"), place, passage, lines)
        if said:
            wrong[place, passage, error.__name__] = said
    assert not wrong
