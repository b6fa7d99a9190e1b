"""Nested arguments: find, replace and name the tensors inside tuples, lists, dicts, dataclasses and slices."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import numpy
import torch

__all__ = [
    "Identity",
    "Leaf",
    "Slot",
    "attributes_of_object",
    "by_name",
    "fill",
    "flatten",
    "freeze",
    "is_dataclass_value",
    "leaves_of",
    "map_leaves",
    "map_tensors",
    "plain",
    "plain_attributes",
]

T = TypeVar("T")

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
_ALIKE = (int, float, complex, str, bytes, enum.Enum)  # classes derived from these stay as they are, too
MANY = 64  # entries; a container of more is data and no setting, and too long to compare at every call
DEPTH = 4


class Leaf:
    """Base of the stand-ins for tensors; never looked into."""


@dataclasses.dataclass(frozen=True)
class Slot(Leaf):
    """Place number ``index`` of a tensor taken out of a tree by :func:`flatten`."""

    index: int


class Identity:
    """An unhashable object as a key: equal to itself alone, and kept alive so that its identity is not used again."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def is_dataclass_value(value: Any) -> bool:
    """Tell an instance of a dataclass (diffusers' outputs among them) from everything else."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, Leaf))


def map_leaves(tree: Any, visit: Callable[[str, Any], Any], path: str = "", *, stop: Callable[[str, Any], bool] | None = None) -> Any:
    """Rebuild ``tree`` with ``visit(dotted path, leaf)`` in place of each leaf; containers keep their types.

    Where ``stop(dotted path, value)`` says so, a container counts as a leaf.
    """

    def below(key: Any, value: Any) -> Any:
        return map_leaves(value, visit, f"{path}.{key}" if path else str(key), stop=stop)

    if isinstance(tree, torch.Tensor) or (stop is not None and stop(path, tree)):
        return visit(path, tree)
    if isinstance(tree, tuple):
        items = [below(i, v) for i, v in enumerate(tree)]
        if isinstance(tree, torch.Size) and all(isinstance(item, int) for item in items):  # it takes nothing else
            return torch.Size(items)
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [below(i, v) for i, v in enumerate(tree)]
    if is_dataclass_value(tree):
        return _with_attributes(tree, {name: below(name, value) for name, value in _attributes(tree).items()})
    if isinstance(tree, Mapping):
        items_of = {key: below(key, value) for key, value in tree.items()}
        if isinstance(tree, defaultdict):
            return type(tree)(tree.default_factory, items_of)
        return items_of if type(tree) is dict else type(tree)(items_of)  # type: ignore[call-arg]
    if isinstance(tree, slice):
        return slice(below("start", tree.start), below("stop", tree.stop), below("step", tree.step))
    return visit(path, tree)


def _attributes(value: Any) -> dict[str, Any]:
    """Return what a dataclass value holds: its fields, and what else was hung on it, unless it is a mapping, whose items are its fields."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)}
    return fields if isinstance(value, Mapping) else {**fields, **getattr(value, "__dict__", {})}


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    """Return a dataclass value with other attributes; what it makes of its fields when it is new stands among them already."""
    if isinstance(value, Mapping):
        return type(value)(**attributes)
    twin = copy.copy(value)
    for name, attribute in attributes.items():
        object.__setattr__(twin, name, attribute)
    return twin


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Rebuild ``tree`` with ``change(tensor)`` in place of each tensor."""
    return map_leaves(tree, lambda _, leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def leaves_of(tree: Any, kind: type[T]) -> list[tuple[str, T]]:
    """Return dotted path and leaf for every leaf of one type in ``tree``, in order."""
    found: list[tuple[str, T]] = []

    def visit(path: str, leaf: Any) -> None:
        if isinstance(leaf, kind):
            found.append((path, leaf))

    map_leaves(tree, visit)
    return found


def flatten(tree: Any) -> tuple[list[str], list[torch.Tensor], Any]:
    """Take the tensors out of ``tree``.

    Returns:
        The dotted paths of the tensors, the tensors, and the tree with a :class:`Slot` in place of each.

    Example:
        >>> paths, tensors, template = flatten({"x": torch.ones(2), "pair": (torch.zeros(1), 3)})
        >>> paths, template
        (['x', 'pair.0'], {'x': Slot(index=0), 'pair': (Slot(index=1), 3)})
    """
    paths: list[str] = []
    tensors: list[torch.Tensor] = []

    def visit(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        paths.append(path)
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    template = map_leaves(tree, visit)
    return paths, tensors, template


def fill(template: Any, values: Any) -> Any:
    """Put ``values`` back into the slots of a template made by :func:`flatten`."""
    return map_leaves(template, lambda _, leaf: values[leaf.index] if isinstance(leaf, Slot) else leaf)


def freeze(template: Any) -> Any:
    """Return a hashable twin of a template; opaque leaves count with their plain attributes, unhashable ones by identity."""
    if type(template) in _PLAIN or isinstance(template, Leaf):
        return (type(template), template)  # the type keeps 1, 1.0 and True apart
    if isinstance(template, (tuple, list)):
        return (type(template).__name__, *map(freeze, template))
    if is_dataclass_value(template):
        return (type(template), *((name, freeze(value)) for name, value in _attributes(template).items()))
    if isinstance(template, Mapping):
        return (type(template).__name__, *((key, freeze(value)) for key, value in template.items()))
    if isinstance(template, slice):
        return ("slice", freeze(template.start), freeze(template.stop), freeze(template.step))
    if isinstance(template, numpy.ndarray):
        return _array(template)
    attributes = () if isinstance(template, type) else plain_attributes(template)
    try:
        hash(template)
    except TypeError:
        return (Identity(template), attributes)
    return (type(template), template, attributes)


def plain(value: Any, depth: int = DEPTH) -> Hashable:
    """Return a plain value, or a small container of nothing else, as a key; ``None`` for any other, such as a cache of tensors."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, _ALIKE):
        return (kind, value)
    if isinstance(value, numpy.generic) or (isinstance(value, numpy.ndarray) and value.size <= MANY):
        return _array(value)
    if not isinstance(value, (tuple, list, dict, set, frozenset)) or len(value) > MANY or not depth:
        return None
    inner = tuple(plain(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    if None in inner:
        return None
    if isinstance(value, (set, frozenset)):
        return (kind, frozenset(inner))
    return (kind, tuple(value), inner) if isinstance(value, dict) else (kind, inner)


def plain_attributes(value: Any) -> tuple[tuple[str, Hashable], ...]:
    """Return name and key of each attribute of an object that is plain."""
    found = ((name, plain(attribute)) for name, attribute in getattr(value, "__dict__", {}).items())
    return tuple((name, key) for name, key in found if key is not None)


def attributes_of_object(value: Any) -> Hashable:
    """Return what is plain of an object, such as a configuration, as a key; ``None`` for what is none, or has nothing plain."""
    if isinstance(value, (torch.Tensor, torch.nn.Module, type, ModuleType)):
        return None
    found = plain_attributes(value)
    return (type(value), found) if found else None


def _array(value: Any) -> Hashable:
    """Return a NumPy array or number as a key."""
    return (type(value), value.dtype.str, value.shape, value.tobytes())


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments of a bound call by name; those that ``**kwargs`` takes up, by their own."""
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        spread = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments |= value if spread else {name: value}
    return arguments
