"""The ratio table's own optimizer: the mean follows its schedule, the gradient decides who gets what of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery import optimizer as optimizer_module
from diffcr_surgery.errors import ConfigError, ConversionError
from tests.small import LAYERS, REGIONS, Denoiser, converted, give, inputs

CLOSE = 1e-6


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """Converted once; each test works on a copy."""
    torch.manual_seed(0)
    return converted()


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    return copy.deepcopy(original)


def mean(model: nn.Module) -> float:
    return float(dcs.ratio_table(model).detach().double().mean())


# --- the schedule ----------------------------------------------------------------------------------------------------
@given(
    total=st.integers(1, 30),
    ramp=st.sampled_from([0.1, 0.4, 0.5, 1.0]),
    start=st.sampled_from([0.0, 0.1, 0.3, 0.7]),
    lr=st.sampled_from([0.0, 0.1, 5.0]),
    seed=st.integers(0, 99),
)
def test_the_mean_follows_the_schedule_exactly_whatever_the_gradient(
    original: nn.Module, total: int, ramp: float, start: float, lr: float, seed: int
) -> None:
    model = copy.deepcopy(original)
    with torch.no_grad():
        dcs.ratio_table(model).fill_(start)
    optimizer = dcs.RatioOptimizer(model, total_steps=total, ramp=ramp, lr=lr, settle=0.0)
    source = torch.Generator().manual_seed(seed)
    for step in range(1, total + 1):
        give(model, torch.randn(LAYERS, REGIONS, generator=source) * 10 ** torch.randn(1, generator=source))
        optimizer.step()
        share = min(1.0, step / max(1.0, ramp * total))
        assert mean(model) == pytest.approx(start + share * (0.3 - start), abs=CLOSE)
        table = dcs.ratio_table(model).detach()
        assert 0.0 <= float(table.min()) and float(table.max()) <= 0.9 + CLOSE
    assert mean(model) == pytest.approx(0.3, abs=CLOSE)


@given(total=st.integers(1, 30), settle=st.sampled_from([0.1, 0.4, 0.6]), target=st.floats(0.0, 0.9), seed=st.integers(0, 99))
def test_a_table_that_has_settled_is_what_inference_runs_at(
    original: nn.Module, total: int, settle: float, target: float, seed: int
) -> None:
    model, source = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    model.diffcr.plan = replace(model.diffcr.plan, config=replace(model.diffcr.config, target_ratio=target))
    optimizer = dcs.RatioOptimizer(model, total_steps=total, settle=settle)
    moving = math.ceil(total * (1 - settle) - 1e-9)
    before: list[Tensor] = []
    for step in range(1, total + 3):
        give(model, torch.randn(LAYERS, REGIONS, generator=source))
        optimizer.step()
        before.append(dcs.ratio_table(model).detach().clone())
        if step <= moving:
            continue
        assert torch.equal(before[-1], model.diffcr.budget.round(before[moving - 1])), "rounded once, from where it had come to"
        assert torch.equal(before[-1], model.diffcr.executed_ratios())
    assert mean(model) == pytest.approx(target, abs=0.05 / (LAYERS * REGIONS) + CLOSE)


@pytest.mark.parametrize("branches", ["two", "boundary"])
@pytest.mark.parametrize("max_ratio", [0.9, 0.85])
def test_a_model_that_has_settled_is_trained_as_it_will_run(branches: str, max_ratio: float) -> None:
    """At the upper bound too, where a ratio that is still learned runs on the tokens of the bin below."""
    model = converted(branches=branches, max_ratio=max_ratio, target_ratio=0.5)
    optimizer = dcs.RatioOptimizer(model, total_steps=20, lr=1.0, settle=0.5)
    for router in model.diffcr.routers.values():
        nn.init.normal_(router.weight)
    for _ in range(20):
        give(model, torch.linspace(-1, 1, LAYERS * REGIONS).reshape(LAYERS, REGIONS))
        optimizer.step()
        optimizer.zero_grad()
    assert float(dcs.ratio_table(model).detach().max()) > max_ratio - 1e-6, "the bound is what this is about"
    for time in (100.0, 350.0, 600.0, 900.0):
        trained = model.train()(**inputs(time, time))
        with torch.no_grad():
            assert torch.allclose(trained, model.eval()(**inputs(time, time)), atol=1e-6)
    with torch.no_grad():
        dcs.ratio_table(model)[0] = 5.0
    assert float(model.diffcr.ratios().max()) == pytest.approx(0.9), "what is put there by hand is bounded as ever"
    trained.sum().backward()
    assert dcs.ratio_table(model).grad is not None, "data parallelism waits for the gradient of every parameter"


@pytest.mark.parametrize("branches", ["two", "boundary"])
def test_bins_that_do_not_end_at_one_settle_too(branches: str) -> None:
    model = converted(branches=branches, bins=(0.0, 0.25, 0.5), max_ratio=0.5, target_ratio=0.5, initial_ratio=0.5)
    for router in model.diffcr.routers.values():
        nn.init.normal_(router.weight)
    model.diffcr.settled = True
    trained = model.train()(**inputs(100.0, 900.0))
    with torch.no_grad():
        assert torch.allclose(trained, model.eval()(**inputs(100.0, 900.0)), atol=1e-6)


def test_a_bin_above_the_bound_is_kept_wherever_the_table_goes(tmp_path: Path) -> None:
    """With a bound between two bins, inference runs at the one above it, and so does a table that has settled."""
    model = converted(max_ratio=0.85, target_ratio=0.8)
    optimizer = dcs.RatioOptimizer(model, total_steps=4, lr=1.0)
    for _ in range(4):
        give(model, torch.linspace(-1, 1, LAYERS * REGIONS).reshape(LAYERS, REGIONS))
        optimizer.step()
    executed = model.diffcr.executed_ratios()
    assert float(executed.max()) == pytest.approx(0.9)
    dcs.save_adapter(model, tmp_path)
    loaded = dcs.load_adapter_(Denoiser(), tmp_path, inputs(100.0, 900.0))
    other = converted(max_ratio=0.85, target_ratio=0.8)
    other.load_state_dict(model.state_dict())
    for each in (loaded, other):
        assert torch.equal(each.diffcr.executed_ratios(), executed) and torch.equal(dcs.ratio_table(each), dcs.ratio_table(model))
    with torch.no_grad():
        dcs.ratio_table(other)[0] = 0.87
    assert float(other.diffcr.ratios()[0].max()) == pytest.approx(0.85)


def test_a_table_that_is_learned_anew_is_not_settled(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=2, settle=0.5)
    for _ in range(2):
        give(model, torch.randn(LAYERS, REGIONS))
        optimizer.step()
    assert model.diffcr.settled and copy.deepcopy(model).diffcr.settled
    dcs.RatioOptimizer(model, total_steps=2)
    assert not model.diffcr.settled


def test_without_a_gradient_all_entries_rise_alike(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=10)
    for step in range(1, 11):  # the table moves for five steps, and ramps in half of them
        optimizer.zero_grad()
        optimizer.step()
        assert torch.allclose(dcs.ratio_table(model), torch.full((LAYERS, REGIONS), 0.3 * min(1.0, step / 2.5)), atol=CLOSE)


def test_steps_beyond_the_total_hold_the_target(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=2)
    for _ in range(6):
        give(model, torch.randn(LAYERS, REGIONS))
        optimizer.step()
    assert mean(model) == pytest.approx(0.3, abs=CLOSE)


def test_a_target_of_zero_stays_dense() -> None:
    model = converted(target_ratio=0.0)
    optimizer = dcs.RatioOptimizer(model, total_steps=3)
    for _ in range(3):
        give(model, torch.randn(LAYERS, REGIONS))
        optimizer.step()
    assert not dcs.ratio_table(model).any()


# --- the allocation --------------------------------------------------------------------------------------------------
def test_entries_that_hurt_less_get_more(model: nn.Module) -> None:
    """A gradient says by how much the loss would rise with the ratio."""
    gradient = torch.arange(LAYERS * REGIONS).reshape(LAYERS, REGIONS).float() / 10
    optimizer = dcs.RatioOptimizer(model, total_steps=20)
    for _ in range(20):
        give(model, gradient)
        optimizer.step()
    falling = dcs.ratio_table(model).detach().flatten()
    assert (falling.diff() <= 0).all() and float(falling[0] - falling[-1]) > 0.5


def test_what_all_gradients_share_decides_nothing(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    gradient = torch.randn(LAYERS, REGIONS)
    for one, added in ((model, 0.0), (twin, 7.0)):
        optimizer = dcs.RatioOptimizer(one, total_steps=5)
        for _ in range(5):
            give(one, gradient + added)
            optimizer.step()
    assert torch.allclose(dcs.ratio_table(model), dcs.ratio_table(twin), atol=1e-5)


def weights_of(count: int, averaging: float) -> Tensor:
    """What each of some gradients counts for in their moving average, its bias corrected."""
    weights = averaging ** torch.arange(count - 1, -1, -1).double()
    return weights / weights.sum()


@given(
    count=st.integers(1, 8),
    averaging=st.sampled_from([0.1, 0.5, 0.9, 0.98]),
    signal=st.sampled_from([0.0, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_steps_are_the_formula(original: nn.Module, count: int, averaging: float, signal: float, seed: int) -> None:
    """Averages written out as sums, and the variance of an average of noise as the sum of its squared weights."""
    model, source = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.3)
    noise = torch.randn(count, LAYERS, REGIONS, generator=source, dtype=torch.float64)
    gradients = signal * torch.randn(LAYERS, REGIONS, generator=source) + noise
    optimizer = dcs.RatioOptimizer(model, total_steps=count, lr=0.01, averaging=averaging, settle=0.0)
    wanted = torch.full((LAYERS, REGIONS), 0.3, dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        give(model, gradient.float())
        optimizer.step()
        weights = weights_of(step, averaging)
        scale = (weights @ gradients[:step].flatten(1).var(1)).sqrt()
        average = torch.einsum("s,slr->lr", weights, gradients[:step])
        direction = (average - average.mean()) / scale
        shrunk = max(0.0, 1.0 - float((LAYERS * REGIONS - 1) * weights.square().sum() / direction.square().sum()))
        wanted = wanted - 0.01 * (1.0 - (step - 1) / count) * shrunk * direction
    assert torch.allclose(dcs.ratio_table(model).detach().double(), wanted, atol=1e-5)


def test_a_first_gradient_which_nothing_confirms_moves_nothing(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=2, settle=0.0)
    gradient = torch.randn(LAYERS, REGIONS)
    for moved in (False, True):
        give(model, gradient)
        optimizer.step()
        assert (float(dcs.ratio_table(model).detach().std()) > 0.01) is moved


def test_a_table_of_many_regions_is_moved_less_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise alone, the averages of seldom seen regions are large, and yet nothing to follow."""
    moved: dict[bool, float] = {}
    for shrunk in (True, False):
        if not shrunk:
            monkeypatch.setattr(optimizer_module, "_above_noise", lambda *given: 1.0)
        moved[shrunk] = 0.0
        for seed in range(5):
            source, model = torch.Generator().manual_seed(seed), converted(timestep_regions=10)
            optimizer = dcs.RatioOptimizer(model, total_steps=300)
            for step in range(300):
                gradient = torch.zeros(LAYERS, 10)
                gradient[:, step % 10] = torch.randn(LAYERS, generator=source)
                give(model, gradient)
                optimizer.step()
            moved[shrunk] += float(dcs.ratio_table(model).detach().std()) / 5
    assert moved[True] < 0.7 * moved[False], moved


