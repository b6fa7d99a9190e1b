"""Law 6: save, load: equal; specialised = eval at the same ratios; k = ⌈(1 − ρ)N⌉, never 0."""

import tempfile
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_surgery as dcs
from tests.models import Case, each_case, output
from tests.property.scenarios import SPOTS, Scenario, few, kept_count, loss_and_gradients, scenarios


@each_case
@given(data=st.data())
@few
def test_saved_and_loaded_models_are_equal(case: Case, data: st.DataObject) -> None:
    """In eval and in training, over all regions, with the configuration."""
    scenario = data.draw(scenarios(case))
    saved = scenario.convert(scenario.original(label_dropout=False))
    loaded = scenario.original(label_dropout=False)
    inputs = scenario.inputs(loaded)
    with tempfile.TemporaryDirectory() as folder:
        dcs.save_adapter(saved, folder)
        assert dcs.load_adapter_(loaded, folder, inputs) is loaded
    assert torch.equal(dcs.ratio_table(loaded), dcs.ratio_table(saved))
    assert torch.equal(dcs.ratio_loss(loaded), dcs.ratio_loss(saved))
    assert list(loaded.state_dict()) == list(saved.state_dict())
    for training in (False, True):
        expected, gradients = loss_and_gradients(saved.train(training), inputs)
        actual, again = loss_and_gradients(loaded.train(training), inputs)
        assert torch.equal(actual, expected)
        assert all(torch.equal(again[name], gradients[name]) for name in gradients)


@each_case
@given(data=st.data())
@few
def test_specialised_equals_eval(case: Case, data: st.DataObject) -> None:
    """For mixed batches, and for one region after the other."""
    scenario = data.draw(scenarios(case, ratios=st.sampled_from([0.0, 0.1, 0.3, 0.37, 0.5, 0.82, 0.9])))
    model = scenario.convert(scenario.original())
    calls = [scenario.spots, *((spot,) for spot in range(0, SPOTS, 3))]
    with torch.no_grad():
        expected = [output(model(**scenario.inputs(model, spots))) for spots in calls]
        assert dcs.specialize_(model) is model
        actual = [output(model(**scenario.inputs(model, spots))) for spots in calls]
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


class Lengths:
    """Number of tokens every block was called with, in calls after the first (which records the model)."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.seen: dict[int, set[int]] = {}
        for index, (path, _) in enumerate(case.sites):
            model.get_submodule(path).register_forward_pre_hook(self._hook(case, index), with_kwargs=True)

    def _hook(self, case: Case, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream: Tensor = kwargs[case.stream] if case.stream in kwargs else args[0]
            self.seen.setdefault(index, set()).add(stream.shape[1])

        return hook


def lengths(scenario: Scenario, model: nn.Module, watch: Lengths, spot: int) -> list[set[int]]:
    inputs = scenario.inputs(model, [spot] * scenario.batch)
    with torch.no_grad():
        model(**inputs)
        watch.seen.clear()
        model(**inputs)
    return [watch.seen[index] for index in range(len(scenario.case.sites))]


@each_case
@given(data=st.data())
@few
def test_blocks_run_on_the_kept_count_and_never_on_nothing(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.convert(scenario.original())
    executed, watch = model.diffcr.executed_ratios(), Lengths(model, case)
    for specialised in (False, True):
        if specialised:
            dcs.specialize_(model)
        for spot in sorted(set(scenario.spots)):
            region = spot * scenario.regions // SPOTS
            wanted = [kept_count(float(ratio), scenario.size.tokens) for ratio in executed[:, region]]
            assert min(wanted) >= 1
            assert lengths(scenario, model, watch, spot) == [{count} for count in wanted]


@each_case
@given(data=st.data())
@few
def test_executed_bins_surround_the_ratios_and_keep_their_mean(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.convert(scenario.original())
    table, executed = dcs.ratio_table(model).detach(), model.diffcr.executed_ratios()
    assert executed.shape == table.shape
    torch.testing.assert_close(10 * executed, (10 * executed).round(), atol=1e-5, rtol=0)
    assert ((executed - table).abs() < 0.1 + 1e-6).all()
    assert abs(float(executed.mean() - table.mean())) <= 0.1 / table.numel() + 1e-6


@each_case
@given(data=st.data(), budget=st.integers(10, 100).map(lambda hundredths: hundredths / 100))
@few
def test_budget_picks_another_point(case: Case, data: st.DataObject, budget: float) -> None:
    """The mean share of tokens kept, read off the blocks' calls as bins, is the budget asked for."""
    scenario = data.draw(scenarios(case, min_tokens=10))
    tokens = scenario.size.tokens
    bin_of = {kept_count(tenths / 10, tokens): tenths / 10 for tenths in range(10)}
    model = scenario.convert(scenario.original())
    dcs.specialize_(model, budget=budget)
    watch, achieved = Lengths(model, case), []
    for region in range(scenario.regions):
        for counts in lengths(scenario, model, watch, region * SPOTS // scenario.regions):
            (count,) = counts
            achieved.append(bin_of[count])
    assert abs(1 - sum(achieved) / len(achieved) - budget) <= 0.1 / len(achieved) + 1e-6
