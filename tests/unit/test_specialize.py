"""Specialised models: what is left in their graphs, the budget dial, and what they say of it."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import diffcr_surgery as dcs
from diffcr_surgery import costs
from diffcr_surgery.errors import AlignmentError, ConfigError
from diffcr_surgery.flops import count_flops
from diffcr_surgery.rewrite import ops
from diffcr_surgery.runtime.execute import _check_routers, _routed
from diffcr_surgery.tokens import gather_tokens, scatter_tokens, scatter_tokens_, top_tokens
from tests.models import CASES, Case, output
from tests.zoo import denoisers, hand_written  # noqa: F401 - fill the zoo
from tests.zoo.entry import OTHERS, ZOO

DIT, SD3 = CASES["dit"], CASES["sd3"]


def converted(case: Case = DIT, ratios: tuple[float, ...] = (0.0, 0.5, 0.3), **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random routers, its sites at the given ratios in its only region, in eval."""
    model = case.build(0)
    inputs = case.inputs(model, 2, seed=1)
    dcs.convert_(model, inputs, dcs.DiffCRConfig(**settings))
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.normal_()
        dcs.ratio_table(model).copy_(torch.tensor(ratios)[:, None])
    return model.eval(), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**inputs))


def graph_of(model: nn.Module, inputs: dict[str, Any]) -> fx.Graph:
    """The graph that answers a call."""
    run(model, inputs)
    return model.diffcr.graphs()[-1]


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


# --- what is left in the graph ---------------------------------------------------------------------------------------
def test_a_site_at_zero_is_a_plain_call_of_its_block() -> None:
    model, inputs = converted(ratios=(0.0, 0.0, 0.0))
    expected = run(DIT.build(0), inputs)
    dcs.specialize_(model)
    assert torch.equal(run(model, inputs), expected)
    found = targets(graph_of(model, inputs))
    assert not {gather_tokens, scatter_tokens, scatter_tokens_, top_tokens, ops.gate_update} & set(found)
    assert not any("diffcr" in str(target) for target in found) and not model.diffcr.routers


def test_routed_sites_read_like_the_method_and_scatter_in_place() -> None:
    model, inputs = converted(ratios=(0.5, 0.5, 0.3))
    graph = graph_of(dcs.specialize_(model), inputs)
    names = [str(node) for node in graph.nodes if node.name.endswith(("_0", "_1", "_2"))]
    for row in range(3):
        steps = [f"scores_{row}", f"kept_{row}", f"tokens_{row}", f"transformer_blocks_{row}", f"gated_{row}", f"stream_{row}"]
        assert [name for name in names if name in steps] == steps
    scatters = [target for target in targets(graph) if target in (scatter_tokens, scatter_tokens_)]
    assert scatters == [scatter_tokens, scatter_tokens_, scatter_tokens_]  # the first stream is the embedding's, the others are ours
    assert ops.check_scores not in targets(graph)


@pytest.mark.parametrize("when", ["eval", "specialised"])
def test_a_site_at_one_is_gone(when: str) -> None:
    model, inputs = converted(ratios=(0.0, 0.9, 0.0), bins=(0.0, 0.5, 1.0))
    if when == "specialised":
        dcs.specialize_(model)
    assert model.diffcr.executed_ratios().flatten().tolist() == [0.0, 1.0, 0.0]
    run(model, inputs)
    calls: list[int] = []
    model.transformer_blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    actual = run(model, inputs)
    other = DIT.build(0)
    del other.transformer_blocks[1]
    assert not calls and torch.equal(actual, run(other, inputs))


def test_a_block_whose_other_output_is_needed_stays_at_one() -> None:
    """SD3's blocks return text too, and the next block reads it: one token goes through."""
    model, inputs = converted(SD3, ratios=(0.0, 0.9, 0.0), bins=(0.0, 0.5, 1.0))
    expected = run(model, inputs)
    dcs.specialize_(model)
    run(model, inputs)
    lengths: list[int] = []
    model.transformer_blocks[1].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    assert torch.equal(run(model, inputs), expected)
    assert set(lengths) == {1}


def test_specialising_records_nothing_anew() -> None:
    model, inputs = converted()
    run(model, inputs)
    dcs.specialize_(model)
    run(model, inputs)
    assert len(model.diffcr.recordings) == 1


@pytest.mark.parametrize("name", ["timm_dit", "hunyuan"])
def test_scatter_in_place_spares_what_others_read(name: str) -> None:
    """HunyuanDiT's long skips read the stream again: those sites keep their copy."""
    case = CASES[name]
    model = case.build(0)
    given = case.inputs(model, 2, seed=1)
    dcs.convert_(model, given, dcs.DiffCRConfig(initial_ratio=0.5))
    for router in model.diffcr.routers.values():
        nn.init.normal_(router.weight)
    kept = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        expected = output(model(**given))
        dcs.specialize_(model)
        assert torch.equal(output(model(**given)), expected)
    assert all(torch.equal(given[key], value) for key, value in kept.items())


# --- shared routing --------------------------------------------------------------------------------------------------
def test_sites_that_share_routing_gather_and_scatter_once() -> None:
    model, inputs = converted(ratios=(0.5, 0.5, 0.5), share_routing=3)
    expected = run(model, inputs)
    assert [site.router for site in model.diffcr.plan.routed_sites] == [0, 0, 0] and list(model.diffcr.routers) == ["0"]
    dcs.specialize_(model)
    assert torch.equal(run(model, inputs), expected)
    found = targets(graph_of(model, inputs))
    assert [found.count(target) for target in (top_tokens, gather_tokens, scatter_tokens, scatter_tokens_)] == [1, 1, 1, 0]