def test_noise_moves_less_than_what_stays_the_same(model: nn.Module) -> None:
    twin, source = copy.deepcopy(model), torch.Generator().manual_seed(0)
    constant = torch.randn(LAYERS, REGIONS, generator=source)
    for one in (model, twin):
        optimizer = dcs.RatioOptimizer(one, total_steps=50, lr=0.01)
        for _ in range(50):
            give(one, constant if one is model else torch.randn(LAYERS, REGIONS, generator=source))
            optimizer.step()
    assert float(dcs.ratio_table(model).detach().std()) > 3 * float(dcs.ratio_table(twin).detach().std())


def test_what_saves_more_for_the_same_harm_gets_more() -> None:
    """A budget in FLOPs, with one block three times as dear as the others: harm counts by what it saves."""
    model = converted(timestep_regions=1, timestep_range="auto", cost="flops")
    with torch.no_grad():
        costs = 1.0 - torch.arange(10) / 10
        model.diffcr.site_costs.copy_(torch.stack([0.6 * costs, 0.2 * costs, 0.2 * costs]))
    optimizer = dcs.RatioOptimizer(model, total_steps=10, settle=0.0)
    for _ in range(10):
        give(model, torch.full((LAYERS, 1), 0.5))
        optimizer.step()
    table = dcs.ratio_table(model).detach().flatten()
    assert float(table[0]) > float(table[1]) + 0.05
    assert model.diffcr.saving().item() == pytest.approx(0.3, abs=CLOSE)
    assert float(table @ torch.tensor([0.6, 0.2, 0.2])) == pytest.approx(0.3, abs=CLOSE)


