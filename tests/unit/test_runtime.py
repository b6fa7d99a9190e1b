"""Conversion at work: checkpointing, dropout, shared rotary tables, repeated blocks, graphs that are kept and dropped."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery.errors import AlignmentError, ConversionError, NoRoutableBlockError, TimestepError
from diffcr_surgery.samples import find_splitting
from diffcr_surgery.trace.key import bind_call
from tests import small
from tests.models import CASES, Size, output

WIDTH = 8


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, c):
        q, k, v = self.qkv(x + c[:, None]).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Denoiser(nn.Module):
    """The smallest real denoiser: embed, blocks, head; a block may come round again."""

    def __init__(self, depth=2, dropout=0.0, rounds=1):
        super().__init__()
        self.embed, self.time = nn.Linear(3, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.head, self.rounds, self.gradient_checkpointing = nn.Linear(WIDTH, 3), rounds, False

    def forward(self, x, t):
        c = self.time((t[:, None] / 1000).to(self.time.weight.dtype))
        x = self.embed(x)
        for _ in range(self.rounds):
            for block in self.blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
                else:
                    x = block(x, c)
        return self.head(x)


def inputs(batch=3, tokens=10):
    source = torch.Generator().manual_seed(batch * tokens)
    return {"x": torch.randn(batch, tokens, 3, generator=source), "t": torch.linspace(1, 999, batch).round()}


def converted(model=None, ratio=None, **settings):
    model = Denoiser() if model is None else model
    dcs.convert_(model, inputs(), dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000), **settings))
    if ratio is not None:
        with torch.no_grad():
            dcs.ratio_table(model).fill_(ratio)
            for router in model.diffcr.routers.values():
                nn.init.normal_(router.weight)
    return model


def step(model, **given):
    model.zero_grad()
    torch.manual_seed(7)
    result = model(**(given or inputs()))
    result.square().mean().backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_checkpointing_changes_nothing_but_memory(ratio):
    model = converted(ratio=ratio).train()
    plain, gradients = step(model)
    model.gradient_checkpointing = True
    saved, again = step(model)
    assert torch.equal(plain, saved)
    assert gradients.keys() == again.keys()
    assert all(torch.allclose(gradients[name], again[name], atol=1e-6) for name in gradients)


def test_the_routed_site_is_the_checkpointed_unit():
    """In the backward pass a checkpointed site runs again as a whole: its router too."""
    model = converted(ratio=0.5).train()
    calls = []
    for router in model.diffcr.routers.values():
        router.register_forward_hook(lambda *_: calls.append(1))
    for flag, times in ((False, 1), (True, 2)):
        model.gradient_checkpointing = flag
        step(model)  # records
        calls.clear()
        step(model)
        assert len(calls) == times * len(model.diffcr.routers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_draws_as_in_the_original(checkpointing):
    model = Denoiser(dropout=0.5).train()
    model.gradient_checkpointing = checkpointing
    before, gradients = step(model)
    before, gradients = before.clone(), {name: g.clone() for name, g in gradients.items()}
    after, now = step(converted(model))
    assert torch.equal(before, after)
    assert all(torch.equal(gradients[name], now[name]) for name in gradients)


def test_a_block_that_comes_round_again_is_two_sites():
    model = Denoiser(depth=1, rounds=2)
    plan = dcs.plan(model, inputs())
    assert [(site.path, site.occurrence) for site in plan.routed_sites] == [("blocks.0", 0), ("blocks.0", 1)]
    assert "blocks.0 (call 2)" in str(plan)
    dcs.convert_(model, plan)
    assert dcs.ratio_table(model).shape == (2, 1) and len(model.diffcr.routers) == 2


def test_one_token_is_never_routed_away():
    model = converted(ratio=0.9).eval()
    with torch.no_grad():
        one = model(**inputs(tokens=1))
        dcs.restore_(model)
        assert torch.equal(one, model(**inputs(tokens=1)))


def test_graphs_are_kept_by_call_and_dropped_by_copies():
    model = converted(ratio=0.5).eval()
    for _ in range(3):
        model(**inputs())
    assert len(model.diffcr.recordings) == 1  # both regions take the same decisions, so the batch is not split
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(twin.diffcr.recordings) == 0
        assert torch.equal(twin(**inputs()), model(**inputs()))


def test_a_cast_keeps_the_table_in_single_precision():
    model = converted(ratio=0.25).bfloat16()
    assert dcs.ratio_table(model).dtype == torch.float32
    assert model.diffcr.routers["0"].weight.dtype == torch.bfloat16
    given = inputs()
    assert model(given["x"].bfloat16(), given["t"].bfloat16()).dtype == torch.bfloat16


def test_table_is_projected_not_clamped():
    """From exact 0 every entry of the regions seen moves; a clamp in the graph would hold it there without a sound."""
    model = converted(target_ratio=0.5).train()
    table = dcs.ratio_table(model)
    optimizer = torch.optim.SGD([table], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (model(**inputs()).square().mean() + dcs.ratio_loss(model)).backward()
        optimizer.step()
    assert (table > 0).all()
    with torch.no_grad():
        table.fill_(5.0)
    assert torch.equal(dcs.ratio_table(model), torch.full_like(table, 0.9))


def test_a_sequential_runs_its_own_children_alone():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True), nn.Linear(WIDTH, 3)).eval()
    x = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(0))
    before = model(x)
    dcs.convert_(model, (x,))
    assert torch.equal(model(x), before) and len(model) == 3 and [type(m).__name__ for m in model][1] == "TransformerEncoderLayer"
    model(torch.cat([x, x]))
    dcs.restore_(model)
    assert len(model) == 3


def test_threads_may_all_come_first():
    """A recording is aligned before others see it; half aligned, it could answer no one."""
    model = converted(ratio=0.5).eval()
    given, barrier, outputs, errors = inputs(), threading.Barrier(4), [], []

    def run():
        barrier.wait()
        try:
            with torch.no_grad():
                outputs.append(model(**given))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(torch.equal(output, outputs[0]) for output in outputs) and len(outputs) == 4
    assert len(model.diffcr.recordings) == 1


def test_a_forward_over_all_children_is_told_what_to_do():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Linear(WIDTH, WIDTH), nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True)

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    model, x = Chain(), torch.randn(2, 10, WIDTH)
    dcs.convert_(model, (x,))
    with pytest.raises(ConversionError, match="runs over all of its children"):
        model(x)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_call_that_cannot_be_aligned_is_refused_each_time(batch):
    """Planned with tokens as a set, called with positions counted inside: at batch 1 too, and the second time too."""

    class Positions(Block):
        def forward(self, x, c, counted=False):
            return super().forward(x + torch.arange(x.shape[1])[:, None] / 10 if counted or x.shape[1] == 12 else x, c)

    class Model(Denoiser):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Positions(), Positions()])

        def forward(self, x, t, counted=False):
            x, c = self.embed(x), self.time(t[:, None] / 1000)
            for block in self.blocks:
                x = block(x, c, counted)
            return self.head(x)

    model = converted(Model())
    for _ in range(2):
        with pytest.raises(AlignmentError, match=r"blocks\.0 \(Positions\).*was planned as routed"):
            model(**inputs(batch), counted=True)
        with pytest.raises(AlignmentError, match=r"blocks\.0 \(Positions\).*was planned as routed"):
            model(**inputs(batch, tokens=12))  # proven at another length
    model(**inputs(batch))
    model(**inputs(batch, tokens=1))


def test_budget_loss_counts_what_a_step_pushed_below_zero_as_zero():
    """Two ratios at 0 and one above: were their excursions below 0 counted, the mean would be met outside the range."""
    model = converted(target_ratio=0.05)
    table = dcs.ratio_table(model)
    with torch.no_grad():
        table.copy_(torch.tensor([[0.2], [0.0], [0.0]])[: len(table)])
    optimizer = torch.optim.SGD([table], lr=len(table) / 3)
    for _ in range(200):
        optimizer.zero_grad()
        dcs.ratio_loss(model).backward()
        optimizer.step()
    assert float(dcs.ratio_table(model).detach().mean()) == pytest.approx(0.05, abs=1e-3)


def test_blocks_can_be_left_out():
    plan = dcs.plan(Denoiser(3), inputs(), dcs.DiffCRConfig(blocks=r"blocks\.[12]"))
    assert [site.path for site in plan.routed_sites] == ["blocks.1", "blocks.2"]
    assert "left out by blocks=" in plan.sites[0].reason
    with pytest.raises(NoRoutableBlockError, match="left out by"):
        dcs.plan(Denoiser(), inputs(), dcs.DiffCRConfig(blocks="none"))


def test_frozen_ratios_are_uniform_mixture_of_depths():
    model = converted(initial_ratio=0.3, learn_ratios=False).train()
    counts = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    model(**inputs())
    counts.clear()
    model(**inputs())
    assert set(counts) == {7} and not dcs.ratio_table(model).requires_grad


def test_tokens_see_their_own_rotary_angles():
    """Each sample keeps other tokens, so a table shared by the batch is gathered sample by sample."""
    case = CASES["flux"]
    model = case.build(0)
    given = case.inputs(model, 3, 0, timesteps=torch.full((3,), 0.5))
    dcs.convert_(model, given, dcs.DiffCRConfig())
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.4)
        for router in model.diffcr.routers.values():
            nn.init.normal_(router.weight)
        together = output(model(**given))
        alone = torch.cat([output(model(**case.sample(given, i))) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "hunyuan", "pixart"])
@pytest.mark.parametrize("training", [False, True])
def test_inputs_shared_by_the_batch_are_told_from_samples(name, training):
    """As many samples as tokens and words: position ids and rotary tables have the batch's length, and are no samples."""
    case, size = CASES[name], Size(1, 3, 3)
    model = case.build(0, size=size).train(training)
    given = case.inputs(model, 3, 0, size=size)
    state = torch.get_rng_state()
    found = find_splitting(model, model.forward, bind_call(model.forward, (), given), 3)
    assert torch.equal(state, torch.get_rng_state())
    assert not found.refusal
    tables = {name for name in found.shared if not name.startswith("added_cond")}
    assert {name.split(".")[0] for name in tables} == {"flux": {"img_ids", "txt_ids"}, "hunyuan": {"image_rotary_emb"}, "pixart": set()}[
        name
    ]


