"""What the laws compare: trees of tensors, and what a user could notice about a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import Slot, flatten, freeze, map_leaves

__all__ = ["LawError", "first_difference", "same", "snapshot", "what_changed"]


_PLAIN = (bool, int, float, str, tuple, type(None))
_LEAST_UNIT = 1e-3  # of a tolerance: where all is next to nothing, rounding of what cancelled out is all there is


class LawError(AssertionError):
    """A law of the method does not hold; the text says which token, argument or site broke it."""


def same(
    law: str,
    what: str,
    actual: Any,
    expected: Any,
    *,
    tolerance: float = 0.0,
    unit: float | None = None,
    describe: Callable[[str, tuple[int, ...]], str] | None = None,
) -> None:
    """Require two trees of tensors to be equal: containers, plain values, and tensors bit for bit or to a tolerance.

    Args:
        law: Name of the law.
        what: What is compared, for the message.
        actual: What was found.
        expected: What should be, with the same structure.
        tolerance: Largest difference that counts as equal, in units of the tensor's largest expected entry (at least 1e-3).
        unit: What the tolerance is in units of instead.
        describe: Path and index of an entry -> what to add to the message.

    Raises:
        LawError: Naming the tensor and the entry that differ most.
    """
    paths, found, template = flatten(actual)
    wanted_paths, wanted, wanted_template = flatten(expected)
    if paths != wanted_paths or type(template) is not type(wanted_template):
        raise LawError(
            f"{law}: {what}: a {type(actual).__name__} of the tensors {paths}; expected a {type(expected).__name__} of {wanted_paths}."
        )
    if _form(template) != _form(wanted_template):
        raise LawError(f"{law}: {what}: beside its tensors it is {template!r}; expected {wanted_template!r}.")
    for path, one, other in zip(paths, found, wanted, strict=True):
        name = f"{what}{'.' + path if path else ''}"
        if one.shape != other.shape or one.dtype != other.dtype:
            raise LawError(f"{law}: {name} is {tuple(one.shape)} {one.dtype}; expected {tuple(other.shape)} {other.dtype}.")
        index = first_difference(one, other, tolerance, unit)
        if index is not None:
            added = describe(path, index) if describe is not None else ""
            raise LawError(
                f"{law}: {name}{list(index)} is {_number(one[index])}; expected {_number(other[index])}.{' ' if added else ''}{added}"
            )


def _form(template: Any) -> Any:
    """Return containers and plain values in a form to be compared; of other objects, their type."""
    return freeze(map_leaves(template, lambda _, leaf: leaf if isinstance(leaf, (Slot, *_PLAIN)) else type(leaf)))


def _number(entry: Tensor) -> str:
    return f"{entry.item():.9g}" if entry.is_floating_point() else str(entry.item())


def first_difference(one: Tensor, other: Tensor, tolerance: float = 0.0, unit: float | None = None) -> tuple[int, ...] | None:
    """Return the index of the entry that differs most, ``None`` if all are equal to the tolerance (see :func:`same`)."""
    if torch.equal(one, other) or not one.numel():
        return None
    if one.is_floating_point() and one.dtype.itemsize == 1:  # eight bits are stored, not compared
        one, other = one.float(), other.float()
    apart = (one != other) & ~(one.isnan() & other.isnan())
    wide = torch.complex128 if one.is_complex() else torch.float64
    first, second = one.detach().to(wide), other.detach().to(wide)
    gaps = torch.where(apart, (first - second).abs().nan_to_num(nan=float("inf")), -1.0)  # an integer's may vanish in float64
    worst = int(gaps.argmax())
    if unit is None:
        finite = second[second.isfinite()].abs()
        unit = max(_LEAST_UNIT, float(finite.max()) if finite.numel() else 1.0)
    if not bool(apart.any()) or (tolerance and float(gaps.flatten()[worst]) <= tolerance * unit):
        return None
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), one.shape))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return what a user could notice about a model.

    Classes, names of attributes, values of public ones that are plain, hooks; tensors and their gradients by identity and bits; the CPU's
    random state. What lists, dicts and private attributes hold is not looked at.
    """
    found: dict[str, Any] = {"the random state": torch.get_rng_state().numpy().tobytes(), "the state-dict keys": list(model.state_dict())}
    for name, module in model.named_modules():
        hooks = {key: list(value.items()) for key, value in vars(module).items() if "hook" in key and value}
        plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN) and not key.startswith("_")}
        found[f"module {name or '(the model)'}"] = (type(module), sorted(vars(module)), plain, hooks)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        gradient = None if tensor.grad is None else (id(tensor.grad), _bits(tensor.grad))
        found[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.dtype, _bits(tensor), gradient)
    return found


def _bits(tensor: Tensor) -> bytes:
    found: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return found


def what_changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between two snapshots."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