def test_regions_no_batch_has_shown_rise_with_the_mean_alone(model: nn.Module) -> None:
    """What the gradients of the region seen share is no reason to move work to or from the others."""
    optimizer = dcs.RatioOptimizer(model, total_steps=4, ramp=1.0, lr=0.02, settle=0.0)
    for _ in range(2):
        gradient = torch.zeros(LAYERS, REGIONS)
        gradient[:, 1] = torch.tensor([0.4, 0.5, 0.6])
        give(model, gradient)
        optimizer.step()
    table = dcs.ratio_table(model).detach()
    assert torch.allclose(table[:, [0, 2, 3]], torch.full((LAYERS, REGIONS - 1), 0.15), atol=CLOSE)
    shrunk = 1.0 - float(weights_of(2, 0.98).square().sum())  # the first step moves none
    step = 0.02 * 0.75 * shrunk
    assert torch.allclose(table[:, 1], torch.tensor([0.15 + step, 0.15, 0.15 - step]), atol=1e-5)


def test_regions_seen_at_other_times_are_each_corrected_for_their_own_count(model: nn.Module) -> None:
    """A region seen once counts for as much as one seen ten times."""
    pull = torch.tensor([-1.0, 0.0, 1.0])
    optimizer = dcs.RatioOptimizer(model, total_steps=1000, ramp=0.001, lr=1.0, settle=0.0)
    for region in [*[0] * 10, 1]:
        gradient = torch.zeros(LAYERS, REGIONS)
        gradient[:, region] = pull
        give(model, gradient)
        optimizer.param_groups[0]["lr"] = 1e-3 if region == 1 else 0.0
        optimizer.step()
    table = dcs.ratio_table(model).detach()
    assert torch.allclose(table[:, 0], table[:, 1], atol=CLOSE)
    shrunk = 1.0 - (LAYERS - 1 / 2) * sum(float(weights_of(count, 0.98).square().sum()) for count in (10, 1)) / 4
    assert float(table[0, 1] - table[2, 1]) == pytest.approx(2e-3 * 0.99 * shrunk, abs=1e-5)