def test_specialised_model_drops_what_decides_nothing():
    model = converted(ratio=0.5)
    with torch.no_grad():
        dcs.ratio_table(model)[0] = 0.0
    expected = model.eval()(**inputs())
    dcs.specialize_(model)
    assert list(model.diffcr.routers) == ["1"]
    assert torch.equal(model(**inputs()), expected)
    with pytest.raises(ConversionError, match="before specialize_"):
        dcs.save_adapter(model, "unused")


@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_working(training, ratio):
    model = converted(ratio=ratio).train(training)
    single = model(**inputs())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs())
    assert half.dtype == torch.bfloat16 and torch.allclose(single, half.float(), atol=0.1)


def test_specialised_at_bins_above_the_maximum_stays_there():
    """A highest ratio between bins is reached by some blocks at the bin above it, and that is what inference runs."""
    model = converted(bins=(0.0, 0.5), max_ratio=0.2, target_ratio=0.2, initial_ratio=0.2).eval()
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            nn.init.normal_(router.weight)
        wanted, ratios = model(**inputs()), model.diffcr.executed_ratios()
        assert float(ratios.max()) == 0.5
        dcs.specialize_(model)
        for _ in range(2):
            assert torch.equal(model(**inputs()), wanted)
            assert torch.equal(dcs.ratio_table(model), ratios) and torch.equal(model.diffcr.executed_ratios(), ratios)


