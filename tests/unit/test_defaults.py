"""What torch makes new tensors with unless told otherwise, `set_default_dtype` and `set_default_device`, decides nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import diffcr_surgery as dcs
from tests.unit.test_runtime import Denoiser, inputs

SETTINGS = dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000), initial_ratio=0.25, cost="flops")


@pytest.fixture
def half() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def story() -> list[Tensor]:
    """Convert, train a step with all regions in a batch, specialise; on tensors that name their device."""
    given = {name: tensor.clone() for name, tensor in GIVEN.items()}
    model = MODEL()
    dcs.convert_(model, given, SETTINGS).train()
    optimizer = dcs.RatioOptimizer(model, total_steps=2)
    results = [model(**given)]
    (results[0].square().mean() + dcs.ratio_loss(model)).backward()
    optimizer.step()
    results.append(dcs.ratio_table(model).detach().clone())
    with torch.no_grad():
        results.append(model.eval()(**given))
        dcs.specialize_(model, budget=0.8, example_inputs=given)
        results.append(model(**given))
    return results


GIVEN = inputs()


def MODEL() -> Denoiser:
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser()


def test_default_device() -> None:
    """The meta device stands in for another: what is made there by mistake holds nothing, and mixes with nothing."""
    wanted = story()
    with torch.device("meta"):
        found = story()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_default_dtype(half: None) -> None:
    """Ratios stay in single precision."""
    model = MODEL()
    dcs.convert_(model, {name: tensor.bfloat16() for name, tensor in GIVEN.items()}, SETTINGS).train()
    table = dcs.ratio_table(model)
    assert table.dtype == model.diffcr.site_costs.dtype == torch.float32
    optimizer = dcs.RatioOptimizer(model, total_steps=2)
    model(**{name: tensor.bfloat16() for name, tensor in GIVEN.items()}).float().square().mean().backward()
    optimizer.step()
    assert table.dtype == torch.float32 and bool(table.isfinite().all())
