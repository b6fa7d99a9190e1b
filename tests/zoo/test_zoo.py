"""Every transformer denoiser of the installed diffusers through the whole contract, at a tiny size and with weights that hide nothing.

The table below says what a plan has to find: block class, how many of them are routed, tokens that may bypass, and tokens in the same
stream that never do (text, registers, conditions). A class that diffusers adds fails `test_every_class_is_in_the_zoo` until it is here.
"""

import contextlib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.models.transformers
import pytest
import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffcr_surgery as dcs
from diffcr_surgery.errors import NoRoutableBlockError
from diffcr_surgery.tokens import kept_count
from tests.zoo import denoisers  # noqa: F401 - fills the zoo
from tests.zoo.entry import ZOO, Entry, tensors
from tests.zoo.table import DENSE, NO_DENOISERS, SITES

every_class = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
routed_classes = pytest.mark.parametrize("entry", [ZOO[name] for name in SITES], ids=SITES)
without_flex = pytest.mark.parametrize("entry", [ZOO[name] for name in SITES if not ZOO[name].flex], ids=lambda e: e.name)


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Warnings are errors here too, but for those a class gives by itself, and gradients are off where it has none."""
    entry: Entry | None = request.node.callspec.params.get("entry") if hasattr(request.node, "callspec") else None
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", ".* is deprecated and will be removed in version", FutureWarning)  # diffusers, of its own imports
        for message in entry.warns if entry else ():
            warnings.filterwarnings("ignore", re.escape(message))
        if entry and entry.flex:
            stack.enter_context(torch.no_grad())
        yield


def same(one: Any, other: Any) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def loss(output: Any) -> torch.Tensor:
    return sum(t.float().square().mean() for t in tensors(output) if t.is_floating_point())


def converted(entry: Entry, ratio: float) -> tuple[nn.Module, dict[str, Any], dcs.SurgeryPlan]:
    """A converted model whose routers tell tokens apart."""
    model, inputs = entry.build(), entry.inputs()
    plan = dcs.plan(model, inputs)
    dcs.convert_(model, plan)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for router in model.diffcr.routers.values():
            nn.init.normal_(router.weight, std=0.5)
        dcs.ratio_table(model).fill_(ratio)
    return model, inputs, plan


def test_every_class_is_in_the_zoo() -> None:
    package = diffusers.models.transformers
    modules = [importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    classes = {
        name
        for module in modules
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.__name__
    }
    assert classes - ZOO.keys() - NO_DENOISERS.keys() == set(), "not in the zoo yet"
    assert SITES.keys() | DENSE.keys() == ZOO.keys()


@every_class
def test_trace_is_bit_exact_on_recorded_and_fresh_inputs(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    with torch.no_grad():
        recorded = dcs.trace(model, inputs)
        assert same(recorded.run(**inputs), model(**inputs))
        for batch in entry.batches:
            for rows in entry.rows:
                fresh = entry.inputs(batch, rows, seed=3)
                assert same(recorded.run(**fresh), model(**fresh)), (batch, rows)


def found_sites(plan: dcs.SurgeryPlan) -> str:
    """One phrase for each run of like sites: `2 FluxTransformerBlock 20+0`."""
    phrases: dict[tuple[str, str], int] = {}
    for site in plan.sites:
        size = f"{site.tokens}+{site.staying}" if site.routed else "dense"
        phrases[site.block_class, size] = phrases.get((site.block_class, size), 0) + 1
    return ", ".join(f"{count} {name} {size}" for (name, size), count in phrases.items())


@routed_classes
def test_plan_finds_the_sites(entry: Entry) -> None:
    plan = dcs.plan(entry.build(), entry.inputs())
    assert found_sites(plan) == SITES[entry.name]
    assert all("proven, error" in site.reason for site in plan.routed_sites)


@pytest.mark.parametrize("entry", [ZOO[name] for name in DENSE], ids=DENSE)
def test_what_cannot_be_routed_says_why(entry: Entry) -> None:
    model = entry.build()
    keys = list(model.state_dict())
    with pytest.raises(NoRoutableBlockError, match=DENSE[entry.name]):
        dcs.convert_(model, entry.inputs())
    assert list(model.state_dict()) == keys


@routed_classes
def test_at_ratio_zero_nothing_changes(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    weights = [p for p in model.parameters() if p.requires_grad]
    differentiate: Callable[[Any], Any] = lambda y: torch.autograd.grad(loss(y), weights, allow_unused=True) if not entry.flex else ()  # noqa: E731
    wanted = model(**inputs)
    gradients = differentiate(wanted)
    dcs.convert_(model, inputs)
    got = model(**inputs)
    assert same(got, wanted) and type(got) is type(wanted)
    for own, original in zip(differentiate(got), gradients, strict=True):
        assert own is original or torch.equal(own, original)


@routed_classes
def test_routed_it_moves_and_repeats(entry: Entry) -> None:
    model, inputs, _ = converted(entry, 0.0)
    with torch.no_grad():
        dense = model(**inputs)
        dcs.ratio_table(model).fill_(0.5)
        routed, again = model(**inputs), model(**inputs)
    assert all(t.isfinite().all() for t in tensors(routed))
    assert same(routed, again) and not same(routed, dense)


@without_flex
def test_a_block_costs_what_its_kept_tokens_cost(entry: Entry) -> None:
    """FLOPs are a polynomial of second degree in the kept tokens: three ratios tell those of a fourth.

    (Not 0: sites whose arguments are shared by a batch run sample by sample, and may repeat work on what is shared.)
    """
    model, inputs, plan = converted(entry, 0.0)
    model.requires_grad_(False)  # the counter's hooks cannot take frozen activations of trainable weights
    flops: dict[float, dict[str, int]] = {}
    for ratio in (0.0, 0.2, 0.4, 0.6, 0.8):
        with torch.no_grad():
            dcs.ratio_table(model).fill_(ratio)
            model(**inputs)
            with FlopCounterMode(display=False) as counter:
                model(**inputs)
        counts = counter.get_flop_counts()
        flops[ratio] = {s.path: sum(counts[f"{type(model).__name__}.{s.path}"].values()) for s in plan.routed_sites}
    for site in plan.routed_sites:
        kept = {ratio: kept_count(ratio, site.tokens + site.staying, site.staying) for ratio in flops}
        points = [(kept[ratio], flops[ratio][site.path]) for ratio in (0.2, 0.4, 0.6)]
        assert flops[0.8][site.path] == pytest.approx(_parabola(points, kept[0.8]), rel=0.05), site.path
        costs = [flops[ratio][site.path] for ratio in flops]
        assert costs == sorted(set(costs), reverse=True), site.path


def _parabola(points: list[tuple[int, int]], at: int) -> float:
    """Value at `at` of the polynomial of second degree through three points."""
    (a, fa), (b, fb), (c, fc) = points
    basis = lambda x, p, q: (at - p) * (at - q) / ((x - p) * (x - q))  # noqa: E731
    return fa * basis(a, b, c) + fb * basis(b, a, c) + fc * basis(c, a, b)


@without_flex
def test_gradients_reach_every_router_and_ratio(entry: Entry) -> None:
    model, inputs, plan = converted(entry, 0.55)
    model.train()
    loss(model(**inputs)).backward()
    table = dcs.ratio_table(model)
    assert table.grad.isfinite().all()
    for row, site in enumerate(plan.routed_sites):
        assert table.grad[row].all(), site.path
        assert model.diffcr.routers[str(row)].weight.grad.any(), site.path


@routed_classes
def test_other_batches_and_resolutions_run_and_restore_gives_the_model_back(entry: Entry) -> None:
    model, _, _ = converted(entry, 0.5)
    twin = entry.build()
    with torch.no_grad():
        for batch in entry.batches:
            for rows in entry.rows:
                assert all(t.isfinite().all() for t in tensors(model(**entry.inputs(batch, rows, seed=3))))
        dcs.restore_(model)
        assert type(model) is type(twin) and list(model.state_dict()) == list(twin.state_dict())
        fresh = entry.inputs(seed=4)
        assert same(model(**fresh), twin(**fresh))


def test_rows_shared_by_a_batch_that_no_sample_owns_are_named() -> None:
    """QwenImage 2.1 keeps batch + 1 rows of modulation and one rotary table for all: no sample of a larger batch can run alone."""
    entry = ZOO["QwenImage21Transformer2DModel"]
    with pytest.raises(NoRoutableBlockError, match=r"transformer_blocks\.0 .*no set: permuting them changes the output by"):
        dcs.plan(entry.build(), entry.inputs(batch=2))
