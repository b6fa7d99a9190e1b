"""The key of a recording: whatever the model's forward may have read is in it, or is refused by name."""

import copy
import random
from collections import OrderedDict
from enum import Enum, IntEnum

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery import trace
from diffcr_surgery._tree import map_leaves
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace import recording
from diffcr_surgery.trace.key import copies, device_of, model_device
from diffcr_surgery.trace.recording import MAX_VARIANTS


class Scale(nn.Module):
    """One leaf, and a root forward given by the test."""

    def __init__(self, forward):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self._forward = forward

    def forward(self, x, other=None):
        return self._forward(self, self.inner(x), other)


def x(seed=0):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def same(recorded, model, *args):
    assert torch.equal(model(*args), recorded.run(*args))


# --- arguments -------------------------------------------------------------------------------------------------------
class Holder:
    """No container that is walked."""

    def __init__(self, **values):
        vars(self).update(values)


@pytest.mark.parametrize(
    "held", [torch.ones(4), {"deep": [torch.ones(4)]}, Holder(inner=Holder(table=torch.ones(4)))], ids=["attribute", "dict", "object"]
)
def test_an_argument_object_that_hides_a_tensor_is_refused_by_name(held):
    model = Scale(lambda self, x, other: x * 2)
    with pytest.raises(TraceError, match=r"'other\.mine' is a \S+\.Holder, .* holds a tensor .* argument of its own"):
        trace(model, (x(), {"mine": Holder(held=held)}))


def test_plain_attributes_of_an_argument_object_are_part_of_the_key():
    model = Scale(lambda self, x, other: x * other.factor)
    holder = Holder(factor=2.0)
    recorded = trace(model, (x(), holder))
    same(recorded, model, x(1), holder)
    assert len(recorded) == 1
    holder.factor = 3.0
    same(recorded, model, x(1), holder)


def test_whether_an_input_requires_a_gradient_is_part_of_the_key():
    model = Scale(lambda self, x, other: x * (2 if other.requires_grad else 3))
    recorded = trace(model, (x(), x(1)))
    same(recorded, model, x(2), x(1).requires_grad_())
    same(recorded, model, x(2), x(1))
    assert len(recorded) == 2


# --- attributes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["factors", "_factors"])
@pytest.mark.parametrize("other", [5.0, (5.0,), [5.0], {"a": 5.0}, {"a": [(5.0,)]}, OrderedDict(a=5.0)], ids=repr)
def test_plain_attributes_and_small_containers_of_them_are_part_of_the_key(name, other):
    model = Scale(lambda self, x, _: x * flatten_sum(getattr(self, name)))
    setattr(model, name, 2.0)
    recorded, other = trace(model, (x(),)), copy.deepcopy(other)
    same(recorded, model, x(1))
    setattr(model, name, other)
    same(recorded, model, x(1))
    if isinstance(other, list):
        other[0] = 7.0
        same(recorded, model, x(1))
    assert len(recorded) == (3 if isinstance(other, list) else 2)


class Mode(Enum):
    PLAIN = 1.0
    LOUD = 5.0


class Skips(IntEnum):
    NONE = 0
    SOME = 1


@pytest.mark.parametrize(
    ("value", "other", "factor"),
    [
        ({1.0}, {5.0}, sum),
        (frozenset({1.0}), frozenset({2.0, 3.0}), sum),
        (Mode.PLAIN, Mode.LOUD, lambda mode: mode.value),
        ((Mode.PLAIN, 2.0), (Mode.LOUD, 2.0), lambda pair: pair[0].value * pair[1]),
        (Skips.NONE, Skips.SOME, lambda skips: 1.0 + skips),
        (np.float32(1.0), np.float32(5.0), float),
        (np.float64(1.0), np.float64(5.0), float),
        (np.bool_(True), np.bool_(False), lambda flag: 1.0 if flag else 5.0),
        (np.array([1.0, 2.0]), np.array([1.0, 5.0]), lambda array: float(array.sum())),
        (b"1", b"5", float),
        (Holder(scale=1.0), Holder(scale=5.0), lambda config: config.scale),
        (Holder(flags={"loud"}), Holder(flags=set()), lambda config: 1.0 + len(config.flags)),
    ],
    ids=lambda value: "" if callable(value) else type(value).__name__,
)
def test_whatever_else_may_be_a_setting_is_part_of_the_key(value, other, factor):
    model = Scale(lambda self, x, _: x * factor(self.setting))
    model.setting = value
    recorded = trace(model, (x(),))
    same(recorded, model, x(1))
    model.setting = copy.deepcopy(value)
    same(recorded, model, x(1))
    assert len(recorded) == 1, "an equal one is the same"
    model.setting = other
    same(recorded, model, x(1))
    assert len(recorded) == 2


