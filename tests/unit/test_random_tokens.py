"""Random token dropping, a baseline of the evaluation: how many tokens run, which, and that the rest leaves as it came."""

import pytest
import torch
from baselines import random_tokens as dropping
from torch import Tensor

import diffcr_surgery as dcs
from diffcr_surgery.bench.hooks import Shortening
from diffcr_surgery.tokens import kept_count
from tests.small import TableModel

TOKENS = 10


def dropped(shared: bool, ratio: float, seed: int = 0, together: bool = False) -> tuple[TableModel, Tensor, Tensor]:
    """A model with dropping attached, its input, and what it gives."""
    torch.manual_seed(0)
    model = TableModel(TOKENS, shared).eval().requires_grad_(False)
    inputs = {"x": torch.randn(3, TOKENS, 8), "timestep": torch.tensor([3.0, 4.0, 5.0])}
    plan = dcs.plan(model, inputs)
    assert "positions" in plan.routed_sites[0].aligned
    dropping.attach(model, plan, ratio, seed, together)
    for block in model.blocks:
        block.seen.clear()
    return model, inputs["x"], model(**inputs)


def places(whole: Tensor, part: Tensor) -> list[list[int]]:
    """Where the tokens ``b k c`` stand in ``b n c``."""
    return [
        [next(i for i in range(len(row)) if torch.equal(row[i], token)) for token in kept] for row, kept in zip(whole, part, strict=True)
    ]


def test_every_set_is_as_likely_as_any_other():
    chosen = dropping.choose(6000, 4, 2, torch.Generator().manual_seed(0))
    assert bool((chosen[:, 0] < chosen[:, 1]).all())
    counts = torch.bincount(4 * chosen[:, 0] + chosen[:, 1], minlength=16)
    assert counts[counts > 0].tolist() == pytest.approx([1000] * 6, abs=150)  # five standard deviations


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_a_random_share_runs_and_the_rest_leaves_as_it_came(ratio, shared, together):
    model, x, _ = dropped(shared, ratio, together=together)
    (entered, positions), (after, _) = (block.seen[0] for block in model.blocks)
    kept = places(x, entered)
    assert [len(row) for row in kept] == [kept_count(ratio, TOKENS)] * 3
    assert (kept[0] == kept[1] == kept[2]) == (shared or together)
    table = model.table if shared else model.table + torch.tensor([3.0, 4.0, 5.0])[:, None, None]
    assert torch.equal(positions, table[kept[0]] if shared else torch.stack([table[b, row] for b, row in enumerate(kept)]))
    assert after.shape == entered.shape


@pytest.mark.parametrize("shared", [False, True])
def test_one_block_is_the_block_on_the_chosen_tokens(shared):
    model, x, _ = dropped(shared, 0.4)
    entered, positions = model.blocks[0].seen[0]
    kept = places(x, entered)
    expected, update = x.clone(), model.blocks[0].forward(entered, positions)  # the block itself, round its hooks
    for b, row in enumerate(kept):
        expected[b, row] = update[b]
    for b, row in enumerate(model.blocks[1].seen[0][0]):
        assert all(any(torch.equal(token, one) for one in expected[b]) for token in row)


def test_at_ratio_0_nothing_changes():
    model, x, out = dropped(False, 0.0)
    for block in model.blocks:
        block._forward_hooks.clear(), block._forward_pre_hooks.clear()
    assert torch.equal(out, model(x, torch.tensor([3.0, 4.0, 5.0])))


def test_a_seed_decides():
    first, again, other = (dropped(False, 0.5, seed)[2] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_each_call_of_a_block_chooses_anew():
    model, x, first = dropped(False, 0.5)
    assert not torch.equal(first, model(x, torch.tensor([3.0, 4.0, 5.0])))


def test_it_has_the_form_the_bench_takes():
    names = {name for name in vars(Shortening) if not name.startswith("_")}
    assert names == {"enter", "pick", "leave"} and names <= set(vars(dropping.RandomTokens))
