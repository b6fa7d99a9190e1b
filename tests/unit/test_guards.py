"""Traps: changes after which a naive recording gives a wrong answer, or none. Ours records anew, or refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from diffcr_surgery import trace
from diffcr_surgery.trace import Trace
from diffcr_surgery.trace.builder import expect
from diffcr_surgery.trace.key import bind_call
from diffcr_surgery.trace.recording import compile_graph
from tests.unit.test_trace import Block

WIDTH = 8


class Select(nn.Module):
    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return x[which]


class Model(nn.Module):
    """A root forward from the test, around a block."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.select, self.how = Block(WIDTH), Select(), forward
        self.cache: Any = None
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Any, other: Any = None) -> Any:
        return self.how(self, x, other)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Trap:
    """A root forward, the call it is recorded on, and the call, or the change of the model, that comes after.

    Attributes:
        forward: `(model, x, other) -> output`.
        first: The recorded arguments.
        then: The arguments after.
        change: What is done to the model in between.
        records: Recordings there are in the end.
    """

    forward: Callable[..., Any]
    first: tuple[Any, ...] = (draw(2, 4, WIDTH),)
    then: tuple[Any, ...] = (draw(2, 4, WIDTH, seed=1),)
    change: Callable[[Model], Any] = field(default=lambda model: None)
    records: int = 2


def _positions(model: Model, x: Tensor, _: Any) -> Tensor:
    return model.block(x + torch.arange(x.shape[1])[:, None] / x.shape[1])


def _batch_of_ids(model: Model, x: Tensor, _: Any) -> Tensor:
    return model.block(x) + torch.arange(len(x))[:, None, None]


def _text_first(model: Model, x: Tensor, text: Tensor) -> Tensor:
    return model.block(torch.cat([text, x], 1))[:, text.shape[1] :]


def _list(model: Model, x: list[Tensor], _: Any) -> Tensor:
    return model.block(torch.cat(x, 1)) / len(x)


def _mode(model: Model, x: Tensor, _: Any) -> Tensor:
    return model.block(x) * (2.0 if model.training else 3.0)


def _dtype(model: Model, x: Tensor, _: Any) -> Tensor:
    wanted = model.block.norm.weight.dtype
    return model.block(x.to(wanted)) * torch.finfo(wanted).bits


def _rope(model: Model, x: Tensor, _: Any) -> Tensor:
    x = model.block(x)
    if x.shape[1] not in model.tables:
        model.tables[x.shape[1]] = torch.linspace(0, 1, x.shape[1])[:, None]
    return x * model.tables[x.shape[1]]


def _exchanged(model: Model, x: Tensor, _: Any) -> Tensor:
    return model.block(x) * model.cache


def _warm(model: Model) -> Model:
    model.cache = torch.tensor(2.0)
    return model


@lru_cache(maxsize=1)
def _scale(dtype: torch.dtype) -> Tensor:
    return torch.tensor(torch.finfo(dtype).bits / 8.0)


