"""Timesteps of one region a batch, and parameter groups."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConfigError, ConversionError, TimestepError
from tests.small import Denoiser, converted, inputs

BATCH = 8


def discrete(count: int, generator: Generator) -> Tensor:
    return torch.randint(1000, (count,), generator=generator)


def logit_normal(count: int, generator: Generator) -> Tensor:
    """As flow matching draws its times: the middle often, the ends hardly ever."""
    return 1000 * torch.randn(count, generator=generator).sigmoid()


def cleanest(count: int, generator: Generator) -> Tensor:
    return 20 * torch.rand(count, generator=generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted()


@given(seed=st.integers(0, 10_000), count=st.integers(1, 40), draw=st.sampled_from([discrete, logit_normal, cleanest]))
def test_a_batch_lies_in_one_region(model: nn.Module, seed: int, count: int, draw: object) -> None:
    sampler = dcs.RegionSampler(model, draw, seed=seed)  # type: ignore[arg-type]
    timesteps = sampler(count)
    assert timesteps.shape == (count,) and timesteps.dtype == draw(1, Generator()).dtype  # type: ignore[operator]
    assert len(set(model.diffcr.plan.regions.of_call(model, {"t": timesteps}))) == 1


@pytest.mark.parametrize("draw", [discrete, logit_normal])
def test_every_timestep_is_as_likely_as_drawn_by_itself(model: nn.Module, draw: object) -> None:
    """Kolmogorov-Smirnov between the first entries of many batches, and the last ones, and plain draws."""
    sampler = dcs.RegionSampler(model, draw, seed=3)  # type: ignore[arg-type]
    batches = torch.stack([sampler(BATCH) for _ in range(2000)]).double()
    plain = draw(20_000, Generator().manual_seed(4)).double().sort().values  # type: ignore[operator]
    for column in (batches[:, 0], batches[:, -1]):
        ours = column.sort().values
        everywhere = torch.cat([ours, plain]).sort().values
        share = lambda sample: torch.searchsorted(sample, everywhere, right=True) / len(sample)  # noqa: B023, E731
        assert float((share(ours) - share(plain)).abs().max()) < 1.95 * (1 / 2000 + 1 / 20_000) ** 0.5  # 1 in 1000
    regions = Counter((batches[:, 0] // 250).tolist())
    wanted = (plain // 250).long().bincount() / len(plain)
    assert all(abs(regions[r] / 2000 - float(wanted[r])) < 0.05 for r in range(4))


def test_processes_share_regions_and_not_timesteps(model: nn.Module) -> None:
    samplers = [dcs.RegionSampler(model, discrete, seed=5, rank=rank) for rank in range(2)]
    for _ in range(20):
        one, other = (sampler(BATCH) for sampler in samplers)
        assert {int(t) // 250 for t in one} == {int(t) // 250 for t in other}
        assert not torch.equal(one, other)


def test_sampling_goes_on_from_a_state(model: nn.Module) -> None:
    sampler, other = dcs.RegionSampler(model, discrete, seed=6), dcs.RegionSampler(model, discrete, seed=99)
    sampler(BATCH)
    other.load_state_dict(sampler.state_dict())
    assert all(torch.equal(sampler(BATCH), other(BATCH)) for _ in range(5))


def test_with_one_region_all_draws_are_taken() -> None:
    model = converted(timestep_regions=1, timestep_range="auto")
    sampler = dcs.RegionSampler(model, discrete, seed=0)
    assert len({int(t) // 250 for t in sampler(200)}) == 4


def test_draws_that_cannot_be_right_are_named(model: nn.Module) -> None:
    with pytest.raises(TimestepError, match="outside the range"):
        dcs.RegionSampler(model, lambda n, g: 2000 + discrete(n, g))(BATCH)
    with pytest.raises(TimestepError, match=r"shape of \(8, 1\)|shape of \(1, 1\)"):
        dcs.RegionSampler(model, lambda n, g: discrete(n, g)[:, None])(BATCH)
    calls = iter(range(10_000))
    with pytest.raises(TimestepError, match="the same distribution each time"):
        dcs.RegionSampler(model, lambda n, g: torch.full((n,), 10 if next(calls) == 0 else 900))(BATCH)
    with pytest.raises(ConversionError, match="not converted"):
        dcs.RegionSampler(Denoiser(), discrete)


# --- parameter groups ------------------------------------------------------------------------------------------------
def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in group["params"]}  # type: ignore[attr-defined]


def test_every_trainable_parameter_is_in_one_group(model: nn.Module) -> None:
    groups = dcs.parameter_groups(model, lr=1e-4, router_lr=1e-3, ratio_lr=1e-2, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("weights", 1e-4, 0.1), ("routers", 1e-3, 0.0), ("ratios", 1e-2, 0.0),
    ]  # fmt: skip
    found = [names(model, group) for group in groups]
    assert set.union(*found) == {name for name, _ in model.named_parameters()}
    assert sum(map(len, found)) == len(set.union(*found))
    assert found[2] == {"diffcr.ratio_table"} and all(name.startswith("diffcr.routers.") for name in found[1])
    torch.optim.AdamW(groups)


def test_the_table_is_left_to_the_ratio_optimizer_and_routers_follow_the_weights(model: nn.Module) -> None:
    groups = dcs.parameter_groups(model, lr=1e-4)
    assert [(g["name"], g["lr"]) for g in groups] == [("weights", 1e-4), ("routers", 1e-4)]


def test_frozen_weights_are_left_out() -> None:
    model = converted()
    model.requires_grad_(False)
    with pytest.raises(ConversionError, match=r"routers are frozen.*model\.diffcr\.requires_grad_\(True\)"):
        dcs.parameter_groups(model, lr=1e-4)
    model.diffcr.requires_grad_(True)
    assert [g["name"] for g in dcs.parameter_groups(model, lr=1e-4)] == ["routers"]
    with pytest.raises(ConfigError, match="learn_ratios=True"):
        dcs.parameter_groups(converted(learn_ratios=False), lr=1e-4, ratio_lr=1e-2)


def test_wrapped_models_are_looked_into(model: nn.Module) -> None:
    wrapped = nn.ModuleDict({"module": model})
    assert dcs.ratio_table(wrapped) is dcs.ratio_table(model)
    assert torch.equal(dcs.ratio_loss(wrapped), dcs.ratio_loss(model))
    groups = dcs.parameter_groups(wrapped, lr=1e-4)
    assert names(model, groups[1]) == names(model, dcs.parameter_groups(model, lr=1e-4)[1])
    with pytest.raises(ConversionError, match="give restore_ the model itself"):
        dcs.restore_(wrapped)
    with pytest.raises(ConversionError, match="holds 2 converted models"):
        dcs.ratio_loss(nn.ModuleList([model, converted()]))


# --- the budget term -------------------------------------------------------------------------------------------------
def test_parts_of_the_loss_for_a_log(model: nn.Module) -> None:
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.14)
    loss, parts = dcs.ratio_loss(model, return_parts=True)
    assert torch.equal(loss, dcs.ratio_loss(model)) and loss.requires_grad
    assert parts == pytest.approx(
        {"ratio_loss": 0.3 * 0.16**2, "saving": 0.14, "target_saving": 0.3, "executed_saving": 0.14, "mean_ratio": 0.14}, abs=5e-3
    )
    assert all(isinstance(value, float) for value in parts.values())


def test_regions_weigh_as_often_as_inference_visits_them() -> None:
    model = converted(region_weights=(1, 1, 2, 0))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(torch.tensor([[0.1, 0.2, 0.4, 0.9]]).expand(3, -1))
    parts = dcs.ratio_loss(model, return_parts=True)[1]
    assert (parts["saving"], parts["mean_ratio"]) == (pytest.approx(0.275), pytest.approx(0.275))
    optimizer = dcs.RatioOptimizer(model, total_steps=1)
    optimizer.step()
    assert model.diffcr.saving().item() == pytest.approx(0.3, abs=1e-6)
    assert float(model.diffcr.budget.saving(model.diffcr.executed_ratios())) == pytest.approx(0.3, abs=0.02)


def test_a_mixed_call_after_a_region_sampler_needs_no_split(model: nn.Module) -> None:
    given = inputs(*dcs.RegionSampler(model, logit_normal)(3).tolist())
    assert len(set(model.diffcr.plan.regions.of_call(model, given))) == 1
    model(**given)
