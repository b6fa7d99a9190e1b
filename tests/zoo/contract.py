"""The contract that every model of the zoo, diffusers' or hand-written, is put through."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import NoRoutableBlockError, TimestepError
from diffcr_surgery.flops import flop_counter
from diffcr_surgery.tokens import kept_count
from tests.zoo.entry import Entry, sample, tensors


def same(one: Any, other: Any) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def loss(output: Any) -> torch.Tensor:
    return sum(t.float().square().mean() for t in tensors(output) if t.is_floating_point())


def converted(entry: Entry, ratio: float, **settings: Any) -> tuple[nn.Module, dict[str, Any], dcs.SurgeryPlan]:
    """A converted model whose routers tell tokens apart."""
    model, inputs = entry.build(), entry.inputs()
    plan = dcs.plan(model, inputs, dcs.DiffCRConfig(**settings))
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
            with flop_counter() as counter:
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


def gradients_reach_every_router_and_ratio(entry: Entry, idle: set[str] = frozenset(), branches: str = "two") -> None:  # type: ignore[assignment]
    """In training, between two bins that keep different numbers of tokens; `idle` sites have a router that can do nothing."""
    model, inputs, plan = converted(entry, 0.55, branches=branches)
    model.train()
    loss(model(**inputs)).backward()
    table = dcs.ratio_table(model)
    assert table.grad.isfinite().all()
    for row, site in enumerate(plan.routed_sites):
        # With one run for both bins a ratio learns from bypassing tokens' own updates, as a router does; with two, from their absence too.
        assert bool(table.grad[row].all()) == (branches == "two" or site.path not in idle), site.path
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


# Samples in the regions 3, 0 and 1 of 4. In training the first and the last lie between the same two bins, and run together.
PLACES, BINS, BETWEEN = (0.9, 0.1, 0.4), (0.6, 0.4, 0.0, 0.2), (0.64, 0.26, 0.0, 0.23)


def in_several_regions(entry: Entry, batch: int, planned: int) -> tuple[nn.Module, dict[str, Any], torch.Tensor]:
    """A model converted with four regions, a call whose samples lie in three of them, and their timesteps."""
    model, inputs = entry.build(), entry.inputs(batch)
    low, high = entry.timestep_range
    settings = {"timestep_argument": entry.timestep} if entry.timestep else {}
    dcs.convert_(model, entry.inputs(planned), dcs.DiffCRConfig(timestep_regions=4, timestep_range=(low, high), **settings))
    given = inputs.get(entry.timestep, torch.zeros(batch))
    times = (low + (high - low) * torch.tensor(PLACES * len(given))[: len(given)]).to(given)
    if entry.timestep:
        inputs[entry.timestep] = times.reshape(-1, *[1] * (given.ndim - 1)).expand_as(given).contiguous()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for router in model.diffcr.routers.values():
            nn.init.normal_(router.weight, std=0.5)
    set_ratios(model, BINS)
    return model, inputs, times


def set_ratios(model: nn.Module, regions: tuple[float, ...]) -> None:
    """Give every region a ratio of its own, and every site another one."""
    table = dcs.ratio_table(model)
    with torch.no_grad():
        for row in range(len(table)):
            table[row] = torch.tensor(regions) + (row % 3) / 10


def run(model: nn.Module, entry: Entry, inputs: dict[str, Any], times: torch.Tensor) -> Any:
    """Call the model; where its forward takes no timestep, tell it."""
    with contextlib.nullcontext() if entry.timestep else dcs.at_timestep(model, times):
        return model(**inputs)


def mixed_timesteps_equal_single_samples(entry: Entry, planned: int = 3) -> None:
    """Outputs at inference; outputs, and gradients of weights, routers and ratios, in training; planned with that many samples."""
    model, inputs, times = in_several_regions(entry, 3, planned)
    precision = 50 if entry.rounds else 1
    for training in (False,) if entry.flex else (False, True):
        model.diffcr.train(training)  # the model itself goes on evaluating: dropout draws other numbers for another batch
        set_ratios(model, BETWEEN if training else BINS)
        with torch.set_grad_enabled(training):
            together = run(model, entry, inputs, times)
            noise = [torch.randn_like(t) for t in tensors(sample(together, 0, 3))]
            losses = []
            for i in range(3):
                own = tensors(sample(together, i, 3))
                alone = tensors(run(model, entry, sample(inputs, i, 3, entry.shared), times[i : i + 1]))
                for one, other in zip(own, alone, strict=True):
                    torch.testing.assert_close(one, other, atol=precision * 2e-5 * max(1.0, float(other.detach().abs().max())), rtol=1e-5)
                losses.append([*map(weighted, (own, alone), (noise, noise))])
        if not training:
            continue
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        ours, theirs = (torch.autograd.grad(sum(column), weights.values(), allow_unused=True) for column in zip(*losses, strict=True))
        # What is zero but for rounding, such as the gradient of a key's bias, is measured by the others.
        floor = 1e-6 * max(float(g.abs().max()) for g in theirs if g is not None)
        for name, one, other in zip(weights, ours, theirs, strict=True):
            assert (one is None) == (other is None), name
            error = 0.0 if one is None else float((one - other).abs().max())
            assert error <= floor + precision * 2e-4 * (0.0 if other is None else float(other.abs().max())), (name, error)


def weighted(outputs: list[torch.Tensor], noise: list[torch.Tensor]) -> torch.Tensor:
    return sum((t * n).sum() for t, n in zip(outputs, noise, strict=True))


def mixed_timesteps_are_refused(entry: Entry, planned: int, text: str) -> None:
    with torch.no_grad(), pytest.raises((TimestepError, NoRoutableBlockError), match=text):
        model, inputs, times = in_several_regions(entry, 3, planned)
        run(model, entry, inputs, times)


def compiles_as_a_whole(entry: Entry) -> None:
    """Specialised, the model runs as one graph without a break, and gives what it gives without the compiler."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model, inputs = entry.build(), entry.inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        dcs.convert_(model, inputs, dcs.DiffCRConfig(initial_ratio=0.5))
        for router in model.diffcr.routers.values():
            router.weight.normal_()
        in_eval = tensors(model(**inputs))
        dcs.specialize_(model)
        expected = tensors(model(**inputs))
        assert all(map(torch.equal, in_eval, expected))
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):
            assert all(map(torch.equal, tensors(compiled(**inputs)), expected))
    assert len(graphs) == 1
