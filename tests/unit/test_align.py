"""Alignment: found by the smallest set that has to move, proven by permutation, refused where tokens are no set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery.align import align_block
from diffcr_surgery.align.planned import align_as_planned
from diffcr_surgery.align.proof import _permutations, tolerance
from diffcr_surgery.detect import named_leaves
from diffcr_surgery.testing.denoisers import Architecture, Denoiser
from diffcr_surgery.trace.reference import BlockSample

WIDTH = 8


class Base(nn.Module):
    """Self-attention and an MLP, both behind a zero-initialised gate, as in adaLN-zero."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.gate = nn.Parameter(torch.zeros(WIDTH))

    def attend(self, x, keys=None, mask=None, turn=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if turn is not None:
            q, k = q * turn, k * turn
        if keys is not None:
            k, v = torch.cat([keys, k], 1), torch.cat([keys, v], 1)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def finish(self, x, attended):
        x = x + self.gate * attended
        return x + self.gate * self.mlp(x)


class Plain(Base):
    def forward(self, x, c):
        return self.finish(x, self.attend(x) + c[:, None])


class CrossAttention(Base):
    def forward(self, x, text):
        return self.finish(x, self.attend(x, keys=text))


class Rotary(Base):
    def forward(self, x, table):
        return self.finish(x, self.attend(x, turn=table))


class Masked(Base):
    def forward(self, x, mask):
        return self.finish(x, self.attend(x, mask=mask))


class PerToken(Base):
    def forward(self, x, c):
        return self.finish(x * (1 + c), self.attend(x))


class Joint(Base):
    """Text and image in one attention; the table covers both, text first."""

    def forward(self, text, x, table):
        both = torch.cat([text, x], 1)
        both = self.finish(both, self.attend(both, turn=table))
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class Convolution(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        return self.finish(x, self.attend(x)) + self.gate * self.conv(x.transpose(1, 2)).transpose(1, 2)


class Positions(Base):
    def forward(self, x):
        return self.finish(x, self.attend(x + 0.1 * torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]))


class TimeFirst(Base):
    def forward(self, x):
        return self.finish(x.transpose(0, 1), self.attend(x.transpose(0, 1))).transpose(0, 1)


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def align(block, *args, streams=("x",), **options):
    sample = BlockSample(block, args, {})
    leaves = named_leaves(block, args, {}, torch.Tensor)
    marks = {name: torch.ones(leaves[name][1].shape[:-1], dtype=torch.bool) for name in streams if name in leaves}
    return align_block(sample, marks, **options)


# The batch, the text, the tokens and the channels may all have the same length.
sizes = st.sampled_from([(1, 4, 4), (2, 8, 8), (8, 8, 8), (3, 5, 8), (2, 2, 3), (4, 4, 5)])


@given(sizes)
def test_stream_alone(size):
    b, n, _ = size
    found = align(Plain(), rand(b, n, WIDTH), rand(b, WIDTH))
    assert found.routable and found.aligned == {"x": "b n c"}


@given(sizes)
def test_text_of_the_same_length_stays(size):
    b, n, m = size
    found = align(CrossAttention(), rand(b, n, WIDTH), rand(b, m, WIDTH))
    assert found.routable and found.aligned == {"x": "b n c"}


@given(sizes, st.booleans())
def test_rotary_table_moves(size, batched):
    b, n, _ = size
    found = align(Rotary(), rand(b, n, WIDTH), rand(*((1, n, WIDTH) if batched else (n, WIDTH))))
    assert found.routable and set(found.aligned) == {"x", "table"}
    assert found.aligned["table"].split()[-2] == "n"


@given(sizes)
def test_table_of_ones_moves_all_the_same(size):
    b, n, _ = size
    found = align(Rotary(), rand(b, n, WIDTH), torch.ones(n, WIDTH))
    assert found.aligned["table"] == "n c"


@given(sizes)
def test_mask_over_keys_moves(size):
    b, n, _ = size
    found = align(Masked(), rand(b, n, WIDTH), torch.ones(b, 1, n, dtype=torch.bool))
    assert found.routable and found.aligned["mask"].split()[-1] == "n" and found.aligned["mask"].split().count("n") == 1


@given(sizes)
def test_mask_over_pairs_moves_on_both_axes(size):
    b, n, _ = size
    found = align(Masked(), rand(b, n, WIDTH), rand(b, n, n))
    assert found.aligned["mask"].split() == ["b", "n", "n"]


@given(sizes)
def test_modulation_per_token_moves(size):
    b, n, _ = size
    found = align(PerToken(), rand(b, n, WIDTH), rand(b, n, WIDTH))
    assert set(found.aligned) == {"x", "c"}


@given(sizes)
def test_prefix_stays(size):
    b, n, m = size
    found = align(Joint(), rand(b, m, WIDTH), rand(b, n, WIDTH), rand(m + n, WIDTH))
    assert found.routable and found.output == "1"
    assert found.aligned == {"x": "b n c", "table": "m+n c"}


@pytest.mark.parametrize("block", [Convolution, Positions])
def test_what_is_no_set_of_tokens_is_refused_with_its_error(block):
    found = align(block(), rand(2, 6, WIDTH))
    assert not found.routable and "no set" in found.reason
    assert 1e-3 < found.error < float("inf") and f"{found.error:.1e}" in found.reason


def test_tokens_before_batch():
    found = align(TimeFirst(), rand(5, 2, WIDTH))
    assert found.routable and found.aligned == {"x": "n b c"}


def test_a_single_token_proves_nothing():
    assert "single token" in align(Plain(), rand(2, 1, WIDTH), rand(2, WIDTH)).reason


def test_a_wrong_declaration_is_refused():
    declared = {"x": "b n c", "text": "b n d"}
    assert not align(PerToken(), rand(2, 6, WIDTH), rand(2, 6, WIDTH), hint={"x": "b n c"}, search=False).routable
    assert not align(Joint(), rand(2, 6, WIDTH), rand(2, 6, WIDTH), rand(12, WIDTH), hint=declared, search=False).routable


def test_half_precision_is_proven_in_single():
    found = align(Plain().bfloat16(), rand(2, 6, WIDTH).bfloat16(), rand(2, WIDTH).bfloat16())
    assert found.routable and found.error < 1e-5


def test_the_block_is_not_touched():
    block = Plain().train()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    align(block, rand(2, 6, WIDTH), rand(2, WIDTH))
    assert block.training and all(p.requires_grad for p in block.parameters())
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


class Writing(Base):
    """Adds to an argument in place, by sample or by token."""

    def forward(self, x, other):
        other += x if other.shape == x.shape else 1
        return self.finish(x, self.attend(x) + other.mean(1, keepdim=True))


class WritingItsStream(Base):
    def forward(self, skip, x):
        x += skip
        return self.finish(x, self.attend(x))


@pytest.mark.parametrize("entries", [4, 6], ids=["text", "tokens"])
def test_a_block_that_writes_into_what_is_not_its_stream_is_refused(entries):
    found = align(Writing(), rand(2, 6, WIDTH), rand(2, entries, WIDTH))
    assert not found.routable and "it writes into its arguments ['other']" in found.reason and "clones" in found.reason


def test_a_block_may_write_into_its_stream():
    found = align(WritingItsStream(), rand(2, 6, WIDTH), rand(2, 6, WIDTH), streams=("skip", "x"))
    assert found.routable and found.stream == "x" and found.overwrites


class WritingEitherStream(Base):
    """Spoils one argument, and cannot do without the order of the other's tokens."""

    def forward(self, x, skip):
        x += 1
        return self.finish(x, self.attend(x)) + skip.cumsum(1)


def test_a_stream_that_was_tried_in_vain_is_not_said_to_be_spoiled_by_itself():
    found = align(WritingEitherStream(), rand(2, 6, WIDTH), rand(2, 6, WIDTH), streams=("x", "skip"))
    assert not found.routable and "writes into" not in found.reason and "tokens are no set" in found.reason


class AlwaysCausal(Base):
    def forward(self, x, is_causal):
        if not is_causal:
            raise ValueError("only causal")
        return self.finish(x, self.attend(x, mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()))


class MoreUnlessCausal(Base):
    def forward(self, x, is_causal):
        y = self.finish(x, self.attend(x, mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()))
        return y if is_causal else (y, y)


@pytest.mark.parametrize("block", [AlwaysCausal(), MoreUnlessCausal()])
def test_a_block_that_insists_on_its_causal_flag_is_refused(block):
    marks = {"x": torch.ones(2, 6, dtype=torch.bool)}
    found = align_block(BlockSample(block, (rand(2, 6, WIDTH),), {"is_causal": True}), marks)
    assert not found.routable and "tokens are no set" in found.reason


class Alike(TimeFirst):
    """Takes samples of the same mean alone."""

    def forward(self, x):
        if not torch.allclose(*x.mean(0), atol=1e-3):
            raise ValueError("samples differ")
        return super().forward(x)


def test_a_block_that_cannot_take_another_first_sample_is_proven_all_the_same():
    found = align(Alike(), rand(6, 1, WIDTH).repeat(1, 2, 1), hint={"x": "n b c"}, search=False)
    assert found.routable and found.batches == {}


class AlikeWithMeans(Alike):
    def forward(self, x):
        return super().forward(x), x.mean(0)


def test_an_output_whose_samples_cannot_be_found_leaves_the_block_dense():
    found = align(AlikeWithMeans(), rand(6, 1, WIDTH).repeat(1, 2, 1), hint={"x": "n b c"}, search=False)
    assert not found.routable and "may have the samples on another axis" in found.reason


class Drawing(Base):
    def forward(self, x, **_):
        return self.finish(x, self.attend(x) + 0 * torch.rand(1))


def test_a_block_that_draws_in_its_trials_leaves_the_random_state_alone():
    model = Denoiser(Architecture(width=WIDTH), 0)
    model.blocks[0] = Drawing()
    before = torch.get_rng_state()
    assert dcs.plan(model, {"latent": rand(2, 5, WIDTH)}).sites[0].routed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_says_that_a_block_is_no_longer_compiled_by_itself():
    model = Denoiser(Architecture(depth=2), 0)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with torch.compiler.set_stance("force_eager"):
        first, second = dcs.plan(model, {"latent": rand(2, 5, 4)}).sites
    assert first.routed and "its own torch.compile is passed by: compile the converted model instead" in first.reason
    assert "torch.compile" not in second.reason


class SharedModulation(Base):
    """Two rows of modulation that all samples share, next to a condition of each sample's own and a table that makes it run by samples."""

    def forward(self, x, c, rows, table):
        return self.finish(x, rows[0] * self.attend(x + c[:, None], turn=table)) * rows[1]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_shared_rows_as_many_as_samples_are_not_cut(batch):
    found = align(SharedModulation(), rand(batch, 6, WIDTH), rand(batch, WIDTH), rand(2, WIDTH), rand(6, WIDTH))
    assert found.routable and found.aligned == {"x": "b n c", "table": "n c"}
    assert batch == 1 or (found.axes["c"] == "b c" and "rows" not in found.axes)


class Viewing(Base):
    """Names the number of its tokens; what else is as many is so by chance."""

    def forward(self, x, b, n, heads, parts):
        y = x.view(b, n, WIDTH).unflatten(-1, (heads, -1)).flatten(-2)
        return self.finish(x, self.attend(y * parts))


class ViewingTwice(Base):
    def forward(self, x, rows, n, scale):
        y = x.view(len(x), rows, WIDTH).expand(len(x), n, WIDTH)
        return self.finish(x, self.attend(y / scale))


def test_a_number_the_block_cannot_do_without_follows_its_tokens():
    found = align(Viewing(), rand(3, 8, WIDTH), 3, 8, 8, 8)
    assert found.routable and found.aligned == {"x": "b n c", "n": "#n"}
    found = align(ViewingTwice(), rand(3, 8, WIDTH), 8, 8, 8)
    assert found.routable and found.aligned == {"x": "b n c", "rows": "#n", "n": "#n"}


def test_as_planned_a_number_that_counts_all_tokens_has_to_count_them():
    """With its weights sharded a block is not proven anew, but what it is given is checked."""
    mark = torch.tensor([[False, False, True, True, True, True]]).expand(3, -1)
    known = align_block(BlockSample(Viewing(), (rand(3, 6, WIDTH), 3, 6, 2, 8), {}), {"x": mark})
    assert known.counts == {"n": "m+n"}
    given = BlockSample(Viewing(), (rand(3, 6, WIDTH), 3, 5, 2, 8), {})
    found = align_as_planned(given, {"x": mark}, known)
    assert "count the tokens (6, of which 4 may bypass), and are [5]" in found.reason


class TimeFirstRotary(Base):
    """Tokens before batch, with a table that all samples share: each sample is gathered and run by itself."""

    def forward(self, x, table):
        x = x.transpose(0, 1)
        return self.finish(x, self.attend(x, turn=table)).transpose(0, 1)


def test_tokens_before_batch_with_a_shared_table():
    found = align(TimeFirstRotary(), rand(5, 2, WIDTH), rand(5, WIDTH))
    assert found.routable and found.aligned == {"x": "n b c", "table": "n c"}


def test_a_declaration_that_moves_too_much_is_refused():
    """Text keys of the image's length pass any permutation; gathered, words would go missing without a sound."""
    declared = {"x": "b n c", "text": "b n c"}
    found = align(CrossAttention(), rand(2, 6, WIDTH), rand(2, 6, WIDTH), hint=declared, search=False)
    assert not found.routable and "['text'] need not move" in found.reason


def test_under_autocast_what_is_computed_in_less_is_proven_in_less() -> None:
    exact, coarse = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert tolerance(exact) < 1e-3 < tolerance(coarse)
    with torch.autocast("cpu", torch.bfloat16):
        assert tolerance(exact) == tolerance(coarse)
    assert tolerance(exact) < 1e-3


@pytest.mark.parametrize("seed", [3, 8, 10, 11])
def test_attention_that_looks_at_one_token_hides_no_mask(seed: int) -> None:
    """Of two tokens each sees but one here, whatever the bias adds, so that on one draw any axes of it will do."""
    model = Denoiser(Architecture(width=6, condition="token", rotary="shared", bias="pairs"), seed=33914)
    latent = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(seed))
    (site,) = dcs.plan(model, {"latent": latent, "timestep": torch.zeros(2)}).sites
    assert site.aligned["bias"] == "n n"


