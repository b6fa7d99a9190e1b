"""Cutting calls into samples and joining what comes out; which inputs are samples, told by running the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcr_surgery.errors import TimestepError
from diffcr_surgery.samples import find_splitting
from diffcr_surgery.split import Splitting, join, refused, select
from diffcr_surgery.trace.key import Call, bind_call


def call_of(**kwargs: Any) -> Call:
    signature = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs])
    return bind_call(signature, (), kwargs)


def cut(rows: list[int], shared: frozenset[str] = frozenset(), batch: int = 3, **kwargs: Any) -> dict[str, Any]:
    return select(call_of(**kwargs), rows, batch, shared).kwargs


X = torch.arange(12.0).reshape(3, 4)


# --- select ----------------------------------------------------------------------------------------------------------
def test_rows_and_entries_are_picked_in_order() -> None:
    found = cut([2, 0], x=X, prompts=["a", "b", "c"], sizes=[[1, 2], [3, 4], [5, 6]], scale=2.0, name="abc")
    assert torch.equal(found.pop("x"), X[[2, 0]])
    assert found == {"prompts": ["c", "a"], "sizes": [[5, 6], [1, 2]], "scale": 2.0, "name": "abc"}


def test_lists_are_cut_wherever_they_hang() -> None:
    images = [X[0], X[1], X[2]]
    found = cut([1], x=X, more={"images": images, "pair": (images, X)}, layers=[X, X])
    assert found["more"]["images"] == found["more"]["pair"][0] == [images[1]]
    assert torch.equal(found["more"]["pair"][1], X[1:2])
    assert [layer.shape for layer in found["layers"]] == [(1, 4)] * 2


def test_entries_of_a_list_of_samples_stay_whole() -> None:
    """An entry belongs to its sample, whatever its length."""
    entries = [[X, "text"], [X, "of"], [X, "three"]]
    assert cut([1], x=X, entries=entries)["entries"][0][0] is X


def test_tuples_and_dicts_are_no_samples() -> None:
    shape, names = (8, 8, 8), {"a": 1, "b": 2, "c": 3}
    assert cut([1], x=X, shape=shape, names=names)["shape"] == shape
    assert cut([1], x=X, shape=shape, names=names)["names"] == names


def test_what_is_shared_stays() -> None:
    ids = torch.arange(3)
    found = cut([0], frozenset({"ids", "layers", "parts"}), x=X, ids=ids, layers=[X, X + 1, X + 2], parts=[1, 2, 2])
    assert found["ids"] is ids and found["parts"] == [1, 2, 2]
    assert [layer.shape for layer in found["layers"]] == [(1, 4)] * 3  # the list is shared, its tensors have rows of samples


def test_a_tensor_under_two_names_stays_one() -> None:
    call = select(call_of(x=X, y=X, z=[X]), [1], 3, frozenset())
    assert call.kwargs["x"] is call.kwargs["y"] is call.kwargs["z"][0] is call.arguments["x"]
    assert call.paths == ["x", "y", "z.0"] and all(t is call.kwargs["x"] for t in call.tensors)


def test_positional_and_keyword_parts_are_cut_alike() -> None:
    call = bind_call(inspect.signature(lambda x, *rest, t: None), (X, [X[0], X[1], X[2]], ["a", "b", "c"]), {"t": torch.arange(3)})
    part = select(call, [0, 2], 3, frozenset())
    x, images, words = part.args
    assert (x.shape, len(images), words, part.kwargs["t"].tolist()) == ((2, 4), 2, ["a", "c"], [0, 2])
    assert {id(t) for t in part.tensors} == {id(t) for t in (x, *images, part.kwargs["t"])}


def test_the_original_call_is_as_before() -> None:
    images = [X[0], X[1], X[2]]
    call = call_of(x=X, images=images)
    select(call, [1], 3, frozenset())
    assert call.kwargs["images"] is images and len(images) == 3 and len(call.tensors) == 4


def test_gradients_pass_rows_and_entries() -> None:
    x, image = X.clone().requires_grad_(), torch.ones(2, requires_grad=True)
    found = cut([2], x=x, images=[image, image, image])
    (found["x"].sum() + found["images"][0].sum()).backward()
    assert x.grad is not None and x.grad.sum(1).tolist() == [0, 0, 4] and image.grad is not None


@pytest.mark.parametrize("given", [{"x": X.T, "t": torch.arange(3)}, {"x": (X[0], X[1]), "names": ["a", "b", "c"]}])
def test_a_call_with_nothing_to_cut_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(
        TimestepError, match=r"several timestep regions.*none of its inputs can be split into samples.*once for each region"
    ):
        cut([0], **given)


# --- join ------------------------------------------------------------------------------------------------------------
@dataclass
class Output:
    sample: Tensor
    extra: Any = None


GROUPS = [[0, 2], [1]]


def test_outputs_come_back_in_order() -> None:
    parts = [{"x": X[rows], "images": [X[row, :2] for row in rows], "size": (4, None)} for rows in GROUPS]
    found = join(parts, GROUPS, frozenset({"images"}))
    assert torch.equal(found["x"], X) and found["size"] == (4, None)
    assert all(map(torch.equal, found["images"], X[:, :2])) and len(found["images"]) == 3


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"sample": x}, Output, lambda x: (Output(x), [x, x + 1, x])])
def test_any_container_keeps_its_type(wrap: Any) -> None:
    found = join([wrap(X[rows]) for rows in GROUPS], GROUPS, frozenset())
    assert str(found) == str(wrap(X)) and type(found) is type(wrap(X))


def test_a_lone_list_of_samples() -> None:
    assert all(map(torch.equal, join([[X[0], X[2]], [X[1]]], GROUPS, frozenset({""})), X))


def test_lists_of_lists_and_plain_values() -> None:
    parts = [Output(X[rows], [[X[row], str(row)] for row in rows]) for rows in GROUPS]
    assert [entry[1] for entry in join(parts, GROUPS, frozenset({"extra"})).extra] == ["0", "1", "2"]


def test_known_layers_are_not_taken_for_samples() -> None:
    layers = [[X[:1], X[:1] + 1], [X[1:2], X[1:2] + 1]]
    found = join([layer[:1] for layer in layers], [[0], [1]], frozenset())
    assert len(found) == 1 and torch.equal(found[0], X[:2])


def test_gradients_pass_the_joint() -> None:
    x = X.clone().requires_grad_()
    found = join([{"x": x[rows], "list": [x[row] for row in rows]} for rows in GROUPS], GROUPS, frozenset({"list"}))
    (found["x"][1].sum() + found["list"][2].sum()).backward()
    assert x.grad is not None and x.grad.sum(1).tolist() == [0, 4, 4]


@pytest.mark.parametrize("extra", [torch.tensor(1.0), torch.ones(5, 2), 1.5, object()], ids=lambda e: type(e).__name__)
def test_outputs_without_a_batch_are_refused(extra: Any) -> None:
    parts = [Output(X[rows], copy.deepcopy(extra) if not isinstance(extra, float) else len(rows)) for rows in GROUPS]
    with pytest.raises(TimestepError, match=r"output 'extra' has no batch axis.*once for each region"):
        join(parts, GROUPS, frozenset())


def test_outputs_of_other_widths_or_structures_are_refused() -> None:
    with pytest.raises(TimestepError, match="output '' has no batch axis"):
        join([X[:2], X[2:, :3]], GROUPS, frozenset())
    with pytest.raises(TimestepError, match="another structure"):
        join([(X[:2], X[:2]), (X[2:],)], GROUPS, frozenset())


# --- what holds samples, found by running ----------------------------------------------------------------------------
class Reader(nn.Module):
    """Reads all that it is given; the last layer is zero, as before training, and would hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Any, ids: Any = None, layers: Any = (), words: Any = None, chunks: Any = None) -> Any:
        if isinstance(x, list):
            return [self.forward(entry[None], ids)[0] for entry in x]
        if ids is not None:  # one place a token: with as many tokens as samples, an axis like the batch
            x = x + ids.reshape(1, -1, 1)
        for number, layer in enumerate(layers):
            x = x + (number + 1) * layer
        if words is not None:
            x = x * torch.tensor([float(len(word)) for word in words])[:, None, None]
        if chunks is not None:
            x = torch.cat([part * (i + 1) for i, part in enumerate(x.split(chunks, 1))], 1)
        return self.last(self.dropout(self.inner(x).sin()))


