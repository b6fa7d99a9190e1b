"""Functions of a routed graph: gates exact at factor 1, blends exact at their ends, gradients that never stop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffcr_surgery._tree import flatten
from diffcr_surgery.rewrite.ops import (
    blend,
    blend_weight,
    boundary_factor,
    checkpointed,
    gate_factor,
    gate_update,
    named_item,
    take_factors,
    with_zero_gradients,
    without_random_trace,
)
from diffcr_surgery.trace.key import device_of

GATES = ("doubled_sigmoid", "straight_through", "sigmoid")
FACTOR = {"doubled_sigmoid": lambda s: 2 * s, "straight_through": torch.ones_like, "sigmoid": lambda s: s}
SLOPE = {"doubled_sigmoid": 2.0, "straight_through": 1.0, "sigmoid": 1.0}
LAYOUTS = {
    "b n c": (3, 5, 4),
    "n b c": (5, 3, 4),
    "b c n": (3, 4, 5),
    "b h n c": (3, 2, 5, 4),
    "n c": (5, 4),
    "1 n c": (1, 5, 4),
    "b n": (3, 5),
}


def drawn(pattern: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, processed tokens and scores `b k` in (0, 1)."""
    shape = LAYOUTS[pattern]
    return torch.randn(shape), torch.randn(shape), torch.rand(3 if "b" in pattern else 1, 5)


def test_scores_of_the_kept_tokens() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], requires_grad=True)
    taken = take_factors(scores, torch.tensor([[2, 0], [1, 2]]))
    assert torch.equal(taken, torch.tensor([[0.3, 0.1], [0.5, 0.6]]))
    taken.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[1, 0, 1], [0, 1, 1]]


# --- gate ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("gate", "score"), [("doubled_sigmoid", 0.5), ("sigmoid", 1.0), *(("straight_through", s) for s in (0.0, 0.3, 1.0))]
)
def test_gate_of_one_is_exact(gate: str, score: float, dtype: torch.dtype) -> None:
    """x + (y - x) is not y in floating point; the gate has to be."""
    tokens, processed = (torch.randn(2, 500, 4) * torch.logspace(-6, 4, 4)).to(dtype), torch.randn(2, 500, 4).to(dtype)
    if dtype != torch.float64:
        assert not torch.equal(tokens + (processed - tokens), processed)
    assert torch.equal(gate_update(tokens, processed, gate_factor(torch.full((2, 500), score), gate), "b n c"), processed)


@pytest.mark.parametrize("gate", GATES)
def test_no_gate_scales_tokens_that_stay(gate: str) -> None:
    tokens, processed, scores = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.rand(2, 5)
    staying = torch.tensor([[True, False, False, True, False]])
    got = gate_update(tokens, processed, gate_factor(scores, gate, staying), "b n c")
    free = gate_update(tokens, processed, gate_factor(scores, gate), "b n c")
    assert torch.equal(got[:, [0, 3]], processed[:, [0, 3]]) and torch.equal(got[:, [1, 2, 4]], free[:, [1, 2, 4]])


def test_items_are_taken_by_name_from_dataclasses_and_dicts() -> None:
    @dataclass
    class Output:
        sample: int

    assert (named_item(Output(3), "sample"), named_item({"sample": 4}, "sample")) == (3, 4)


