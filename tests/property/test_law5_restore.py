"""Law 5: convert and restore leave nothing behind, also when the model raises in the middle of a stage."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffcr_surgery as dcs
from tests.models import Case, each_case, snapshot
from tests.property.scenarios import few, loss_and_gradients, scenarios


def disturb(model: nn.Module, data: st.DataObject) -> None:
    """Bring the model into a state of its own: mixed modes, frozen weights, gradients in place, hooks."""
    modules, parameters = list(model.modules()), list(model.parameters())
    for module in modules:
        module.training = data.draw(st.integers(0, 3)) == 0
    for parameter in parameters[:: data.draw(st.integers(2, 5))]:
        parameter.requires_grad_(False)
    for parameter in parameters[1 :: data.draw(st.integers(2, 5))]:
        parameter.grad = torch.ones_like(parameter)
    modules[data.draw(st.integers(0, len(modules) - 1))].register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)


@each_case
@given(data=st.data(), used=st.booleans())
@few
def test_restore_undoes_everything(case: Case, data: st.DataObject, used: bool) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.original()
    disturb(model, data)
    before = snapshot(model)
    scenario.convert(model)
    if used:
        state = torch.get_rng_state()
        with torch.no_grad():
            model(**scenario.inputs(model))
        torch.set_rng_state(state)
    assert dcs.restore_(model) is model
    assert snapshot(model) == before


@each_case
@given(data=st.data(), used=st.booleans())
@few
def test_specialised_models_are_restored_too(case: Case, data: st.DataObject, used: bool) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.original()
    before = snapshot(model)
    scenario.convert(model)
    dcs.specialize_(model)
    if used:
        with torch.no_grad():
            model(**scenario.inputs(model))
    dcs.restore_(model)
    assert snapshot(model) == before


@each_case
@given(data=st.data())
@few
def test_planning_changes_nothing(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.original()
    disturb(model, data)
    inputs = scenario.inputs(model)
    before = snapshot(model)
    dcs.plan(model, inputs, scenario.config())
    assert snapshot(model) == before
    dcs.trace(model, inputs)
    assert snapshot(model) == before


class PlantedError(Exception):
    """Raised by a block in the middle of a conversion."""


@each_case
@given(data=st.data(), calls=st.integers(0, 12))
@few
def test_a_block_that_raises_leaves_no_trace(case: Case, data: st.DataObject, calls: int) -> None:
    """The block fails after some calls: in the recording, in the proof, in whatever runs it."""
    scenario = data.draw(scenarios(case))
    model = scenario.original()
    disturb(model, data)
    left = [calls]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise PlantedError

    path = data.draw(st.sampled_from(case.sites))[0]
    model.get_submodule(path).register_forward_pre_hook(fail)
    before = snapshot(model)
    try:
        scenario.convert(model, trained=False)
    except (PlantedError, dcs.errors.SurgeryError):
        assert left[0] < 0
    else:
        dcs.restore_(model)
    assert snapshot(model) == before


@each_case
@given(data=st.data())
@few
def test_converting_again_after_restoring_gives_the_same_model(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.convert(scenario.original(label_dropout=False)).train()
    inputs = scenario.inputs(model)
    expected, gradients = loss_and_gradients(model, inputs)
    model.zero_grad()
    dcs.restore_(model)
    actual, again = loss_and_gradients(scenario.convert(model), inputs)
    assert torch.equal(actual, expected)
    assert set(again) == set(gradients)
    assert all(torch.equal(again[name], gradients[name]) for name in gradients)