def test_a_set_and_an_object_may_be_changed_in_place():
    model = Scale(lambda self, x, _: x * (2.0 if 3 in self.skip else 1.0) * self.config.scale)
    model.skip, model.config = set(), Holder(scale=1.0)
    recorded = trace(model, (x(),))
    model.skip.add(3)
    same(recorded, model, x(1))
    model.config.scale = 4.0
    same(recorded, model, x(1))
    model.skip.clear()
    same(recorded, model, x(1))


def test_a_set_is_as_it_was_after_recording():
    def forward(self, x, other):
        self.seen.add(x.shape[1])
        return x * len(self.seen)

    model = Scale(forward)
    model.seen = {0, 3}
    seen = model.seen
    trace(model, (x(),))
    assert model.seen is seen and seen == {0, 3}


def test_a_number_that_is_another_at_every_call_is_warned_of(monkeypatch):
    monkeypatch.setattr(recording, "MAX_RECORDINGS", 3)
    model = Scale(lambda self, x, other: x * other)
    recorded = trace(model, (x(), 0.0))
    for number in (1.0, 2.0):
        same(recorded, model, x(1), number)
    with pytest.warns(UserWarning, match=r"Scale is recorded anew .* 'other', .* Give it as a tensor"):
        same(recorded, model, x(1), 3.0)
    assert len(recorded) == 3
    same(recorded, model, x(1)[:1], 3.0)  # another shape puts one out as well, and is no reason to warn


def test_an_array_as_an_argument_counts_with_its_content():
    model = Scale(lambda self, x, other: x * float(other.sum()))
    recorded, array = trace(model, (x(), np.ones(3))), np.ones(3)
    same(recorded, model, x(1), array)
    assert len(recorded) == 1, "another array with the same numbers"
    array[0] = 5.0
    same(recorded, model, x(1), array)
    assert len(recorded) == 2


def flatten_sum(tree):
    found = []
    map_leaves(tree, lambda _, leaf: found.append(leaf))
    return sum(found)


def test_one_true_and_one_point_zero_are_three_values():
    model = Scale(lambda self, x, other: x.long() * self.factor)
    model.factor = 1
    recorded = trace(model, (x(),))
    for factor in (1.0, True, 1):
        model.factor = factor
        assert recorded.run(x()).dtype == model(x()).dtype


def test_a_dict_that_fills_up_does_not_record_anew():
    """It holds tensors: a cache of the model's own."""

    def forward(self, x, other):
        key = torch.is_grad_enabled()
        if key not in self.tables:
            self.tables[key] = torch.linspace(0, 1, 4)
        return x + self.tables[key]

    model = Scale(forward)
    model.tables = {}
    recorded = trace(model, (x(),))
    with torch.no_grad():
        same(recorded, model, x(1))
    same(recorded, model, x(1))
    assert len(recorded) == 2


def test_attributes_are_as_they_were_after_recording():
    def forward(self, x, other):
        self.size, self.seen[0] = x.shape[1], x.shape[1]
        return x * self.size * self.seen[0]

    model = Scale(forward)
    model.size, model.seen = 1, [1]
    trace(model, (x(),))
    assert model.size == 1 and model.seen == [1]


def test_a_forward_that_remembers_its_last_shape_is_recorded_once_for_each():
    def forward(self, x, other):
        self.size = x.shape[0]
        return x * self.size

    model = Scale(forward)
    model.size = 0
    recorded = trace(model, (x(),))
    for _ in range(2):
        for batch in (1, 2):
            assert torch.equal(recorded.run(x()[:batch]), batch * model.inner(x()[:batch]))
    assert len(recorded) == 2


def counts(self, x, other):
    self.step += 1
    return x * 2