def _reads(read: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda model, x, other: model.block(x) * read(other)


def _read(read: Callable[[Tensor], Any], first: Any, then: Any) -> Trap:
    return Trap(_reads(read), (draw(2, 4, WIDTH), torch.tensor(first)), (draw(2, 4, WIDTH, seed=1), torch.tensor(then)))


def _written(write: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> Tensor:
    buffer = torch.zeros(3, dtype=dtype)
    write(buffer)
    return buffer


def _view_of_written(value: Tensor) -> Tensor:
    buffer = torch.zeros(3)
    view = buffer[:2]
    buffer[0] = value
    return view


TRAPS = {
    "resolution": Trap(_positions, then=(draw(2, 6, WIDTH, seed=1),)),
    "batch": Trap(_batch_of_ids, then=(draw(3, 4, WIDTH, seed=1),)),
    "text length": Trap(_text_first, (draw(2, 4, WIDTH), draw(2, 3, WIDTH)), (draw(2, 4, WIDTH), draw(2, 5, WIDTH))),
    "list length": Trap(_list, ([draw(2, 4, WIDTH)] * 2,), ([draw(2, 4, WIDTH, seed=1)] * 3,)),
    "a list of distinct tensors": Trap(_list, ([draw(2, 4, WIDTH)] * 2,), ([draw(2, 4, WIDTH, seed=i) for i in range(2)],)),
    "eval after train": Trap(_mode, change=lambda model: model.eval()),
    "bfloat16 at the root": Trap(_dtype, change=lambda model: model.to(torch.bfloat16)),
    "item": _read(lambda t: t.item(), 2.0, 5.0),
    "int": _read(lambda t: int(t), 2.0, 5.0),
    "float": _read(lambda t: float(t), 2.0, 5.0),
    "tolist": _read(lambda t: sum(t.tolist()), [1, 2], [3, 4]),
    "bool": _read(lambda t: 5.0 if t > 2 else -5.0, 1.0, 3.0),
    "len of what a mask selects": _read(lambda t: len(t.nonzero()), [True, False, True], [True, False, False]),
    "range": _read(lambda t: float(sum(range(t))), 3, 5),
    "numpy": _read(lambda t: float(np.square(t.numpy()).sum()), [1.0, 2.0], [3.0, 2.0]),
    "array": _read(lambda t: float(np.asarray(t).sum()), [1.0, 2.0], [3.0, 2.0]),
    "equal": _read(lambda t: 7.0 if torch.equal(t, torch.tensor(2.0)) else -7.0, 2.0, 5.0),
    "control flow on a mask's content": _read(lambda t: 1.0 if t.all() else 0.5, [True, True], [True, False]),
    "an arange that ends at a tensor": _read(lambda t: torch.arange(t).shape[0], 3, 5),
    "a slice that ends at a tensor": _read(lambda t: torch.zeros(9)[:t].numel(), 3, 5),
    "what a mask takes out": _read(lambda t: torch.zeros(3)[t].shape[0], [True, True, True], [True, False, True]),
    "repeats": _read(lambda t: torch.zeros(2).repeat_interleave(t).shape[0], [1, 2], [2, 3]),
    "a mask inside a submodule": Trap(
        lambda model, x, other: model.block(x) * model.select(x, other).shape[0],
        (draw(2, 4, WIDTH), torch.tensor([True, True])),
        (draw(2, 4, WIDTH, seed=1), torch.tensor([True, False])),
    ),
    "the largest entry after one was written": _read(lambda t: _written(lambda b: b.__setitem__(0, t)).max().item(), 2.0, 5.0),
    "the largest entry after a view was written": _read(lambda t: _written(lambda b: b[1:].copy_(t)).max().item(), 2.0, 5.0),
    "a view made before the write": _read(lambda t: _view_of_written(t).max().item(), 2.0, 5.0),
    "the largest entry of what an output went to": _read(lambda t: _written(lambda b: torch.add(t, 1, out=b[0])).max().item(), 2.0, 5.0),
    "what a mask with a part written takes out": _read(
        lambda t: torch.zeros(3)[_written(lambda b: b[1:].copy_(t), torch.bool)].shape[0], [True, True], [True, False]
    ),
    "unique values": _read(lambda t: float(t.unique().numel()), [1, 1, 2], [1, 2, 3]),
    "a plain argument": Trap(lambda model, x, other: model.block(x) * other, (draw(2, 4, WIDTH), 2.0), (draw(2, 4, WIDTH), 3.0)),
    "none instead of a tensor": Trap(
        lambda model, x, other: model.block(x) if other is None else model.block(x) + other,
        (draw(2, 4, WIDTH), draw(2, 4, WIDTH)),
        (draw(2, 4, WIDTH), None),
    ),
    "a table in the model's own cache": Trap(_rope, then=(draw(2, 6, WIDTH, seed=1),)),
    "a cache that is exchanged": Trap(_exchanged, change=lambda model: setattr(model, "cache", torch.tensor(7.0))),
    "an lru_cache keyed by dtype": Trap(
        lambda model, x, other: model.block(x.float()) * _scale(x.dtype), then=(draw(2, 4, WIDTH, seed=1).double(),)
    ),
}


def naive(recorded: Trace, model: nn.Module, args: tuple[Any, ...]) -> Any:
    """What the first graph answers if no key and no guard stops it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(recorded.graph, {}))
    for node in graph.find_nodes(op="call_function", target=expect):
        graph.erase_node(node)
    return recorded.recording.execute(compile_graph(graph), model, bind_call(model.forward, args, {}).tensors)


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_ours_records_anew_where_the_naive_recording_is_wrong(trap: Trap) -> None:
    model = _warm(Model(trap.forward))
    recorded = trace(model, trap.first)
    assert torch.equal(recorded.run(*trap.first), model(*trap.first))
    trap.change(model)
    wanted = model(*trap.then)
    try:
        wrong = naive(recorded, model, trap.then)
    except Exception:  # shapes that do not fit, as a rule
        wrong = None
    assert wrong is None or wrong.shape != wanted.shape or wrong.dtype != wanted.dtype or not torch.equal(wrong, wanted)
    for args in (trap.then, trap.then, trap.first):
        wanted, got = model(*args), recorded.run(*args)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)
        assert len(recorded) == trap.records


@pytest.mark.parametrize("read", [lambda t: t[0].item(), lambda t: t.tolist()[0], lambda t: t.numpy()[0]], ids=["item", "tolist", "numpy"])
def test_nan_read_out_of_a_tensor_is_the_same_as_before(read: Callable[[Tensor], float]) -> None:
    model = Model(lambda model, x, other: model.block(x) * (2.0 if np.isnan(read(other)) else 3.0))
    x, broken, sound = draw(2, 4, WIDTH), torch.tensor([float("nan"), 1.0]), torch.tensor([4.0, 1.0])
    recorded = trace(model, (x, broken))
    for other, records in ((broken, 1), (sound, 2), (broken, 2)):
        assert torch.equal(recorded.run(x, other), model(x, other))
        assert len(recorded) == records


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64], ids=str)
def test_a_mask_whose_type_is_changed_is_no_constant(dtype: torch.dtype) -> None:
    model = Model(lambda model, x, other: model.block(x) * other.type(x.dtype)[:, None])
    recorded = trace(model, (draw(2, 4, WIDTH), torch.tensor([1, 1, 0, 1]).to(dtype)))
    call = draw(2, 4, WIDTH, seed=1), torch.tensor([0, 1, 1, 1]).to(dtype)
    assert torch.equal(recorded.run(*call), model(*call))
    assert len(recorded) == 1


def test_other_strides_are_made_contiguous_where_the_model_makes_them() -> None:
    model = Model(lambda model, x, other: model.block(x.contiguous().view(-1, WIDTH)[None]))
    recorded = trace(model, (draw(2, 4, WIDTH),))
    turned = draw(2, WIDTH, 4, seed=1).transpose(1, 2)
    assert torch.equal(recorded.run(turned), model(turned))
    assert len(recorded) == 1


def test_control_flow_on_strides_is_guarded() -> None:
    model = Model(lambda model, x, other: model.block(x) if x.is_contiguous() else -model.block(x) * x.stride(1))
    recorded = trace(model, (draw(2, 4, WIDTH),))
    for shape in ((2, 4, WIDTH), (2, WIDTH, 4)):
        x = draw(*shape, seed=1)
        x = x if shape[-1] == WIDTH else x.transpose(1, 2)
        assert torch.equal(recorded.run(x), model(x))