def test_a_frozen_table_is_refused(model: nn.Module) -> None:
    """As adding a LoRA adapter leaves it: without a gradient all ratios would rise alike, in silence."""
    optimizer = dcs.RatioOptimizer(model, total_steps=4)
    dcs.ratio_table(model).requires_grad_(False)
    for call in (optimizer.step, lambda: dcs.RatioOptimizer(model, total_steps=4)):
        with pytest.raises(ConversionError, match=r"table is frozen.*model\.diffcr\.requires_grad_\(True\)"):
            call()


def test_an_exchanged_table_is_refused(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=4)
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ConversionError, match="was exchanged, as fully_shard"):
        optimizer.step()


def test_a_state_that_was_loaded_elsewhere_is_brought_back(model: nn.Module) -> None:
    """torch puts a loaded state where the parameter is, on a GPU say; the arithmetic is done on the CPU."""
    optimizer = dcs.RatioOptimizer(model, total_steps=4)
    give(model, torch.randn(LAYERS, REGIONS))
    optimizer.step()
    state = optimizer.state[dcs.ratio_table(model)]
    state["average"], state["seen"] = state["average"].to(torch.bfloat16), state["seen"].double()
    give(model, torch.randn(LAYERS, REGIONS))
    optimizer.step()
    state = optimizer.state[dcs.ratio_table(model)]
    assert state["average"].dtype == state["seen"].dtype == torch.float32