def test_two_tokens_of_one_sample_change_places() -> None:
    """A permutation that moves nothing would prove anything."""
    moving = torch.ones(1, 2, dtype=torch.bool)
    assert all(_permutations(moving, torch.Generator().manual_seed(seed)).tolist() == [[1, 0]] for seed in range(8))


def test_a_machine_without_memory_says_nothing_about_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("diffcr_surgery.align.proof._shaken", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        dcs.plan(Denoiser(Architecture(), 0), {"latent": torch.randn(2, 5, 4)})


@pytest.mark.parametrize(
    ("form", "seed", "shapes"),
    [
        (Architecture(block="joint", heads=2, condition="token", rotary="shared", bias="keys", layout="n b c"), 0, ((2, 3), (2, 4))),
        (Architecture(block="joint", depth=2, heads=2, rotary="shared", bias="keys", skips=True, layout="n b c"), 0, ((2, 2), (2, 2))),
        (Architecture(block="joint", width=6, condition="token", rotary="sample", bias="pairs", layout="n b c"), 1516, ((4, 2), (4, 2))),
        (Architecture(block="joint", condition="sample", rotary="shared", layout="n b c"), 18959, ((1, 2), (1, 2))),
    ],
    ids=["many", "all alike", "sharp", "sharp on text"],
)
def test_arguments_are_told_one_by_one(form: Architecture, seed: int, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Many arguments of like lengths: whole sets of them took thousands of trials, and did not lead to a proof."""
    source = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(*shape, form.width, generator=source) for name, shape in zip(("latent", "text"), shapes, strict=True)}
    if form.condition != "none":
        inputs["timestep"] = torch.linspace(100, 900, shapes[0][0])
    for site in dcs.plan(Denoiser(form, seed), inputs).sites:
        wanted = {name: axes.replace(" d", " c") for name, axes in form.moving.items() if name != "skip" or site.path == "blocks.1"}
        assert site.aligned == wanted
        assert site.tokens == shapes[0][1]