def counts_in_a_list(self, x, other):
    self.steps.append(len(self.steps))
    return x * 2


def counts_from_nothing(self, x, other):
    self.late = getattr(self, "late", 0) + 1
    return x * 2


@pytest.mark.parametrize(("forward", "name"), [(counts, "step"), (counts_in_a_list, "steps"), (counts_from_nothing, "late")])
def test_a_forward_that_counts_is_refused_by_name(forward, name):
    model = Scale(forward)
    model.step, model.steps = 0, []
    with pytest.raises(TraceError, match=rf"sets Scale\.{name} anew in every run.*submodule"):
        trace(model, (x(),))
    assert model.step == 0 and model.steps == []


def test_what_only_the_first_run_does_is_refused():
    def forward(self, x, other):
        first, self.first = self.first, False
        return x * 2 if first else x

    model = Scale(forward)
    model.first = True
    with pytest.raises(TraceError, match="does not reproduce it"):
        trace(model, (x(),))
    assert model.first


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


def test_a_submodule_may_count_and_is_not_run_ahead():
    model = Scale(lambda self, x, other: x * 2)
    model.inner = Counting(4, 4)
    model.inner.calls = 3
    recorded = trace(model, (x(),))
    assert model.inner.calls == 3
    first = recorded.run(x())
    model.inner.calls = 3
    assert torch.equal(first, model(x())) and model.inner.calls == 4 and len(recorded) == 1


# --- randomness that is not torch's ----------------------------------------------------------------------------------
@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_randomness_that_no_recording_can_draw_anew_is_refused_and_put_back(draw):
    model = Scale(lambda self, x, other: x * 2 if draw() < 0.3 else x)
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    with pytest.raises(TraceError, match=r"draws from (random|numpy\.random).*torch\.rand.*submodule"):
        trace(model, (x(),))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])


class Drawing(nn.Linear):
    def forward(self, x):
        return super().forward(x) * random.random() * np.random.rand()


def test_a_submodule_may_draw_from_anywhere():
    model = Scale(lambda self, x, other: x * 2)
    model.inner = Drawing(4, 4)
    recorded = trace(model, (x(),))
    outputs = []
    for run in (model, recorded.run):
        random.seed(1)
        np.random.seed(1)
        outputs.append(run(x()))
    assert torch.equal(*outputs)


# --- a forward that writes into its input ----------------------------------------------------------------------------
def test_a_forward_that_writes_into_its_input_is_recorded_and_the_example_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, other):
            x += 1
            other[0] = 0.5
            return self.inner(x) * other

    model, example = Model(), (x(), x(1))
    recorded = trace(model, example)
    assert torch.equal(example[0], x()) and torch.equal(example[1], x(1))
    for _ in range(2):
        given, wanted = (x(2), x(3)), (x(2), x(3))
        assert torch.equal(recorded.run(*given), model(*wanted))
        assert all(map(torch.equal, given, wanted))
    assert len(recorded) == 1


