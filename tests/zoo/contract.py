"""The contract that every model of the zoo, diffusers' or hand-written, is put through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffcr_surgery as dcs
from diffcr_surgery.tokens import kept_count
from tests.zoo.entry import Entry, tensors


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


def trace_is_exact(entry: Entry) -> None:
    """On the recorded and on fresh inputs, at every batch size and resolution."""
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


def at_ratio_zero_nothing_changes(entry: Entry) -> None:
    """Outputs and the gradients of the original weights."""
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


def routed_it_moves_and_repeats(entry: Entry) -> None:
    """At one half, with routers that tell tokens apart."""
    model, inputs, _ = converted(entry, 0.0)
    with torch.no_grad():
        dense = model(**inputs)
        dcs.ratio_table(model).fill_(0.5)
        routed, again = model(**inputs), model(**inputs)
    assert all(t.isfinite().all() for t in tensors(routed))
    assert same(routed, again) and not same(routed, dense)


def a_block_costs_what_its_kept_tokens_cost(entry: Entry) -> None:
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


def gradients_reach_every_router_and_ratio(entry: Entry, idle: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """In training, between two bins that keep different numbers of tokens; `idle` sites have a router that can do nothing."""
    model, inputs, plan = converted(entry, 0.55)
    model.train()
    loss(model(**inputs)).backward()
    table = dcs.ratio_table(model)
    assert table.grad.isfinite().all()
    for row, site in enumerate(plan.routed_sites):
        assert table.grad[row].all(), site.path
        assert bool(model.diffcr.routers[str(row)].weight.grad.any()) == (site.path not in idle), site.path


def others_run_and_restore_gives_the_model_back(entry: Entry) -> None:
    """Other batch sizes and resolutions than the planned ones, then the original, bit for bit."""
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
