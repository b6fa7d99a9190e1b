"""Law 4: gradients reach every ratio of the regions seen and every router that decides; the budget is met."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import diffcr_surgery as dcs
from tests.models import DEFAULT, Case, each_case, output
from tests.property.scenarios import Scenario, few, loss_and_gradients, scenarios


@each_case
@given(data=st.data(), trained=st.booleans())
@few
def test_gradients_reach_ratios_and_routers(case: Case, data: st.DataObject, trained: bool) -> None:
    """Any table, from exact 0 up to the bound; routers trained or as conversion leaves them."""
    scenario = data.draw(scenarios(case, min_tokens=10))
    model = scenario.convert(scenario.original(label_dropout=False)).train()
    if not trained:
        with torch.no_grad():
            for router in model.diffcr.routers.values():
                router.weight.zero_()
    _, gradients = loss_and_gradients(model, scenario.inputs(model))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    seen = sorted(set(scenario.sample_regions))
    assert (gradients["diffcr.ratio_table"][:, seen] != 0).all()
    for site, ratios in zip(model.diffcr.plan.routed_sites, scenario.table, strict=True):
        if any(ratios[region] > 0 for region in seen):
            assert gradients[f"diffcr.routers.{site.router}.weight"].any(), site.path


@each_case
@given(data=st.data())
@few
def test_the_table_leaves_exact_zero(case: Case, data: st.DataObject) -> None:
    """From a fresh conversion, one step of plain gradient descent moves every ratio whose gradient points inside."""
    scenario = data.draw(scenarios(case, min_tokens=10, gates=("doubled_sigmoid", "straight_through")))
    model = scenario.convert(scenario.original(label_dropout=False), trained=False).train()
    table = dcs.ratio_table(model)
    optimizer = torch.optim.SGD([table], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (1e-3 * output(model(**scenario.inputs(model))).mean() + dcs.ratio_loss(model)).backward()
        optimizer.step()
    assert (table > 0).all()


@each_case
@given(data=st.data(), target=st.integers(5, 90).map(lambda hundredths: hundredths / 100))
@few
def test_budget_loss_pulls_the_mean_to_the_target(case: Case, data: st.DataObject, target: float) -> None:
    scenario = data.draw(scenarios(case))
    model = scenario.convert(scenario.original(), target_ratio=target)
    table = dcs.ratio_table(model)
    if data.draw(st.booleans()):
        with torch.no_grad():
            table.zero_()
    rate = 0.1 * table.numel() / 0.3  # each step covers a share of the way, whatever the size of the table
    optimizer = torch.optim.SGD([table], lr=rate)
    first = dcs.ratio_loss(model).detach()
    for _ in range(200):
        optimizer.zero_grad()
        dcs.ratio_loss(model).backward()
        optimizer.step()
        assert table.grad.isfinite().all()
    assert dcs.ratio_loss(model).detach() <= first
    assert abs(float(dcs.ratio_table(model).detach().mean()) - target) < 0.01


@each_case
def test_ratio_optimizer_meets_the_target_and_tells_entries_apart(case: Case) -> None:
    scenario = Scenario(case, DEFAULT, DEFAULT, 16, 2, (2, 8), "doubled_sigmoid", (), 3)
    model = scenario.convert(scenario.original(label_dropout=False), trained=False).train()
    optimizer = dcs.RatioOptimizer(model, total_steps=20, settle=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        output(model(**scenario.inputs(model))).square().mean().backward()
        optimizer.step()
    table = dcs.ratio_table(model).detach()
    assert abs(float(table.mean()) - 0.3) < 1e-3
    assert table.min() >= 0 and table.max() <= 0.9
    assert len(table.flatten().unique()) > table.numel() // 2
