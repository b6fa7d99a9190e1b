"""Nested arguments are taken apart and put together as what they were, every field and container."""

import dataclasses
from collections import OrderedDict, defaultdict

import torch

from diffcr_surgery import trace
from diffcr_surgery._tree import fill, flatten, freeze, map_leaves
from tests.unit.test_key import Scale, same, x


@dataclasses.dataclass(frozen=True)
class Grid:
    table: torch.Tensor
    size: int = dataclasses.field(init=False, default=1)
    shift: torch.Tensor = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        object.__setattr__(self, "shift", torch.zeros(4))


def grid(size, shift):
    made = Grid(torch.ones(4))
    object.__setattr__(made, "size", size)
    object.__setattr__(made, "shift", shift)
    return made


def test_all_fields_of_a_dataclass_are_part_of_a_call():
    model = Scale(lambda self, x, other: x * other.size + other.table + other.shift)
    recorded = trace(model, (x(), grid(2, torch.ones(4))))
    for size, shift in ((2, 3.0), (5, 4.0), (2, 5.0)):
        same(recorded, model, x(1), grid(size, torch.full((4,), shift)))
    assert len(recorded) == 2


def test_containers_keep_their_types():
    tree = {
        "size": torch.Size([2, 3]),
        "groups": defaultdict(list, a=[torch.ones(1)]),
        "ordered": OrderedDict(b=torch.zeros(1), a=1),
        "grid": grid(2, torch.ones(4)),
    }
    _, tensors, template = flatten(tree)
    twin = fill(template, tensors)
    for name, value in tree.items():
        assert type(twin[name]) is type(value)
    assert twin["size"].numel() == 6 and twin["groups"]["new"] == [] and list(twin["ordered"]) == ["b", "a"]
    assert twin["grid"].size == 2 and len(tensors) == 4
    assert freeze(template) == freeze(flatten(tree)[2]) and "new" not in tree["groups"]
    assert map_leaves(torch.Size([2, 3]), lambda path, leaf: path) == ("0", "1")


def test_an_output_of_diffusers_keeps_fields_and_items_alike():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    twin = map_leaves(Transformer2DModelOutput(sample=torch.ones(1)), lambda _, leaf: leaf + 1)
    assert torch.equal(twin.sample, twin["sample"]) and torch.equal(twin[0], torch.full((1,), 2.0))
