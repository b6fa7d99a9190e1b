"""Tracing: recordings equal the model bit for bit, and never answer for a call they were not made for."""

import threading
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery import trace
from diffcr_surgery.errors import TraceError


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Root(nn.Module):
    """A model whose root forward is given by the test."""

    def __init__(self, forward):
        super().__init__()
        self.block = Block()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.cache = None
        self._forward = forward

    def forward(self, x, other=None):
        return self._forward(self, x, other)


def same(recorded, model, *args):
    expected, got = model(*args), recorded.run(*args)
    assert torch.equal(expected, got)


def x(batch=2, tokens=4, seed=0):
    return torch.randn(batch, tokens, 8, generator=torch.Generator().manual_seed(seed))


def test_loop_is_unrolled_into_one_node_a_block():
    def forward(self, x, other):
        for _ in range(3):
            x = self.block(x)
        return x

    model = Root(forward)
    recorded = trace(model, (x(),))
    assert [n.target for n in recorded.graph.nodes if n.op == "call_module"] == ["block"] * 3
    same(recorded, model, x(seed=1))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (1, 1)])
def test_another_shape_records_again_once(shape):
    model = Root(lambda self, x, other: self.block(x).reshape(x.shape[0] * x.shape[1], 8))
    recorded = trace(model, (x(),))
    for seed in range(3):
        same(recorded, model, x(*shape, seed=seed))
    assert len(recorded) == 2


def test_content_that_cannot_be_compared_is_refused_by_name():
    model = Root(lambda self, x, other: self.block(x) * float(np.from_dlpack(x.detach()).sum()))
    with pytest.raises(TraceError, match="__dlpack__"):
        trace(model, (x(),))


def test_control_flow_on_a_parameter_is_guarded():
    model = Root(lambda self, x, other: self.block(x) if self.scale > 0 else -x)
    recorded = trace(model, (x(),))
    with torch.no_grad():
        model.scale.neg_()
    same(recorded, model, x(seed=1))


def test_mode_and_plain_attributes_are_part_of_the_key():
    def forward(self, x, other):
        x = self.block(x)
        return x * 2 if self.training else x * getattr(self, "factor", 1)

    model = Root(forward).eval()
    recorded = trace(model, (x(),))
    same(recorded, model.train(), x(seed=1))
    model.eval().factor = 5
    same(recorded, model, x(seed=2))


def test_parameters_are_live():
    model = Root(lambda self, x, other: self.block(x) * self.scale)
    recorded = trace(model, (x(),))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    same(recorded, model, x(seed=1))


def test_warm_cache_keyed_by_content_is_refused():
    """The content is read past torch, so no guard can see it; the check on other inputs does."""
    cache: dict[bytes, torch.Tensor] = {}

    def forward(self, x, other):
        content = bytes(x.detach().untyped_storage())
        shift = torch.from_numpy(np.full(8, np.frombuffer(content, "f4").sum(), "f4"))
        return self.block(x) + cache.setdefault(content, shift)

    with pytest.raises(TraceError, match=r"does not reproduce it.*constant_0.*add"):
        trace(Root(forward), (x(),))


def test_an_input_is_no_suspect_whatever_its_name():
    class Named(Root):
        def forward(self, x, object_ids):
            return self.block(x) * object_ids + np.frombuffer(bytes(x.detach().untyped_storage()), "f4").sum()

    with pytest.raises(TraceError, match="does not reproduce it") as refusal:
        trace(Named(None), (x(), torch.ones(8)))
    assert "object_ids" not in str(refusal.value)


def test_warm_cache_keyed_by_shape_is_accepted():
    @lru_cache
    def table(tokens):
        return torch.linspace(0, 1, tokens * 8).reshape(tokens, 8)

    model = Root(lambda self, x, other: self.block(x) + table(x.shape[1]))
    model(x())
    recorded = trace(model, (x(),))
    same(recorded, model, x(seed=1))
    same(recorded, model, x(tokens=6, seed=1))


def test_constant_table_from_numpy_is_accepted():
    model = Root(lambda self, x, other: self.block(x) + torch.from_numpy(np.linspace(0, 1, x.shape[1] * 8, dtype="f4")).reshape(-1, 8))
    recorded = trace(model, (x(),))
    same(recorded, model, x(seed=1))
    same(recorded, model, x(tokens=7, seed=1))


def test_in_place_writes_at_the_root_keep_their_order():
    def forward(self, x, other):
        x = x.clone()
        view = x[:, :1]
        view.add_(1)
        x = self.block(x)
        x += view
        x[:, 1:] = x[:, 1:] * 2
        return x

    model = Root(forward)
    same(trace(model, (x(),)), model, x(seed=1))


