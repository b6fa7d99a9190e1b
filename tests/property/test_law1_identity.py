"""Law 1: converted at ratio 0 is the original, bit for bit: outputs and gradients, in eval and in training."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import diffcr_surgery as dcs
from tests.models import Case, each_case
from tests.property.scenarios import Scenario, few, loss_and_gradients, scenarios

EXACT = ("doubled_sigmoid", "straight_through")  # the paper's own gate halves every update


def assert_same_function(scenario: Scenario, *, training: bool) -> None:
    """Compare outputs and the gradients of the original weights, random label dropout included."""
    original, converted = scenario.original(), scenario.original()
    scenario.convert(converted, trained=False)
    assert not dcs.ratio_table(converted).any()
    inputs = scenario.inputs(original)
    expected, gradients = loss_and_gradients(original.train(training), inputs)
    actual, found = loss_and_gradients(converted.train(training), inputs)
    assert torch.equal(actual, expected)
    assert {name for name in found if not name.startswith("diffcr.")} == set(gradients)
    different = [name for name, gradient in gradients.items() if not torch.equal(gradient, found[name])]
    assert not different


@each_case
@given(data=st.data(), training=st.booleans())
@few
def test_fresh_conversion_is_the_original(case: Case, data: st.DataObject, training: bool) -> None:
    assert_same_function(data.draw(scenarios(case, gates=EXACT)), training=training)


@each_case
@given(data=st.data())
@few
def test_fresh_conversion_is_the_original_without_gradients(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case, gates=EXACT))
    original, converted = scenario.original(), scenario.original()
    scenario.convert(converted, trained=False)
    inputs = scenario.inputs(original)
    with torch.no_grad():
        expected, actual = original(**inputs), converted(**inputs)
    assert type(actual) is type(expected)
    assert torch.equal(actual[0], expected[0])


@each_case
@given(data=st.data())
@few
def test_sleeping_gates_hide_nothing_from_the_proof(case: Case, data: st.DataObject) -> None:
    """A model as its class initialises it, zero gates included, is converted all the same and stays itself."""
    scenario = data.draw(scenarios(case, gates=EXACT))
    original, converted = scenario.original(awake=False), scenario.original(awake=False)
    scenario.convert(converted, trained=False)
    assert len(converted.diffcr.plan.routed_sites) == len(case.sites)
    inputs = scenario.inputs(original)
    with torch.no_grad():
        assert torch.equal(original(**inputs)[0], converted(**inputs)[0])