def find(batch: int = 3, model: nn.Module | None = None, **inputs: Any) -> Splitting:
    model = (model or Reader()).train()
    return find_splitting(model, model.forward, bind_call(model.forward, (), inputs), batch)


TOKENS = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))


def test_rows_of_tensors_and_entries_of_lists_are_samples() -> None:
    assert find(x=TOKENS, words=["a", "bcd", "ef"]) == Splitting(frozenset(), frozenset())
    assert find(x=list(TOKENS)) == Splitting(frozenset(), frozenset({""}))


def test_tables_as_long_as_the_batch_are_told_from_samples() -> None:
    assert find(x=TOKENS, ids=torch.arange(3)).shared == {"ids"}
    assert find(x=TOKENS, ids=torch.arange(3.0)).shared == {"ids"}
    found = find(x=list(TOKENS), ids=torch.tensor([0, 1, 0]))
    assert "ids" in found.shared and "x" not in found.shared and not found.refusal


def test_lists_of_layers_as_many_as_samples_are_told_from_samples() -> None:
    assert find(x=TOKENS, layers=[TOKENS, TOKENS + 1, TOKENS - 1]) == Splitting(frozenset({"layers"}), frozenset())


def test_lists_of_numbers_as_many_as_samples_are_told_from_samples() -> None:
    found = find(x=TOKENS.repeat(1, 2, 1)[:, :5], chunks=[1, 2, 2])
    assert found.shared == {"chunks"} and not found.refusal


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_for_all_samples_is_shared_and_a_row_for_each_is_not(rows: int) -> None:
    assert find(x=TOKENS, layers=[TOKENS[:rows]]).shared == (frozenset({"layers.0", "layers"}) if rows == 1 else frozenset({"layers"}))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Gated(nn.Module):
    """Mixes samples behind a gate that is closed, as before training; the gate is read in the way the function does it."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.gate = read, nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True) * self.read(self.gate)


@pytest.mark.parametrize(
    "read",
    [
        lambda gate: gate,
        lambda gate: gate[0],
        lambda gate: 1 - (1 - gate),
        lambda gate: gate.sum(0),
        lambda gate: torch.mul(gate, 1.0, out=torch.empty(1, 4)),
    ],
)
def test_closed_gates_hide_nothing(read: Callable[[Tensor], Tensor]) -> None:
    assert "one sample alone gave another output" in find(model=Gated(read), x=TOKENS).refusal


class Stacking(nn.Module):
    """Its second input has the batch on axis 1."""

    def forward(self, x: Tensor, layers: Tensor) -> Tensor:
        return x + layers.sum(0).expand(len(x), -1, -1).roll(1, 1)


class Counting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.sum()


class Timed(nn.Module):
    """As a converted model inside does that is called without its timestep."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 3:
            raise TimestepError("this call gives no timestep")
        return x


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        (Mixing(), {"x": TOKENS}, "one sample alone gave another output"),
        (Counting(), {"x": TOKENS}, "output '1' has no batch axis"),
        (Reader(), {"x": TOKENS.repeat(2, 1, 1)}, "none of its inputs can be split into samples"),
        (Stacking(), {"x": TOKENS, "layers": TOKENS[None] * torch.ones(2, 1, 1, 1)}, "one sample alone made the model raise RuntimeError"),
        (Timed(), {"x": TOKENS}, "one sample alone made the model raise TimestepError: this call gives no timestep"),
    ],
    ids=["mixing", "counting", "packed", "second axis", "a timestep error"],
)
def test_models_whose_samples_cannot_run_alone(model: nn.Module, inputs: dict[str, Any], text: str) -> None:
    assert text in find(model=model, **inputs).refusal
    assert "once for each region" in str(refused(text))


def test_finding_changes_nothing() -> None:
    model = Reader().train()
    model.dropout.eval()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find_splitting(model, model.forward, bind_call(model.forward, (), {"x": TOKENS, "ids": torch.arange(3)}), 3)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training and not model.dropout.training and torch.equal(state, torch.get_rng_state())


class Watching(Reader):
    """Notes in which mode it is run, where no attribute that is put back is."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout, self.diffcr = nn.Dropout(dropout), nn.Module()
        self.notes = SimpleNamespace(modes=set())

    def forward(self, x: Any, *_: Any) -> Any:
        self.notes.modes.add((self.training, self.diffcr.training))
        return super().forward(x)


def test_other_threads_see_no_other_mode_where_there_is_no_dropout() -> None:
    model = Watching(0.0)
    assert not find(model=model, x=TOKENS).refusal and model.notes.modes == {(True, True)}


def test_with_dropout_other_threads_see_the_ratios_of_training_all_the_same() -> None:
    model = Watching(0.5)
    assert not find(model=model, x=TOKENS).refusal and model.notes.modes == {(True, True), (False, True)}
    assert all(module.training for module in model.modules())