def test_one_block_trades_between_regions() -> None:
    config = dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=REGIONS, timestep_range=(0, 1000), blocks=r"blocks\.1")
    model = dcs.convert_(Denoiser().train(), inputs(100.0, 900.0), config)
    optimizer = dcs.RatioOptimizer(model, total_steps=40)
    for step in range(40):
        gradient = torch.zeros(1, REGIONS)
        gradient[0, step % REGIONS] = 1.0 + step % REGIONS
        give(model, gradient)
        optimizer.step()
    table = dcs.ratio_table(model).detach()[0]
    assert (table.diff() <= 0).all() and float(table[0] - table[-1]) > 0.5


def test_batches_of_mixed_regions_lead_to_what_batches_of_one_region_do(original: nn.Module) -> None:
    """A region's gradient is smaller by its share of the batch, and that is no reason to compress it more."""
    found = []
    for batches in ([[100.0, 350.0, 350.0, 350.0]], [[100.0], [350.0]]):
        model = copy.deepcopy(original)
        with torch.no_grad():
            dcs.ratio_table(model).fill_(0.25)
        optimizer = dcs.RatioOptimizer(model, total_steps=1)
        for times in batches:
            given = inputs(*times)
            sample = given["x"][:1].expand(len(times), -1, -1).contiguous()  # a region's gradient is the same in both
            ((model(sample, given["t"]) - 1).square().mean() / len(batches)).backward()
        found.append(optimizer._gradient(dcs.ratio_table(model))[:, :2])
    assert found[0].all() and torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_it_trains_a_model_to_its_target(model: nn.Module) -> None:
    """With gradients of the real thing, from a table of exact zeros."""
    optimizer = dcs.RatioOptimizer(model, total_steps=8, settle=0.0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "ratio_table" not in name}
    for step in range(8):
        given = inputs(50.0 + 250.0 * (step % REGIONS), 60.0 + 250.0 * (step % REGIONS))
        (model(**given) - given["x"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    table = dcs.ratio_table(model).detach()
    assert mean(model) == pytest.approx(0.3, abs=CLOSE)
    assert float(model.diffcr.executed_ratios().mean()) == pytest.approx(0.3, abs=0.05 / table.numel() + CLOSE)
    assert len(set(table.flatten().tolist())) > 1
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters() if name in weights)


# --- a torch optimizer -----------------------------------------------------------------------------------------------
def test_the_table_is_the_only_parameter(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=4)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(dcs.ratio_table(model))]


def test_closure_is_run_with_gradients_and_its_loss_returned(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=4, settle=0.0)
    assert optimizer.step() is None

    def closure() -> float:
        optimizer.zero_grad()
        loss = (dcs.ratio_table(model) * torch.linspace(-1, 1, LAYERS)[:, None]).sum()
        loss.backward()
        return loss.item()

    assert isinstance(optimizer.step(closure), float)
    optimizer.step(closure)
    assert (dcs.ratio_table(model)[0] - dcs.ratio_table(model)[-1]).min().item() > 0.01


