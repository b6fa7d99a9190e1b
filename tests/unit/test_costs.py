"""What sites cost: FLOPs as they are counted, seconds as they pass, and budgets in either that are met."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffcr_surgery as dcs
from diffcr_surgery import costs
from diffcr_surgery.errors import ConfigError
from diffcr_surgery.flops import count_flops, flop_counter
from tests.models import CASES, Size

SIZE = Size(8, 8, 7)
FLUX, DIT = CASES["flux"], CASES["dit"]


def flops(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """FLOPs of a call by module, and under the empty name those of the whole."""
    with torch.no_grad():
        model(**inputs)
        with flop_counter() as counter:
            model(**inputs)
    counts = {name.partition(".")[2]: sum(c.values()) for name, c in counter.get_flop_counts().items() if name != "Global"}
    return counts | {"": counter.get_total_flops()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_is_counted_where_torch_runs_it_as_one_kernel(masked: bool, gradients: bool) -> None:
    batch, heads, queries, keys, width = 2, 3, 5, 7, 4
    query, key = (torch.randn(batch, heads, tokens, width, requires_grad=gradients) for tokens in (queries, keys))
    mask = torch.ones(queries, keys, dtype=torch.bool) if masked else None
    counted = count_flops(lambda: nn.functional.scaled_dot_product_attention(query, key, key, mask))
    assert counted == 2 * (2 * batch * heads * queries * keys * width)


def test_what_blocks_cost_is_their_products_written_out() -> None:
    """Of timm's ViT: four products of all kept tokens with weights, two of them with each other; the router's own beside them."""
    tokens, width, blocks = 64, 16, 2
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=128, embed_dim=width, depth=blocks, num_heads=2, class_token=False, global_pool="avg"
    )
    given = {"x": torch.randn(1, 3, 128, 128)}
    plan = dcs.plan(model, given, dcs.DiffCRConfig(cost="flops", bins=(0.0, 0.25, 0.5), max_ratio=0.5))
    whole = count_flops(lambda: model(**given))
    for shares in plan.site_costs:
        for share, kept in zip(shares, (64, 48, 32), strict=True):
            block = 2 * kept * 12 * width**2 + 4 * kept**2 * width
            router = 2 * tokens * width if kept < tokens else 0
            assert share * whole == pytest.approx(block + router, rel=0.01)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_routed_blocks_and_their_routers(name: str) -> None:
    """Counted a second time, on the converted model with every site at one ratio."""
    case = CASES[name]
    model = case.build(0, size=SIZE if case.resizable else case.sizes[0]).requires_grad_(False)
    inputs = case.inputs(model, 1, 0, size=SIZE if case.resizable else case.sizes[0])
    plan = dcs.plan(model, inputs, dcs.DiffCRConfig(cost="flops"))
    dense = flops(model, inputs)
    dcs.convert_(model, plan)
    for column, ratio in enumerate(plan.config.reachable_bins):
        with torch.no_grad():
            dcs.ratio_table(model).fill_(ratio)
        counted = flops(model, inputs)
        for row, site in enumerate(plan.routed_sites):
            own = counted[site.path] + counted.get(f"diffcr.routers.{row}", 0)
            assert plan.site_costs[row][column] == pytest.approx(own / dense[""], rel=0.02), (site.path, ratio)
    assert all(row == tuple(sorted(row, reverse=True)) for row in plan.site_costs)
    assert 0.3 < sum(row[0] for row in plan.site_costs) < 1


@pytest.mark.parametrize("branches", ["two", "boundary"])
def test_a_share_of_the_dense_flops_is_reached(branches: str) -> None:
    """From a model whose blocks differ in cost, and much lies outside of them."""
    model = FLUX.build(0, size=SIZE)
    inputs = FLUX.inputs(model, 2, 0, size=SIZE)
    dense = flops(model.requires_grad_(False), inputs)[""]
    model.requires_grad_(True)
    config = dcs.DiffCRConfig(cost="flops", target_share=0.8, branches=branches)  # type: ignore[arg-type]
    plan = dcs.plan(model, inputs, config)
    assert "share 0.8 of the dense cost, counted in flops" in str(plan)
    assert len({row[0] for row in plan.site_costs}) > 1
    dcs.convert_(model, plan)
    model.train()
    optimizer = dcs.RatioOptimizer(model, total_steps=6, settle=0.0)
    for _ in range(6):
        model(**inputs)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _, parts = dcs.ratio_loss(model, return_parts=True)
    assert parts["saving"] == pytest.approx(parts["target_saving"], abs=1e-5)
    dcs.specialize_(model.requires_grad_(False))
    # Tokens are whole: on so few of them a bin is up to a token off.
    assert flops(model, inputs)[""] / dense == pytest.approx(0.8, abs=0.02)


def test_a_target_ratio_means_what_that_ratio_would_save_everywhere() -> None:
    model = FLUX.build(0, size=SIZE)
    inputs = FLUX.inputs(model, 1, 0, size=SIZE)
    dcs.convert_(model, inputs, dcs.DiffCRConfig(cost="flops", target_ratio=0.4, initial_ratio=0.4))
    assert dcs.ratio_loss(model).item() == pytest.approx(0.0, abs=1e-10)
    assert model.diffcr.target_saving != pytest.approx(0.4, abs=1e-3)  # attention saves more than its share, the text nothing


def test_shares_that_cannot_be_reached_are_named() -> None:
    model = DIT.build(0)
    inputs = DIT.inputs(model, 1, 0)
    with pytest.raises(ConfigError, match=r"target_share=0.01 of the dense model's flops cannot be reached: .* is left"):
        dcs.plan(model, inputs, dcs.DiffCRConfig(cost="flops", target_share=0.01))
    assert not hasattr(model, "diffcr")


def test_latency_is_measured_kept_in_the_adapter_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(24, 24, 7)  # enough tokens for a high ratio to save time on any machine
    model = DIT.build(0, size=size)
    inputs = DIT.inputs(model, 2, 0, size=size)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    dcs.convert_(model, inputs, dcs.DiffCRConfig(cost="latency", target_ratio=0.9))
    costs = model.diffcr.site_costs
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in weights.items())
    assert (costs > 0).all() and (costs.diff(dim=1) <= 0).all() and float(costs[:, 0].sum()) < 1.5
    assert torch.equal(costs, costs[:1].expand_as(costs))  # like blocks cost alike
    dcs.save_adapter(model, tmp_path)
    twin = DIT.build(0, size=size)

    def never() -> float:
        raise RuntimeError("a clock was read")

    monkeypatch.setattr("time.perf_counter", never)
    dcs.load_adapter_(twin, tmp_path, inputs)
    assert torch.equal(twin.diffcr.site_costs, costs) and twin.diffcr.config == model.diffcr.config


def test_costs_follow_the_table_to_half_precision_and_back() -> None:
    model = DIT.build(0)
    dcs.convert_(model, DIT.inputs(model, 1, 0), dcs.DiffCRConfig(cost="flops"))
    before = model.diffcr.site_costs.clone()
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        assert model.diffcr.site_costs.dtype == torch.float32
        assert torch.allclose(model.diffcr.site_costs, before, rtol=1e-6)


def test_costs_of_checkpointed_blocks_are_those_of_the_blocks() -> None:
    costs = []
    for checkpointed in (False, True):
        model = DIT.build(0, size=SIZE, label_dropout=False).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        costs.append(dcs.plan(model, DIT.inputs(model, 1, 0, size=SIZE), dcs.DiffCRConfig(cost="flops")).site_costs)
    assert costs[0] == costs[1]


def test_blocks_in_which_nothing_counts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As were those of torch's own encoder layer, before its fast path had a formula."""
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    monkeypatch.setattr(costs, "flop_counter", partial(FlopCounterMode, display=False))
    with torch.no_grad(), pytest.raises(ConfigError, match=r"""cost="flops" counts nothing in \['0', '1'\]"""):
        dcs.plan(model, (torch.randn(1, 20, 16),), dcs.DiffCRConfig(cost="flops"))