def test_a_forward_that_writes_into_its_input_and_reads_values_is_refused_by_name():
    """A guard that stops a run would leave the input half written for the next one."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, other):
            x += 1
            return self.inner(x) * float(other)

    with pytest.raises(TraceError, match=r"writes into its input 'x'.*clone"):
        trace(Model(), (x(), torch.tensor(2.0)))


@pytest.mark.parametrize(
    "given",
    [
        x()[:, ::2],
        x().transpose(1, 2).contiguous().transpose(1, 2),
        x()[:1].expand(2, 3, 4),
        (x().requires_grad_() * 2)[:, 1:],
        x()[:0],
        x(),
        x().requires_grad_(),
        x().requires_grad_() + 1,
    ],
    ids=["slice", "transposed", "expanded", "slice of a result", "empty", "plain", "leaf", "result"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_copies_are_alike_in_all_that_a_forward_can_see(given, grad):
    with torch.set_grad_enabled(grad):
        first, second = copies([given, given])
    assert first is second and first is not given and torch.equal(first, given)
    assert (first.stride(), first.dtype, first.requires_grad, first.is_leaf) == (
        given.stride(), given.dtype, given.requires_grad, given.is_leaf
    )  # fmt: skip
    before = given.detach().clone()
    if 0 in given.stride() or (given.is_leaf and given.requires_grad):
        with pytest.raises(RuntimeError, match=r"memory location|leaf"):
            first += 1
    else:
        first += 1
    assert torch.equal(given, before)


# --- devices ---------------------------------------------------------------------------------------------------------
def test_a_model_computes_where_its_first_tensor_off_the_cpu_is():
    here, there = torch.ones(1), torch.ones(1, device="meta")
    assert device_of([here, there]).type == "meta"
    assert device_of([]).type == device_of([here]).type == "cpu"
    assert model_device(nn.Linear(1, 1), [here, there]).type == "meta"
    assert model_device(nn.Linear(1, 1, device="meta"), [here]).type == "meta"
    assert model_device(nn.Linear(1, 1), []).type == "cpu"


@pytest.mark.gpu
def test_autocast_and_random_state_of_the_gpu_count_whichever_input_comes_first():
    def forward(self, x, other):
        return torch.nn.functional.dropout(x, 0.5, True)

    model = Scale(forward).cuda()
    model.forward = lambda t, x: Scale.forward(model, x) * t.item()
    recorded, given = trace(model, (torch.tensor(2.0), x().cuda())), (torch.tensor(2.0), x(1).cuda())
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            torch.cuda.manual_seed(0)
            wanted = model(*given)
            torch.cuda.manual_seed(0)
            assert torch.equal(recorded.run(*given), wanted)


# --- what capture_inputs collects ------------------------------------------------------------------------------------
class Variadic(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.forward = forward.__get__(self)


FORWARDS = {
    "all": lambda self, *args, **kwargs: self.block(args[0]) * kwargs["scale"],
    "after others": lambda self, x, *rest, scale: self.block(x + rest[0]) * scale,
    "positional only": lambda self, x, /, scale=1.0: self.block(x) * scale,
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_what_was_captured_can_be_planned_with(kind):
    model = Variadic(FORWARDS[kind]).eval()
    tokens = torch.randn(2, 6, 8)
    with dcs.capture_inputs(model) as seen:
        wanted = model(tokens, tokens[:1], scale=2.0) if kind == "after others" else model(tokens, scale=2.0)
    assert len(dcs.plan(model, seen.inputs).routed_sites) == 1
    recorded = trace(model, seen.inputs)
    assert torch.equal(recorded.run(*recorded.call.args, **recorded.call.kwargs), wanted)


def test_training_that_another_thread_switches_meanwhile_stays_switched():
    class Switched(nn.Sequential):
        """Switched off in the midst of its first run, as by another thread."""

        def forward(self, x):
            for layer in self:
                layer.eval()
            return super().forward(x)

    model = Switched(nn.Linear(4, 4), nn.GELU()).train()
    dcs.trace(model, (torch.randn(2, 4),))
    assert model.training and not any(layer.training for layer in model)


def test_random_numbers_that_another_thread_draws_meanwhile_are_none_of_the_forward():
    class Disturbed(nn.Linear):
        """Every run finds the generator moved on by another number of draws, as no forward of its own would."""

        runs = 0

        def forward(self, x):
            Disturbed.runs += 1
            for _ in range(Disturbed.runs):
                random.random()
            return torch.tanh(super().forward(x))

    dcs.trace(nn.Sequential(Disturbed(4, 4)), (torch.randn(2, 4),))


def test_settings_that_allow_no_update_are_put_back():
    class Registering(nn.Linear):
        def forward(self, x):
            self.config = FrozenDict(calls=len(getattr(self, "config", ())) + 1)
            return super().forward(x)

    model = nn.Sequential(Registering(4, 4), nn.GELU())
    model[0].config = FrozenDict(calls=0)
    dcs.trace(model, (torch.randn(2, 4),))
    assert model[0].config == FrozenDict(calls=0)


def test_a_setting_that_changes_at_every_call_is_warned_of():
    """It cannot be told from a switch, so that each call is recorded anew, which takes many times as long."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4)
    recorded = dcs.trace(model, (x,))
    for step in range(MAX_VARIANTS - 1):
        model._metrics = {"loss": 0.1 * step}
        recorded.run(x)
    model._metrics = {"loss": -1.0}
    with pytest.warns(UserWarning, match="Sequential._metrics: changed from call to call"):
        recorded.run(x)
    assert len(recorded) == MAX_VARIANTS