def test_a_model_of_half_precision_can_be_saved(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model = converted(initial_ratio=0.3).to(dtype)
        dcs.save_adapter(model, tmp_path / str(dtype))
        loaded = dcs.load_adapter_(Denoiser(), tmp_path / str(dtype), inputs())
        assert torch.equal(dcs.ratio_table(loaded), dcs.ratio_table(model))


def test_a_timestep_told_to_a_wrapper_reaches_the_model_inside():
    model = converted(initial_ratio=0.5).eval()
    with torch.no_grad():
        dcs.ratio_table(model)[:, 1] = 0.0
        given = inputs()
        with dcs.at_timestep(model, 10.0):
            wanted = model(**given)
        with dcs.at_timestep(nn.Sequential(model), 10.0):
            got = model(**given)
        with dcs.at_timestep(model, 990.0):
            other = model(**given)
    assert torch.equal(got, wanted) and not torch.equal(other, wanted)


def test_converted_in_inference_mode_it_can_be_trained():
    model = Denoiser()
    with torch.inference_mode():
        converted(model, initial_ratio=0.5)
    model(**inputs()).square().mean().backward()
    assert dcs.ratio_table(model).grad.any()


def test_a_cast_model_keeps_a_gradient_that_fits_its_table():
    model = converted(initial_ratio=0.45)
    model(**inputs()).square().mean().backward()
    model.to(torch.bfloat16)
    assert dcs.ratio_table(model).grad.dtype == dcs.ratio_table(model).dtype == torch.float32


def test_an_input_may_be_shared_in_one_mixed_call_and_not_in_the_next():
    """How the first mixed call was cut says nothing of one whose inputs have other lengths."""

    class Conditioned(Denoiser):
        def forward(self, x, t, cond):
            return super().forward(x, t) + cond

    model, given = Conditioned(), inputs(3)
    dcs.convert_(model, {**given, "cond": torch.randn(1, 1, 3)}, dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000)))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(torch.tensor([[0.0, 0.5], [0.5, 0.0]]))
        for cond in (torch.randn(1, 1, 3), torch.randn(3, 1, 3)):
            alone = [model(given["x"][i : i + 1], given["t"][i : i + 1], cond[i % len(cond)][None]) for i in range(3)]
            assert torch.allclose(model.eval()(**given, cond=cond), torch.cat(alone), atol=1e-5)


def test_a_batch_that_is_no_numbers_does_not_forbid_the_next():
    model = small.converted(branches="boundary")
    with torch.no_grad():
        dcs.ratio_table(model)[:, 0] = 0.5
    good, broken = small.inputs(100.0, 900.0), small.inputs(100.0, 900.0)
    broken["x"] = broken["x"] * float("inf")
    with pytest.raises(TimestepError, match="no finite number"):
        model(**broken)
    assert model(**good).isfinite().all()