@pytest.mark.parametrize("pattern", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_gate_scales_each_tokens_update_by_its_own_score(gate: str, pattern: str) -> None:
    tokens, processed, scores = drawn(pattern)
    words = pattern.split()
    got = gate_update(tokens, processed, gate_factor(scores, gate), pattern)
    for sample in range(len(scores)):
        for token in range(5):
            at = tuple(sample if w == "b" else token if w == "n" else slice(None) for w in words)
            factor = FACTOR[gate](scores[sample, token])  # type: ignore[no-untyped-call]
            assert torch.allclose(got[at], tokens[at] + factor * (processed[at] - tokens[at]), atol=1e-6)


def test_gate_of_a_square_batch_is_not_turned() -> None:
    """As many samples as tokens: only the pattern tells the axes apart."""
    tokens, processed, scores = torch.randn(3, 3, 2), torch.randn(3, 3, 2), torch.rand(3, 3)
    turned = gate_update(tokens.transpose(0, 1), processed.transpose(0, 1), scores, "n b c")
    assert torch.equal(turned.transpose(0, 1), gate_update(tokens, processed, scores, "b n c"))


@pytest.mark.parametrize("gate", GATES)
def test_gate_passes_gradients_to_scores_tokens_and_update(gate: str) -> None:
    tokens, processed, scores = (t.double().requires_grad_() for t in drawn("b n c"))
    weight = torch.randn(3, 5, 4, dtype=torch.float64)
    (gate_update(tokens, processed, gate_factor(scores, gate), "b n c") * weight).sum().backward()
    factor = FACTOR[gate](scores.detach())[..., None]  # type: ignore[no-untyped-call]
    assert scores.grad is not None and tokens.grad is not None and processed.grad is not None
    assert torch.allclose(scores.grad, SLOPE[gate] * (weight * (processed - tokens).detach()).sum(-1))
    assert torch.allclose(processed.grad, factor * weight)
    assert torch.allclose(tokens.grad, (1 - factor) * weight)


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_gate_answers_in_the_blocks_precision(stream: torch.dtype) -> None:
    """Under autocast the block's is lower than the stream's."""
    tokens, processed = torch.randn(1, 5, 4).to(stream), torch.randn(1, 5, 4).bfloat16()
    scores = torch.rand(1, 5, requires_grad=True)  # routers score in single precision
    got = gate_update(tokens, processed, 2 * scores, "b n c")
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert scores.grad is not None and scores.grad.dtype == torch.float32 and bool(scores.grad.any())


# --- blend -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(1), torch.ones(3), torch.ones(1)], ids=str)
def test_blend_is_exact_at_its_ends(weight: Tensor, dtype: torch.dtype) -> None:
    lower, upper = (torch.randn(3, 50, 4) * 1e4).to(dtype), torch.randn(3, 50, 4).to(dtype)
    assert torch.equal(blend(lower, upper, weight, 0), upper if weight[0] else lower)


@pytest.mark.parametrize(("batch", "shape"), [(0, (3, 5, 4)), (1, (5, 3, 4)), (0, (3,)), (None, (5, 4))], ids=str)
def test_blend_is_linear_in_each_samples_weight(batch: int | None, shape: tuple[int, ...]) -> None:
    lower, upper = torch.randn(shape), torch.randn(shape)
    weight = torch.tensor([0.0, 0.25, 1.0]) if batch is not None else torch.tensor([0.25])
    got = blend(lower, upper, weight, batch)
    if batch is None:
        assert torch.allclose(got, 0.75 * lower + 0.25 * upper, atol=1e-6)
        return
    for i, w in enumerate(weight):
        a, b = lower.select(batch, i), upper.select(batch, i)
        assert torch.allclose(got.select(batch, i), (1 - w) * a + w * b, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_blend_passes_gradients_to_both_branches_and_the_weight(weight: float) -> None:
    lower, upper = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    share = torch.full((2,), weight, requires_grad=True)
    blend(lower, upper, share, 0).sum().backward()
    assert lower.grad is not None and upper.grad is not None and share.grad is not None
    assert torch.allclose(share.grad, (upper - lower).detach().sum(1))
    assert torch.allclose(lower.grad, torch.full((2, 3), 1 - weight)) and torch.allclose(upper.grad, torch.full((2, 3), weight))


@given(st.integers(0, 9), st.floats(0, 1))
def test_blend_weight_is_the_place_between_the_bins(tenth: int, share: float) -> None:
    lower, upper = tenth / 10, (tenth + 1) / 10
    table = torch.tensor([[0.0], [lower + share * (upper - lower)]])
    weight = blend_weight(table, 1, torch.tensor([0]), lower, upper)
    assert 0.0 <= weight.item() <= 1.0
    assert weight.item() == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("decided", [False, True])
@given(seed=st.integers(0, 999), weight=st.floats(0, 1, width=32), count=st.integers(1, 7))
def test_one_factor_stands_for_both_runs(decided: bool, seed: int, weight: float, count: int) -> None:
    """What both ratios keep has (1 - w) g + w g; what the lower alone keeps, (1 - w) g; ungated where the lower keeps all."""
    source = torch.Generator().manual_seed(seed)
    factor = 2 * torch.rand(3, 7, generator=source)
    order = torch.rand(3, 7, generator=source).argsort(1)
    weights = torch.full((3,), weight)
    got = boundary_factor(factor, order, count, weights, decided)
    for sample in range(3):
        upper = set(order[sample, :count].tolist())
        for token in range(7):
            g = float(factor[sample, token])
            wanted = (1 - weight) * (g if decided else 1.0) + weight * (g if token in upper else 0.0)
            assert float(got[sample, token]) == pytest.approx(wanted, abs=1e-5)
    if weight == 0:
        assert torch.equal(got, factor if decided else torch.ones_like(factor))


def test_blend_weight_of_each_samples_region() -> None:
    table = torch.tensor([[0.9, 0.9, 0.9], [0.1, 0.15, 0.2]], requires_grad=True)
    weight = blend_weight(table, 1, torch.tensor([2, 0, 1, 1]), 0.1, 0.2)
    assert torch.allclose(weight, torch.tensor([1.0, 0.0, 0.5, 0.5]), atol=1e-6)
    weight.sum().backward()
    assert table.grad is not None
    assert torch.allclose(table.grad, torch.tensor([[0.0, 0.0, 0.0], [10.0, 20.0, 10.0]]))


@pytest.mark.parametrize(("ratio", "wanted"), [(0.0, 0.0), (0.1, 1.0), (-0.05, 0.0), (-1e-9, 0.0), (0.1 + 1e-6, 1.0), (0.3, 1.0)])
def test_blend_weight_is_bounded_and_its_gradient_is_not_stopped(ratio: float, wanted: float) -> None:
    """Ratios start on the bound, where the gradient of a clamp is 0 and the table would stay for ever."""
    table = torch.tensor([[ratio]], requires_grad=True)
    weight = blend_weight(table, 0, torch.tensor([0]), 0.0, 0.1)
    assert weight.item() == wanted
    weight.sum().backward()
    assert table.grad is not None and table.grad.item() == pytest.approx(10.0)


# --- random state and checkpoints ------------------------------------------------------------------------------------
class Noisy(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return x + scale * torch.rand_like(x), nn.functional.dropout(x, 0.5)


def test_a_second_run_leaves_the_random_state_alone() -> None:
    x = torch.ones(50)
    before = torch.get_rng_state()
    first = Noisy()(x, scale=3.0)
    torch.set_rng_state(before)
    again = without_random_trace(Noisy(), (x,), {"scale": 3.0})
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # it draws what the block would draw now


def test_a_second_run_that_raises_leaves_the_random_state_alone() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError(f"drew {torch.rand_like(x)}")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="drew"):
        without_random_trace(fails, (torch.ones(2),), {})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["positional", "by name", "nested", "beside a mask on the CPU"])
def test_the_random_state_is_that_of_the_blocks_device(where: str) -> None:
    """Any device but the CPU does for this; blocks of diffusers get everything by name."""
    x, mask = torch.ones(2, device="meta"), torch.ones(2)
    args, kwargs = {"positional": ((x,), {}), "by name": ((), {"x": x}), "nested": (([x],), {})}.get(where, ((mask, x), {}))
    assert device_of(flatten((args, kwargs))[1]) == x.device


def test_a_block_without_tensors_draws_on_the_cpu() -> None:
    assert device_of(flatten(((3,), {"x": None}))[1]) == torch.device("cpu")


def test_a_checkpointed_site_runs_again_in_the_backward_pass() -> None:
    model, runs = nn.Linear(3, 3), []

    def run(model: nn.Module, x: Tensor) -> Tensor:
        runs.append(torch.is_grad_enabled())
        return torch.tanh(model(x))

    x = torch.randn(2, 3, requires_grad=True)
    site = checkpointed(run, "site_3")
    assert site.__name__ == "site_3"
    result = site(model, x)
    plain = run(model, x)
    wanted = torch.autograd.grad(plain.sum(), [x, *model.parameters()])
    runs.clear()
    got = torch.autograd.grad(result.sum(), [x, *model.parameters()])
    assert runs == [True]
    assert torch.equal(result, plain) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_zero_gradients_leave_long_streams_of_half_precision_alone() -> None:
    """Scores of many tokens add up to more than half precision holds."""
    output, weight = torch.ones(2, 3, dtype=torch.float16), torch.zeros(2, requires_grad=True)
    scores = torch.ones(20_000, 8, requires_grad=True)
    found = with_zero_gradients(output, weight, scores)
    assert torch.equal(found, output) and found.dtype == torch.float16
    assert not any(gradient.any() for gradient in torch.autograd.grad(found.float().sum(), [weight, scores]))


def test_the_table_may_lie_on_another_device_than_a_block() -> None:
    """As in a model spread over several; the meta device does for one."""
    stream, weight = torch.ones(2, 3, 4, device="meta"), torch.tensor([0.25])
    factor, order = torch.ones(2, 3, device="meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    assert blend(stream, stream, weight, 0).device == stream.device
    assert boundary_factor(factor, order, 1, weight, True).device == stream.device
    assert with_zero_gradients(stream, weight, factor).device == stream.device