def test_module_inside_a_block_may_be_called_from_outside():
    model = Root(lambda self, x, other: self.block.norm(self.block(x)))
    same(trace(model, (x(),)), model, x(seed=1))


def test_outputs_keep_their_structure():
    model = Root(lambda self, x, other: {"a": [self.block(x), None], "b": (x.sum(), 3)})
    recorded = trace(model, (x(),))
    out = recorded.run(x(seed=1))
    expected = model(x(seed=1))
    assert out.keys() == expected.keys() and out["a"][1] is None and out["b"][1] == 3
    assert torch.equal(out["a"][0], expected["a"][0]) and torch.equal(out["b"][0], expected["b"][0])


def test_inputs_may_be_one_tensor_twice():
    model = Root(lambda self, x, other: self.block(x) + other)
    a, b = x(), x(seed=1)
    recorded = trace(model, (a, a))
    same(recorded, model, b, b)
    same(recorded, model, a, b)


def test_recording_leaves_no_trace_in_the_model():
    model = Root(lambda self, x, other: torch.nn.functional.dropout(self.block(x), 0.5, self.training)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, (x(),))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_draws_the_same_numbers():
    model = Root(lambda self, x, other: torch.nn.functional.dropout(self.block(x), 0.5, self.training)).train()
    recorded = trace(model, (x(),))
    torch.manual_seed(3)
    expected = model(x(seed=1))
    torch.manual_seed(3)
    assert torch.equal(expected, recorded.run(x(seed=1)))


def test_an_exception_midway_removes_the_hooks():
    def forward(self, x, other):
        self.block(x)
        raise ZeroDivisionError

    model = Root(forward)
    with pytest.raises(TraceError, match="ZeroDivisionError on the example inputs") as raised:
        trace(model, (x(),))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_threads_run_undisturbed_while_one_records():
    model = Root(lambda self, x, other: self.block(x) * 2).eval()
    stop, wrong = threading.Event(), []
    with torch.no_grad():
        expected = model(x(seed=5))

    @torch.no_grad()
    def run():
        while not stop.is_set():
            if not torch.equal(model(x(seed=5)), expected):
                wrong.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for tokens in range(2, 12):
            recorded = trace(model, (x(tokens=tokens),))
            assert [n.target for n in recorded.graph.nodes if n.op == "call_module"] == ["block"]
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_graph_keeps_no_activation_alive():
    import gc
    import weakref

    made = []

    def forward(self, x, other):
        y = self.block(x) + 1
        made.append(weakref.ref(y))
        return y * 2

    recorded = trace(Root(forward), (x(),))
    gc.collect()
    assert made and all(ref() is None for ref in made)
    assert recorded.graph


def test_a_trace_that_runs_lets_go_of_what_only_a_proof_needs():
    recorded = trace(Root(lambda self, x, other: self.block(x)), (x(),))
    assert recorded.recording.samples and recorded.recording.flow
    recorded.run(x())
    assert not recorded.recording.samples and recorded.recording.flow is None


@pytest.mark.parametrize(
    ("inputs", "text"),
    [((), "do not fit"), ({"y": torch.ones(1)}, "do not fit"), (None, "NoneType"), ((1, 2), "hold no tensor")],
)
def test_wrong_inputs_are_named(inputs, text):
    with pytest.raises(TraceError, match=text):
        trace(Root(lambda self, x, other: x), inputs)


class Shared(Block):
    """Takes a table indexed by token, or none."""

    def forward(self, x, table=None):
        return super().forward(x if table is None else x * table)


@pytest.mark.parametrize("with_table", [(True, False), (False, True)], ids=["first", "second"])
def test_a_block_that_comes_round_with_and_without_a_table_is_proven_for_each(with_table):
    def forward(self, x, other):
        for given in with_table:
            x = self.block(x, other) if given else self.block(x)
        return x

    model = Root(forward)
    model.block.__class__ = Shared
    example = (x(), torch.randn(4, 8))
    samples = trace(model, example).recording.samples.values()
    assert [len(sample.args) for sample in samples] == [2 if given else 1 for given in with_table]
    axes = [set(site.aligned) for site in dcs.plan(model, example).routed_sites]
    assert axes == [{"x", "table"} if given else {"x"} for given in with_table]


def test_a_model_that_writes_into_its_input_leaves_the_examples_alone():
    model, example, given = Root(lambda self, x, other: self.block(x.mul_(2))), (x(),), x()
    wanted = model(x())
    dcs.convert_(model, example)
    assert torch.equal(example[0], x())
    assert torch.equal(model(given), wanted) and torch.equal(given, 2 * x())
