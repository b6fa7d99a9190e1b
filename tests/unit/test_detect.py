"""Detection along the dataflow: what stems from the latent may bypass; text, registers, class tokens and conditions never do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import diffcr_surgery as dcs
from diffcr_surgery.errors import NoRoutableBlockError
from diffcr_surgery.tokens import kept_count, staying_count

WIDTH, TOKENS, TEXT = 8, 10, 4


class Block(nn.Module):
    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.qkv, self.residual = nn.Linear(WIDTH, 3 * WIDTH), residual
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q, k, v)
        return x + y + self.mlp(x + y) if self.residual else y + self.mlp(y)


class Join(nn.Module):
    """An embedding that has the text in it already when it returns: a single node of the graph."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return torch.cat([text, x], 1)


Forward = Callable[["Denoiser", Tensor, Any, Any], Any]


class Denoiser(nn.Module):
    """A model whose root forward is given by the test; it notes what entered its blocks."""

    def __init__(self, forward: Forward, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([block(), block()]), nn.LayerNorm(WIDTH)
        self.registers, self.how = nn.Parameter(torch.randn(1, 3, WIDTH)), forward
        self.embed, self.join = nn.Linear(WIDTH, WIDTH), Join()

    def forward(self, x: Any, text: Any = None, extra: Any = None) -> Any:
        return self.how(self, x, text, extra)

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planned(forward: Forward, *inputs: Any, block: Callable[[], nn.Module] = Block) -> list[tuple[int, int]]:
    """(tokens that may bypass, tokens that stay) of every routed site."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Denoiser(forward, block)
    return [(site.tokens, site.staying) for site in dcs.plan(model, inputs).routed_sites]


X, WORDS = draw(2, TOKENS, WIDTH), draw(2, TEXT, WIDTH, seed=1)


def text_first(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    return self.through(torch.cat([self.embed(text), self.embed(x)], 1))[:, text.shape[1] :]


def text_last(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    return self.through(torch.cat([self.embed(x), self.embed(text)], 1))[:, : x.shape[1]]


def registers_around(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    registers = self.registers.expand(len(x), -1, -1)
    y = torch.cat([registers[:, :1], x, registers[:, 1:]], 1)
    return self.through(self.norm(y))[:, 1:-2]


def written_into_zeros(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    y = torch.zeros(len(x), x.shape[1] + text.shape[1], WIDTH)
    y[:, : text.shape[1]] = text
    y[:, text.shape[1] :] = self.embed(x)
    return self.through(y)[:, text.shape[1] :]


def written_through_a_view(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    y = self.embed(torch.cat([x[:, : text.shape[1]], x], 1))
    y[:, :1].copy_(text[:, :1])
    y.data[:, 1 : text.shape[1]] = text[:, 1:]
    return self.through(y)[:, text.shape[1] :]


def turned_over(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    return self.through(torch.cat([self.embed(text).mT, self.embed(x).mH], 2).adjoint())[:, text.shape[1] :]


def padded(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    y = functional.pad(x.transpose(1, 2), (0, text.shape[1])).transpose(1, 2)
    return self.through(y)[:, : x.shape[1]]


def parted_and_joined_again(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    """As HiDream does: text of its own for every block, and what comes back of it is text still."""
    for block in self.blocks:
        text, x = block(torch.cat([text, x], 1)).split([text.shape[1], x.shape[1]], 1)
    return x


def joined_in_a_module(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    return self.through(self.join(x, text))[:, text.shape[1] :]


WAYS: dict[Forward, int] = {
    text_first: TEXT,
    text_last: TEXT,
    registers_around: 3,
    written_into_zeros: TEXT,
    written_through_a_view: TEXT,
    turned_over: TEXT,
    padded: TEXT,
    parted_and_joined_again: TEXT,
    joined_in_a_module: TEXT,
}


@pytest.mark.parametrize(("forward", "staying"), WAYS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_what_does_not_stem_from_the_latent_stays(forward: Forward, staying: int) -> None:
    assert planned(forward, X, WORDS) == [(TOKENS, staying)] * 2


def test_as_many_words_as_tokens_change_nothing() -> None:
    assert planned(text_first, X, draw(2, TOKENS, WIDTH, seed=1)) == [(TOKENS, TOKENS)] * 2
    assert planned(text_last, X, draw(2, TOKENS, WIDTH, seed=1)) == [(TOKENS, TOKENS)] * 2


def test_each_sample_may_hold_its_text_elsewhere() -> None:
    """Lists of samples, joined one by one and padded, as in Lumina 2 and Z-Image."""

    def forward(self: Denoiser, x: list[Tensor], text: list[Tensor], _: Any) -> list[Tensor]:
        joined = nn.utils.rnn.pad_sequence([torch.cat([t, i]) for t, i in zip(text, x, strict=True)], batch_first=True)
        return [row[len(t) : len(t) + len(i)] for row, t, i in zip(self.through(joined), text, x, strict=True)]

    images = [draw(TOKENS, WIDTH, seed=i) for i in range(2)]
    assert planned(forward, images, [draw(2, WIDTH), draw(5, WIDTH)]) == [(TOKENS, 5)] * 2


def by_index(self: Denoiser, x: Tensor, text: Tensor, where: Tensor) -> Tensor:
    y = text.new_zeros(len(x), x.shape[1] + text.shape[1], WIDTH)
    y[:, where] = x
    y[:, ~where] = text
    return self.through(y)[:, where]


def image_at(*places: int) -> Tensor:
    where = torch.zeros(TOKENS + TEXT, dtype=torch.bool)
    where[list(places)] = True
    return where


def test_content_of_an_index_is_read_and_pinned() -> None:
    """The mask is an input: with another one, other tokens are text, and a graph that kept the first would drop words."""
    ahead, behind = image_at(*range(TOKENS)), image_at(*range(TEXT, TOKENS + TEXT))
    model = Denoiser(by_index)
    dcs.convert_(model, dcs.plan(model, (X, WORDS, ahead), dcs.DiffCRConfig(initial_ratio=0.5, learn_ratios=False)))
    entered: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        for where in (ahead, behind, ahead):
            model(X, WORDS, where)
            entered.clear()
            model(X, WORDS, where)
            (tokens,) = entered
            assert tokens.shape[1] == kept_count(0.5, TOKENS + TEXT, TEXT)
    recordings = [r for variants in model.diffcr.recordings._entries.values() for r in variants]
    assert len(recordings) == 2 and all(len(r.pinned) == 1 for r in recordings)


def test_text_refiners_and_context_encoders_stay_dense() -> None:
    def forward(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
        text = self.blocks[0](text)
        return self.blocks[1](torch.cat([text, x], 1))[:, text.shape[1] :]

    plan = dcs.plan(Denoiser(forward), (X, WORDS))
    refiner, site = plan.sites
    assert (refiner.path, refiner.routed) == ("blocks.0", False) and "no argument carries the denoising stream" in refiner.reason
    assert (site.path, site.tokens, site.staying) == ("blocks.1", TOKENS, TEXT)


def test_kept_tokens_stay_in_order_and_registers_among_them() -> None:
    model = Denoiser(registers_around)
    dcs.convert_(model, dcs.plan(model, (X,), dcs.DiffCRConfig(initial_ratio=0.7, learn_ratios=False)))
    for router in model.diffcr.routers.values():
        nn.init.normal_(router.weight, std=3.0)
    entered: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        model(X)
        entered.clear()
        model(X)
    whole = model.norm(torch.cat([model.registers[:, :1].expand(2, -1, -1), X, model.registers[:, 1:].expand(2, -1, -1)], 1))
    assert entered[0].shape[1] == kept_count(0.7, TOKENS + 3, 3) == 6
    for row in range(2):
        places = [int((whole[row] == token).all(-1).nonzero()) for token in entered[0][row]]
        assert places == sorted(places) and {0, TOKENS + 1, TOKENS + 2} <= set(places)


def test_counts() -> None:
    spans = (((0, 2), (5, 6)), ((1, 2),))
    assert staying_count(spans) == 3
    assert kept_count(0.5, 11, staying_count(spans)) == 7
    assert kept_count(0.99, 11, 3) == 4
    assert kept_count(0.5, 5, staying=5) == 5  # never more than there are


def test_a_sample_without_an_image_is_named() -> None:
    def forward(self: Denoiser, x: list[Tensor], text: list[Tensor], _: Any) -> list[Tensor]:
        joined = nn.utils.rnn.pad_sequence([torch.cat([t, i]) for t, i in zip(text, x, strict=True)], batch_first=True)
        return [row[len(t) : len(t) + len(i)] for row, t, i in zip(self.through(joined), text, x, strict=True)]

    with pytest.raises(NoRoutableBlockError, match="the stream of a sample holds no token that stems from the latent"):
        planned(forward, [draw(TOKENS, WIDTH), draw(0, WIDTH)], [draw(2, WIDTH), draw(5, WIDTH)])


def test_a_machine_without_memory_is_no_shape_that_does_not_fit() -> None:
    failed: list[Any] = []

    class Full(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.__ior__ and not failed:  # the first alone, and not what is tried after it
                failed.append(func)
                raise torch.OutOfMemoryError("full")
            return func(*args, **(kwargs or {}))

    with pytest.raises(torch.OutOfMemoryError, match="full"), Full():
        planned(text_first, X, WORDS)


# --- residuals outside the block -------------------------------------------------------------------------------------
def residual_at_the_root(self: Denoiser, x: Tensor, _: Any, gate: Any) -> Tensor:
    for block in self.blocks:
        x = x + block(self.norm(x)) * (1.0 if gate is None else gate)
    return x


def test_bypassed_tokens_pass_a_residual_that_is_added_after_the_block() -> None:
    model = Denoiser(residual_at_the_root, lambda: Block(residual=False))
    dcs.convert_(model, dcs.plan(model, (X,), dcs.DiffCRConfig(initial_ratio=0.5, learn_ratios=False)))
    torch.nn.init.normal_(model.diffcr.routers["0"].weight)
    assert [call.outside for call in model_calls(model)] == [True, True]
    dcs.ratio_table(model).data[1] = 0.0
    entered: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        model(X)
        entered.clear()
        model(X)
    same = torch.isclose(entered[0], model.norm(X)).all(-1).sum(1)
    assert same.tolist() == [TOKENS // 2, TOKENS // 2]  # as they came: not doubled, not zero


def model_calls(model: nn.Module) -> list[Any]:
    with torch.no_grad():
        model(X)
    (recording,) = (r for variants in model.diffcr.recordings._entries.values() for r in variants)
    return list(recording.derived.calls.values())


@pytest.mark.parametrize("inside", [True, False])
def test_a_skip_beside_a_block_with_a_residual_of_its_own_is_no_residual(inside: bool) -> None:
    model = Denoiser(residual_at_the_root, lambda: Block(residual=inside))
    dcs.convert_(model, (X,), dcs.DiffCRConfig())
    assert [call.outside for call in model_calls(model)] == [not inside] * 2


def added_to_the_first_stream(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
    y = self.norm(x)
    for block in self.blocks:
        y = x + block(self.norm(y))
    return y


def given_a_sum_and_added_to_a_term(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
    return x + self.blocks[1](x + self.blocks[0](self.norm(x)))


@pytest.mark.parametrize("forward", [added_to_the_first_stream, given_a_sum_and_added_to_a_term])
def test_a_term_of_the_stream_is_not_the_stream(forward: Forward) -> None:
    """A token that bypassed the second block would leave as what entered the first."""
    model = Denoiser(forward, lambda: Block(residual=False))
    first, second = dcs.plan(model, (X,)).sites
    assert first.routed and not second.routed and "not simply added to the stream" in second.reason


def modulated_by_the_latent(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
    for block in self.blocks:
        x = x + block(self.norm(x) * (1 + x.mean(1, keepdim=True)))
    return x


def test_a_stream_modulated_by_what_stems_from_the_latent_is_one_stream() -> None:
    assert planned(modulated_by_the_latent, X, block=lambda: Block(residual=False)) == [(TOKENS, 0)] * 2


def text_joined_for_the_block_alone(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
    for block in self.blocks:
        x = x + block(torch.cat([text, x], 1))[:, text.shape[1] :]
    return x


def flattened_for_the_block_alone(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
    for block in self.blocks:
        x = x + block(x.flatten(1, 2)).view(x.shape)
    return x


@pytest.mark.parametrize(
    ("forward", "inputs"), [(text_joined_for_the_block_alone, (X, WORDS)), (flattened_for_the_block_alone, (draw(2, 3, 4, WIDTH),))]
)
def test_an_update_of_nothing_is_nothing_wherever_it_is_added(forward: Forward, inputs: tuple[Tensor, ...]) -> None:
    """Blocks that give zeros: routed or not, the model returns its input."""
    model = Denoiser(forward, lambda: Block(residual=False))
    for block in model.blocks:
        block.qkv.weight.data[-WIDTH:] = block.qkv.bias.data[-WIDTH:] = 0.0  # type: ignore[union-attr]
        block.mlp[-1].weight.data.zero_(), block.mlp[-1].bias.data.zero_()  # type: ignore[index,union-attr]
    dcs.convert_(model, inputs, dcs.DiffCRConfig(initial_ratio=0.5, learn_ratios=False))
    with torch.no_grad():
        assert torch.equal(model(*inputs), inputs[0])


def test_a_block_whose_residual_cannot_be_told_stays_dense() -> None:
    """Zero weights under a weight norm are 0/0."""

    def normed() -> nn.Module:
        block = Block(residual=False)
        nn.utils.parametrizations.weight_norm(block.mlp[-1])
        return block

    with pytest.raises(NoRoutableBlockError, match="not simply added to the stream"):
        planned(residual_at_the_root, X, None, None, block=normed)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1))


class Pairs(nn.Module):
    """Attention and MLP by turns, each with a residual of its own, and no module for the two: what lucidrains writes."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        feed = [
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(depth)
        ]
        self.layers = nn.ModuleList(nn.ModuleList([Attend(), each]) for each in feed)

    def forward(self, x: Tensor) -> Tensor:
        for attend, feed in self.layers:  # type: ignore[misc]
            x = attend(x) + x
            x = feed(x) + x
        return x


