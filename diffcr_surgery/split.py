"""Cut a call into samples, and put their outputs back together.

Axis 0 of a tensor, and the entries of a list, are samples if there are as many as the call has. Tuples and dicts never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcr_surgery._tree import flatten, map_leaves
from diffcr_surgery.errors import CannotCutError
from diffcr_surgery.trace.key import Call

__all__ = ["CannotCutError", "Splitting", "join", "kind_of_call", "places", "refused", "rows_of", "select"]


@dataclass(frozen=True)
class Splitting:
    """What is known of how calls are cut into samples.

    Attributes:
        shared: Paths of the input tensors and lists that belong to the batch as a whole.
        lists: Paths of the output lists with one entry a sample.
        refusal: Why calls cannot be cut; empty if they can.
    """

    shared: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    refusal: str = ""


def kind_of_call(call: Call, batch: int) -> frozenset[tuple[str, bool]]:
    """Return which arguments a call of ``batch`` samples gives, and whether each tensor and list in them has an entry for every sample."""
    names = {(name, False) for name, value in call.arguments.items() if value is not None}
    return frozenset(names | {(path, len(value) == batch) for path, value in places(call.arguments).items()})


def refused(why: str) -> CannotCutError:
    """Return the error for a call that would have to be cut and cannot."""
    error = CannotCutError(
        f"The samples of this call lie in several timestep regions and have to run apart, but {why}. Call the model once for each region, "
        "or use timestep_regions=1."
    )
    error.why = why
    return error


def select(call: Call, rows: Sequence[int], batch: int, shared: frozenset[str]) -> Call:
    """Return the call with the given samples alone.

    Args:
        call: A call with ``batch`` samples.
        rows: Numbers of the samples wanted.
        batch: b.
        shared: Paths of tensors and lists that are not cut, whatever their length.

    Raises:
        CannotCutError: If nothing but labels and numbers would be cut.
    """
    cut: dict[int, Any] = {}  # by identity: one tensor under two names stays one tensor
    wanted = lambda path, value: isinstance(value, list) and len(value) == batch and path not in shared  # noqa: E731

    def visit(path: str, leaf: Any) -> Any:
        if isinstance(leaf, list) or (isinstance(leaf, Tensor) and path not in shared):
            cut.setdefault(id(leaf), rows_of(leaf, rows, batch))
        return cut.get(id(leaf), leaf)

    arguments = map_leaves(call.arguments, visit, stop=wanted)
    args, kwargs = map_leaves((call.args, call.kwargs), lambda _, leaf: cut.get(id(leaf), leaf), stop=lambda _, value: id(value) in cut)
    paths, tensors, template = flatten(arguments)
    kept = {id(t) for t in call.tensors}
    if not any(t.ndim > 1 and t.is_floating_point() and id(t) not in kept for t in tensors) and len(tensors) == len(call.tensors):
        raise refused("none of its inputs can be split into samples (a packed sequence, or samples along another axis than 0)")
    return Call(arguments, args, kwargs, paths, tensors, template)


def rows_of(leaf: Any, rows: Sequence[int], batch: int) -> Any:
    """Pick rows of a tensor ``b ...`` or entries of a list; a tensor without a batch axis stays."""
    if isinstance(leaf, list):
        return [leaf[row] for row in rows]
    if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch:
        return leaf.index_select(0, torch.tensor(rows, device=leaf.device))
    return leaf


def join(parts: Sequence[Any], groups: Sequence[Sequence[int]], lists: frozenset[str]) -> Any:
    """Put the outputs of groups of samples back together, in the order of the samples.

    Args:
        parts: Output of each group, tensors ``b ...`` and lists of b entries in any container.
        groups: The samples of each group.
        lists: Paths of the lists with one entry a sample.

    Raises:
        CannotCutError: If an output cannot be told apart by samples.
    """
    rows = [row for group in groups for row in group]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    flat = [_leaves(part, lists) for part in parts]
    if any(found.keys() != flat[0].keys() for found in flat):
        raise refused("its output has another structure from one group of samples to the next")

    def merge(path: str, first: Any) -> Any:
        values = [found[path] for found in flat]
        if path in lists:
            entries = [entry for value in values for entry in value]
            return [entries[place] for place in order]
        if not isinstance(first, Tensor):
            if all(value is first or value == first for value in values):
                return first
        elif all(value.shape == (len(group), *first.shape[1:]) for value, group in zip(values, groups, strict=True)):
            return torch.cat(values).index_select(0, torch.tensor(order, device=first.device))
        raise refused(f"output {path!r} has no batch axis by which it could be put back together")

    return map_leaves(parts[0], merge, stop=lambda path, _: path in lists)


def _leaves(tree: Any, lists: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    map_leaves(tree, lambda path, leaf: found.update({path: leaf}), stop=lambda path, _: path in lists)
    return found


def places(tree: Any) -> dict[str, Any]:
    """Return every tensor with axes and every list of a tree, by path."""
    found: dict[str, Any] = {}

    def note(path: str, value: Any) -> bool:
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
            found[path] = value
        return False

    map_leaves(tree, note, stop=note)
    return found