def test_a_shared_router_lives_as_long_as_one_of_its_sites_decides() -> None:
    model, inputs = converted(ratios=(0.0, 0.5, 0.0), share_routing=2)
    expected = run(model, inputs)
    assert list(model.diffcr.routers) == ["0", "2"]
    assert list(dcs.specialize_(model).diffcr.routers) == ["0"]
    assert torch.equal(run(model, inputs), expected)


def test_a_plan_shows_who_shares() -> None:
    model = DIT.build(0)
    plan = dcs.plan(model, DIT.inputs(model, 2, seed=1), dcs.DiffCRConfig(share_routing=2))
    rows = [line.split("transformer_blocks")[0].strip() for line in str(plan).splitlines()[2:]]
    assert rows == ["0", "1 (as 0)", "2"]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "AddcmulDiT"])
def test_only_a_stream_handed_on_as_it_is_shares(name: str) -> None:
    """FLUX's single blocks take up the double blocks' stream; where the residual stands outside, each reads a norm(x)."""
    entry = {**ZOO, **OTHERS}[name]
    plan = dcs.plan(entry.build(), entry.inputs(), dcs.DiffCRConfig(share_routing=99))
    names = {node.name for node in plan.graph.nodes}
    routers = [site.router for site in plan.routed_sites]
    assert routers == {"FluxTransformer2DModel": [0, 0, 0, 0], "AddcmulDiT": [0, 1, 2, 3]}[name]
    assert [f"scores_{row}" in names for row in range(len(routers))] == [row == router for row, router in enumerate(routers)]


def test_gradient_checkpointing_hands_the_scores_on() -> None:
    model, inputs = converted(CASES["pixart"], ratios=(0.25, 0.25, 0.35), share_routing=3, branches="boundary")
    gradients = []
    for checkpointing in (False, True):
        model.train()
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        torch.manual_seed(0)
        output(model(**inputs)).square().sum().backward()
        gradients.append((dcs.ratio_table(model).grad.clone(), model.diffcr.routers["0"].weight.grad.clone()))
    assert all(bool(one.any()) for one in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# --- the budget dial -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cost", ["tokens", "flops"])
def test_budgets_are_met_and_monotone(cost: str) -> None:
    earlier, shares = None, []
    for budget in (1.0, 0.9, 0.8, 0.7, 0.6):
        model, inputs = converted(ratios=(0.1, 0.7, 0.4), cost=cost)
        dcs.specialize_(model, budget=budget)
        achieved, table = model.diffcr.achieved, dcs.ratio_table(model)
        assert achieved.requested == budget and abs(achieved.share - budget) <= 0.1 / 3 / 2 + 1e-6
        assert earlier is None or bool((table >= earlier).all())
        earlier = table.detach().clone()
        shares.append(achieved.share)
        assert run(model, inputs).isfinite().all()
    assert shares == sorted(shares, reverse=True) and shares[0] == pytest.approx(1.0)


def test_a_budget_of_flops_is_the_share_that_is_counted() -> None:
    def flops(model: nn.Module) -> int:
        run(model, inputs)
        return count_flops(lambda: run(model, inputs))

    model, inputs = converted(CASES["pixart"], ratios=(0.1, 0.7, 0.4))
    dense = flops(CASES["pixart"].build(0))
    dcs.specialize_(model, budget=0.75, cost="flops", example_inputs=inputs)
    assert flops(model) / dense == pytest.approx(model.diffcr.achieved.share, abs=1e-3)


def test_latency_can_be_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 1 leaves every token, whatever the machine; that it was measured is told by the clock."""
    model, inputs = converted(ratios=(0.1, 0.7, 0.4))
    read: list[float] = []
    clock = costs._clock
    monkeypatch.setattr(costs, "_clock", lambda device: read.append(clock(device)) or read[-1])
    dcs.specialize_(model, budget=1.0, cost="latency", example_inputs=inputs)
    assert read
    assert model.diffcr.achieved.cost == "latency" and dcs.ratio_table(model).eq(0).all()


def test_what_was_requested_and_achieved_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = converted(ratios=(0.1, 0.7, 0.4))
    with caplog.at_level(logging.INFO, logger="diffcr_surgery"):
        dcs.specialize_(model)
    said = "0.600 of the routed blocks' tokens; mean ratio 0.400"
    assert str(model.diffcr.achieved) == said and said in repr(model.diffcr)
    assert caplog.messages == [f"DiTTransformer2DModel specialised: {said}"]


def test_a_cost_that_was_not_planned_needs_inputs() -> None:
    model, inputs = converted()
    with pytest.raises(ConfigError, match=r"cost='flops': the model was planned with cost='tokens', so .* give example_inputs"):
        dcs.specialize_(model, budget=0.8, cost="flops")
    with pytest.raises(ConfigError, match=r"budget=0\.01: expected a share of the dense tokens in \[0\.1, 1\]"):
        dcs.specialize_(model, budget=0.01)
    assert not model.diffcr.specialized and run(model, inputs).isfinite().all()


def test_sharing_needs_the_same_tokens_in_every_call() -> None:
    model, inputs = converted(share_routing=2)
    sites = model.diffcr.plan.routed_sites
    assert sites[0].tokens == sites[1].tokens
    run(model, inputs)
    (recording,) = model.diffcr.recordings
    calls = list(_routed(recording, model.diffcr).calls.values())
    with pytest.raises(AlignmentError, match=r"transformer_blocks\.1 was planned to share the routing of transformer_blocks\.0, but"):
        _check_routers([calls[0], replace(calls[1], tokens=7)])
