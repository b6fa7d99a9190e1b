"""Law 3: a mixed-timestep batch is its samples one by one; the blend is convex, the output continuous in the ratio."""

from dataclasses import replace

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_surgery as dcs
from tests.models import Case, each_case, output
from tests.property.scenarios import BINS, Branch, Scenario, bracket, by_hand, few, loss_and_gradients, scenarios


@each_case
@given(data=st.data(), training=st.booleans())
@few
def test_mixed_batch_is_its_samples_one_by_one(case: Case, data: st.DataObject, training: bool) -> None:
    """Outputs, and gradients of weights, routers and ratios, of the batch and of its samples added up."""
    scenario = data.draw(scenarios(case))
    model = scenario.convert(scenario.original(label_dropout=False)).train(training)
    inputs = scenario.inputs(model)
    noise = torch.randn(output(model(**inputs)).shape)
    together = output(model(**inputs))
    (together * noise).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for index in range(scenario.batch):
        alone = output(model(**case.sample(inputs, index)))
        torch.testing.assert_close(together[index : index + 1], alone, atol=2e-5, rtol=1e-4)
        (alone * noise[index : index + 1]).sum().backward()
    summed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(summed)
    for name, gradient in gradients.items():
        scale = max(1.0, float(summed[name].abs().max()))
        torch.testing.assert_close(gradient / scale, summed[name] / scale, atol=2e-4, rtol=1e-3, msg=name)


@each_case
@given(data=st.data())
@few
def test_training_blends_the_two_bins_around_the_ratio(case: Case, data: st.DataObject) -> None:
    """Training equals the blend done by hand, whether each bin has a run of its own or one run stands for both."""
    entries = st.integers(0, 900).map(lambda thousandths: thousandths / 1000)
    scenario = data.draw(scenarios(case, ratios=entries, min_tokens=10))
    model = scenario.convert(scenario.original(label_dropout=False)).train()

    def ways(site: int, region: int) -> list[Branch]:
        return bracket(scenario.table[site][region], scenario.size.tokens)

    with torch.no_grad():
        expected = by_hand(scenario, model, ways)
        actual = output(model(**scenario.inputs(model)))
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-3)


def one_site(scenario: Scenario, site: int) -> nn.Module:
    """Convert with every ratio 0 but one site's, so that no later router can change its mind."""
    zeros = tuple((0.0,) * scenario.regions for _ in scenario.table)
    return replace(scenario, table=zeros).convert(scenario.original(label_dropout=False)).train()


def run_at(model: nn.Module, inputs: dict[str, object], site: int, ratio: float) -> Tensor:
    with torch.no_grad():
        dcs.ratio_table(model)[site].fill_(ratio)
        return output(model(**inputs)).double()


@each_case
@given(data=st.data(), edge=st.sampled_from(BINS[1:9]))
@few
def test_output_is_continuous_across_a_bin(case: Case, data: st.DataObject, edge: float) -> None:
    scenario = data.draw(scenarios(case, min_tokens=10, branches=["two"]))
    site = data.draw(st.integers(0, len(case.sites) - 1))
    model = one_site(scenario, site)
    inputs = scenario.inputs(model)
    below, above = (run_at(model, inputs, site, edge + step) for step in (-1e-3, 1e-3))
    low, middle, high = (run_at(model, inputs, site, edge + step) for step in (-0.1, 0.0, 0.1))
    stride = max((high - middle).abs().max(), (middle - low).abs().max())
    assert stride > 1e-5  # the ratio does matter
    assert (above - below).abs().max() < 0.1 * stride
    assert (above - below).abs().max() > 0


@each_case
@given(data=st.data(), low=st.integers(0, 8), share=st.floats(0, 1))
@few
def test_blend_weights_lie_between_zero_and_one(case: Case, data: st.DataObject, low: int, share: float) -> None:
    """The stream behind the last site moves on the straight line between the streams at the two bins.

    With one run for both, on the line up to the upper bin: there the bin's own run sees fewer tokens.
    """
    scenario = data.draw(scenarios(case, min_tokens=10))
    site = len(case.sites) - 1
    end = 1.0 if scenario.branches == "two" else 0.999
    first, between, second = streams_behind(one_site(scenario, site), scenario, [(low + end * way) / 10 for way in (0.0, share, 1.0)])
    torch.testing.assert_close(between, (1 - share) * first + share * second, atol=2e-5, rtol=1e-4)


def streams_behind(model: nn.Module, scenario: Scenario, ratios: list[float]) -> list[Tensor]:
    """The stream behind the last site, with the site at each of the ratios."""
    case, site = scenario.case, len(scenario.case.sites) - 1
    inputs = case.sample(scenario.inputs(model), 0)
    tails: list[Tensor] = []
    run_at(model, inputs, site, 0.0)  # the first call records the model, and the hook would see the recording too
    hook = model.get_submodule(case.tail).register_forward_pre_hook(lambda _, args: tails.append(args[0].double()))
    for ratio in ratios:
        run_at(model, inputs, site, ratio)
    hook.remove()
    return tails


@each_case
@given(data=st.data())
@few
def test_one_run_equals_two_where_tokens_do_not_see_each_other(case: Case, data: st.DataObject) -> None:
    """All that sets the two ways apart is the attention context: without it outputs and gradients agree."""
    scenario = data.draw(scenarios(case, min_tokens=10, branches=["two"]))
    results = []
    for branches in ("two", "boundary"):
        model = replace(scenario, branches=branches).convert(silent(scenario.original(label_dropout=False))).train()
        results.append(loss_and_gradients(model, scenario.inputs(model)))
    (one, wanted), (other, found) = results
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    for name in [name for name in wanted if name.startswith("diffcr.")]:
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(found[name] / scale, wanted[name] / scale, atol=2e-4, rtol=1e-3, msg=name)


def silent(model: nn.Module) -> nn.Module:
    """Let no token hear of another: all values that attention mixes are zero."""
    for name, module in model.named_modules():
        if name.endswith(("to_v", "add_v_proj", "qkv")):
            for values in module.parameters():  # of `qkv`, its last third
                nn.init.zeros_(values[2 * len(values) // 3 if name.endswith("qkv") else 0 :])
    return model


@each_case
@given(data=st.data())
@few
def test_a_region_answers_to_its_own_ratios_alone(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case, min_tokens=10))
    unseen = [region for region in range(scenario.regions) if region not in scenario.sample_regions]
    assume(unseen)
    model = scenario.convert(scenario.original(label_dropout=False)).train()
    inputs = scenario.inputs(model)
    expected, gradients = loss_and_gradients(model, inputs)
    assert not gradients["diffcr.ratio_table"][:, unseen].any()
    with torch.no_grad():
        dcs.ratio_table(model)[:, unseen] = 0.45
    actual, _ = loss_and_gradients(model, inputs)
    assert torch.equal(actual, expected)
