"""Token merging, the baseline that the bench compares with: what is averaged, what is copied, what stays."""

import copy

import pytest
import torch
from baselines import token_merging as merging
from torch import Tensor

import diffcr_surgery as dcs
from diffcr_surgery.bench.hooks import Shortening
from diffcr_surgery.tokens import kept_count
from tests.small import WIDTH, TableModel

SIDE = 6
TOKENS = SIDE**2


def matched(tokens: Tensor, ratio: float, shared: bool = False) -> "merging.Matching":
    return merging.match(tokens, kept_count(ratio, tokens.shape[1]), *merging.cells(SIDE), shared)


@pytest.mark.parametrize(("side", "destinations"), [(2, [0]), (3, [0, 2, 6, 8]), (4, [0, 2, 8, 10])])
def test_one_token_of_each_cell_is_a_destination(side, destinations):
    sources, found = merging.cells(side)
    assert found.tolist() == destinations
    assert sorted([*sources.tolist(), *destinations]) == list(range(side**2))


@pytest.mark.parametrize("shared", [False, True])
def test_at_ratio_0_nothing_changes(shared):
    tokens = torch.randn(2, TOKENS, 5)
    matching = matched(tokens, 0.0, shared)
    assert torch.equal(merging.unmerge(merging.merge(tokens, matching), matching), tokens)
    assert torch.equal(merging.merge(tokens, matching), tokens.gather(1, matching.order.expand(2, -1)[..., None].expand(-1, -1, 5)))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("shared", [False, True])
def test_as_many_tokens_remain_as_routing_keeps(ratio, shared):
    tokens = torch.randn(2, TOKENS, 5)
    matching = matched(tokens, ratio, shared)
    assert merging.merge(tokens, matching).shape == (2, kept_count(ratio, TOKENS), 5)
    assert matching.order.shape == (1 if shared else 2, kept_count(ratio, TOKENS))
    for alone, merged in zip(matching.alone, matching.merged, strict=True):  # every token stands somewhere, once
        assert sorted([*alone.tolist(), *merged.tolist(), *matching.destinations.tolist()]) == list(range(TOKENS))


@pytest.mark.parametrize("shared", [False, True])
def test_groups_are_averaged_as_a_loop_averages_them(shared):
    tokens = torch.randn(2, TOKENS, 5)
    sources, destinations = merging.cells(SIDE)
    matching = matched(tokens, 0.5, shared)
    merged = merging.merge(tokens, matching)
    unmerged = merging.unmerge(merged, matching)
    similar = torch.nn.functional.cosine_similarity(tokens[:, sources, None], tokens[:, None, destinations], dim=-1)
    if shared:
        similar = similar.mean(dim=0, keepdim=True).expand(2, -1, -1)
    for b in range(2):
        best = [max((similar[b, i, j].item(), j) for j in range(len(destinations))) for i in range(len(sources))]
        chosen = sorted(range(len(sources)), key=lambda i: -best[i][0])[: TOKENS - kept_count(0.5, TOKENS)]
        expected = tokens[b].clone()
        for j, destination in enumerate(destinations.tolist()):
            group = [destination, *(sources[i].item() for i in chosen if best[i][1] == j)]
            expected[group] = tokens[b, group].mean(dim=0)
        torch.testing.assert_close(unmerged[b], expected)


def test_equal_tokens_merge_without_loss():
    cells = torch.randn(2, SIDE // 2, 1, SIDE // 2, 1, 5)
    tokens = cells.expand(-1, -1, 2, -1, 2, -1).reshape(2, TOKENS, 5)
    matching = matched(tokens, 0.75)
    torch.testing.assert_close(merging.unmerge(merging.merge(tokens, matching), matching), tokens)


@torch.no_grad()
def test_tables_by_token_follow_the_tokens_that_remain():
    model = TableModel(TOKENS, shared=True).eval()
    inputs = {"x": torch.randn(2, TOKENS, WIDTH), "timestep": torch.tensor([3, 3])}
    plan = dcs.plan(model, inputs)
    assert "positions" in plan.routed_sites[0].aligned
    merging.attach(model, plan, 0.5)
    for block in model.blocks:
        block.seen.clear()
    out = model(**inputs)
    matching = matched(inputs["x"], 0.5, shared=True)
    tokens, positions = model.blocks[0].seen[0]
    assert torch.equal(tokens, merging.merge(inputs["x"], matching))
    assert torch.equal(positions, model.table[matching.order[0]])
    assert out.shape == (2, TOKENS, WIDTH)
    assert [len(block.seen[0][1]) for block in model.blocks] == [TOKENS // 2] * 2


@torch.no_grad()
def test_with_skips_a_token_keeps_itself_and_gets_what_the_block_adds_to_its_group():
    model = TableModel(TOKENS, shared=True).eval()
    model.blocks = model.blocks[:1]
    x, block = torch.randn(2, TOKENS, WIDTH), copy.deepcopy(model.blocks[0])
    inputs = {"x": x, "timestep": torch.tensor([3, 3])}
    merging.attach(model, dcs.plan(model, inputs), 0.5, skips=True)
    out, matching = model(**inputs), matched(x, 0.5, shared=True)
    groups = merging.merge(x, matching)
    added = block(groups, positions=model.table[matching.order[0]]) - groups
    place = {token: i for i, token in enumerate(matching.order[0].tolist())}
    into = {token: int(matching.destinations[i]) for token, i in zip(matching.merged[0].tolist(), matching.into[0].tolist(), strict=True)}
    assert len(into) == TOKENS // 2
    expected = torch.stack([x[:, token] + added[:, place[into.get(token, token)]] for token in range(TOKENS)], dim=1)
    torch.testing.assert_close(out, expected)


def test_more_than_the_sources_cannot_be_merged():
    model = TableModel(TOKENS, shared=True).eval()
    plan = dcs.plan(model, {"x": torch.randn(2, TOKENS, WIDTH), "timestep": torch.tensor([3, 3])})
    with pytest.raises(ValueError, match=r"ratio 0\.8 is more than token merging can do: at most 0\.75 of 36 tokens are sources"):
        merging.attach(model, plan, 0.8)
    assert not model.blocks[0]._forward_hooks


def test_it_has_the_form_the_bench_takes():
    names = {name for name in vars(Shortening) if not name.startswith("_")}
    assert names == {"enter", "pick", "leave"} and names <= set(vars(merging.TokenMerging))