@pytest.mark.parametrize("first", [False, True])
def test_fast_paths_cost_what_the_slow_ones_do(first: bool, request: pytest.FixtureRequest) -> None:
    """Without gradients torch runs its own encoder layer, and its own attention, as one operation each."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=first).eval().requires_grad_(False)
    tokens, attention = torch.randn(3, 20, 16), layer.self_attn
    request.addfinalizer(partial(torch.backends.mha.set_fastpath_enabled, True))
    for call in (lambda: layer(tokens), lambda: attention(tokens, tokens, tokens, need_weights=False)):
        counted = []
        for fast in (True, False):
            torch.backends.mha.set_fastpath_enabled(fast)
            counted.append(count_flops(call))
        assert counted[0] == counted[1] > 0


def test_a_ratio_that_saves_no_time_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tokens as few as these a router costs more than it saves; a clock that says so every time stands in for the noise."""
    model = DIT.build(0)
    ticks = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    with pytest.raises(ConfigError, match="saves nothing, so there is nothing to aim at"):
        dcs.plan(model, DIT.inputs(model, 1, 0), dcs.DiffCRConfig(cost="latency", target_ratio=0.3))


def test_a_plan_of_a_loaded_adapter_holds_its_costs(tmp_path: Path) -> None:
    model = FLUX.build(0, size=SIZE)
    inputs = FLUX.inputs(model, 1, 0, size=SIZE)
    plan = dcs.plan(model, inputs, dcs.DiffCRConfig(cost="flops", target_share=0.8))
    dcs.save_adapter(dcs.convert_(model, plan), tmp_path)
    loaded = dcs.load_adapter_(FLUX.build(0, size=SIZE), tmp_path, inputs).diffcr.plan
    assert torch.allclose(torch.tensor(loaded.site_costs), torch.tensor(plan.site_costs), rtol=1e-6) and loaded.config == plan.config