def test_a_scheduler_can_set_the_rate(model: nn.Module) -> None:
    optimizer = dcs.RatioOptimizer(model, total_steps=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    give(model, torch.randn(LAYERS, REGIONS))
    optimizer.step()
    scheduler.step()
    assert len(set(dcs.ratio_table(model).flatten().tolist())) == 1


def resumed(optimizer: dcs.RatioOptimizer, model: nn.Module, how: str) -> tuple[dcs.RatioOptimizer, nn.Module]:
    if how == "deepcopy":
        both = copy.deepcopy((optimizer, model))
        return both
    twin = copy.deepcopy(model)
    other = dcs.RatioOptimizer(twin, total_steps=99, lr=9.0, averaging=0.1, ramp=1.0)  # all of it is overwritten
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.diffcr.settled == model.diffcr.settled, "what is called before the first step"
    return other, twin


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
@pytest.mark.parametrize(("steps", "settle"), [(0, 0.0), (3, 0.0), (8, 0.0), (8, 0.4), (11, 0.4)])  # of 15, 9 until it settles
def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(model: nn.Module, steps: int, settle: float, how: str) -> None:
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.1)  # the ramp's start is remembered, not read off the table again
    optimizer = dcs.RatioOptimizer(model, total_steps=15, lr=0.3, averaging=0.9, settle=settle)
    gradients = torch.randn(steps + 5, LAYERS, REGIONS)
    for gradient in gradients[:steps]:
        give(model, gradient)
        optimizer.step()
    other, twin = resumed(optimizer, model, how)
    for gradient in gradients[steps:]:
        for one, target in ((optimizer, model), (other, twin)):
            give(target, gradient)
            one.step()
        assert torch.equal(dcs.ratio_table(model), dcs.ratio_table(twin)) and model.diffcr.settled == twin.diffcr.settled


# --- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {"total_steps": 0}, {"total_steps": -3}, {"total_steps": float("nan")}, {"lr": -0.1}, {"lr": float("nan")}, {"averaging": 1.0},
        {"averaging": 0.0}, {"averaging": float("nan")}, {"ramp": 0.0}, {"ramp": 1.5}, {"ramp": float("nan")}, {"settle": -0.1},
        {"settle": 1.0}, {"settle": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_named(model: nn.Module, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected total_steps >= 1") as caught:
        dcs.RatioOptimizer(model, **{"total_steps": 10} | settings)
    ((name, value),) = settings.items()
    assert f"{name}={value}" in str(caught.value)


def test_frozen_ratios_are_refused() -> None:
    with pytest.raises(ConfigError, match="learn_ratios=True"):
        dcs.RatioOptimizer(converted(initial_ratio=0.3, learn_ratios=False), total_steps=10)


def test_specialised_models_are_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="before specialize_"):
        dcs.RatioOptimizer(dcs.specialize_(model), total_steps=10)


def test_plain_models_are_refused() -> None:
    with pytest.raises(ConversionError, match="convert_"):
        dcs.RatioOptimizer(Denoiser(), total_steps=10)


def test_costs_are_averaged_at_the_first_step_after_an_empty_state_too(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate loads a state as soon as it wraps an optimizer."""
    averaged: list[Tensor] = []
    optimizer = dcs.RatioOptimizer(model, total_steps=4)
    optimizer.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr(optimizer_module, "several_processes", lambda: True)
    monkeypatch.setattr(optimizer_module, "mean_over_processes", lambda tensor: averaged.append(tensor) or tensor)
    for _ in range(2):
        give(model, torch.randn(LAYERS, REGIONS))
        optimizer.step()
    assert sum(each is model.diffcr.site_costs for each in averaged) == 1