@pytest.mark.parametrize("inside", [True, False], ids=["in a module", "at the root"])
def test_halves_of_layers_are_routed_one_by_one(inside: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Pairs(2)) if inside else Pairs(2)
    plan = dcs.plan(model, (X,), dcs.DiffCRConfig(initial_ratio=0.5, learn_ratios=False))
    assert [site.path.rpartition("layers.")[2] for site in plan.routed_sites] == ["0.0", "0.1", "1.0", "1.1"]
    dcs.convert_(model, plan)
    assert [call.outside for call in model_calls(model)] == [True] * 4


def test_a_layer_of_attention_and_mlp_is_whole() -> None:
    """Macaron layers have an MLP on either side of the attention, and joint ones two of each: one layer all the same."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Pairs(1))
    assert [site.path for site in dcs.plan(model, (X,)).routed_sites] == ["1"]


# --- numbers that count tokens, and blocks with several outputs ------------------------------------------------------
class Counting(Block):
    """Reads the text with its last `count` tokens alone, as Helios does with its history in front."""

    def forward(self, x: Tensor, count: int, heads: int) -> Tensor:  # type: ignore[override]
        before, now = x[:, :-count], x[:, -count:]
        x = torch.cat([before, now * 1.5], 1)
        return super().forward(x.unflatten(-1, (heads, -1)).flatten(-2))


def test_a_number_that_counts_tokens_follows_them() -> None:
    def forward(self: Denoiser, x: Tensor, text: Tensor, _: Any) -> Tensor:
        y = torch.cat([text, x], 1)
        for block in self.blocks:
            y = block(y, x.shape[1], 2)
        return y[:, text.shape[1] :]

    model = Denoiser(forward, Counting)
    plan = dcs.plan(model, (X, WORDS), dcs.DiffCRConfig(initial_ratio=0.5, learn_ratios=False))
    assert [site.aligned["count"] for site in plan.routed_sites] == ["#n", "#n"]
    assert all("heads" not in site.aligned for site in plan.routed_sites)
    dcs.convert_(model, plan)
    given: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: given.append(args[1]))
    with torch.no_grad():
        model(X, WORDS)
        model(X, WORDS)
    assert given[-1] == TOKENS // 2


class Stepping(Block):
    def forward(self, x: Tensor, steps: int) -> Tensor:  # type: ignore[override]
        return super().forward(x * steps)


def test_a_number_equal_to_n_by_chance_is_left_alone() -> None:
    def forward(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, TOKENS)
        return x

    plan = dcs.plan(Denoiser(forward, Stepping), (X,))
    assert [dict(site.aligned) for site in plan.routed_sites] == [{"x": "b n c"}] * 2


class Spoiling(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


def test_a_stream_that_its_block_overwrites_and_others_read_stays_dense() -> None:
    """Routed, the block would spoil a copy of the kept tokens, and the readers would see what the original spoils."""

    def forward(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
        x = self.embed(x)
        return self.blocks[0](x) + self.embed(x)

    with pytest.raises(NoRoutableBlockError, match="it overwrites the stream it is given, which is read again after it"):
        planned(forward, X, block=Spoiling)


class TwoStreams(Block):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x, 2 * x


def test_a_block_whose_outputs_all_move_says_so() -> None:
    def forward(self: Denoiser, x: Tensor, _: Any, __: Any) -> Tensor:
        x, hint = self.blocks[0](x)
        return x + hint

    with pytest.raises(NoRoutableBlockError, match=r"its tokens are a set, but its outputs \['0', '1'\] all move with them"):
        planned(forward, X, block=TwoStreams)
