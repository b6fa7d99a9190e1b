"""What a recording was specialised on: the key under which it may answer a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffcr_surgery._tree import bind, flatten, freeze
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace.recorder import autocast_state

__all__ = ["Call", "ModelState", "bind_call", "example_call", "input_key", "model_device"]


@dataclass(frozen=True)
class Call:
    """One call of a model, taken apart.

    Attributes:
        arguments: Forward argument name -> value, defaults filled in.
        args: Positional part, ready to call with.
        kwargs: Keyword part, ready to call with.
        paths: Dotted name of each input tensor (``"image_rotary_emb.0"``).
        tensors: The input tensors.
        template: The arguments with a slot in place of each tensor.
    """

    arguments: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    paths: list[str]
    tensors: list[torch.Tensor]
    template: Any


def bind_call(forward: Callable[..., Any] | inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Bind a call to ``forward`` (a bound method, or its signature).

    Raises:
        TraceError: If the arguments do not fit the signature.
    """
    signature = forward if isinstance(forward, inspect.Signature) else inspect.signature(forward)
    try:
        bound = bind(signature, args, kwargs)
    except TypeError as error:
        raise TraceError(
            f"The inputs do not fit the model's forward: {error}. Expected {signature}; got {len(args)} positional arguments and the "
            f"keywords {sorted(kwargs)}. Give a dict of keyword arguments or a tuple of positional ones, such as capture_inputs collects."
        ) from None
    arguments = dict(bound.arguments)
    variadic = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if variadic is not None:
        arguments |= arguments.pop(variadic)
    paths, tensors, template = flatten(arguments)
    return Call(arguments, bound.args, bound.kwargs, paths, tensors, template)


def example_call(forward: Callable[..., Any], example_inputs: Any) -> Call:
    """Bind example inputs: a dict of keyword arguments or a tuple (or list) of positional ones.

    Raises:
        TraceError: If the inputs are of another kind, hold no tensor, or do not fit the signature.
    """
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, dict):
        call = bind_call(forward, (), example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        call = bind_call(forward, tuple(example_inputs), {})
    else:
        raise TraceError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a dict of keyword arguments or a tuple of positional ones. "
            "Collect real ones with `with capture_inputs(model) as seen: ...` and pass seen.inputs."
        )
    if not call.tensors:
        raise TraceError("example_inputs hold no tensor; a model is recorded on real inputs, such as capture_inputs collects.")
    return call


def input_key(call: Call) -> Hashable:
    """Return what a recording depends on in its inputs: structure, plain values, shapes, dtypes, devices, aliasing, modes."""
    first: dict[int, int] = {}
    layouts = tuple(
        (path, tensor.shape, tensor.dtype, tensor.device, first.setdefault(id(tensor), index))
        for index, (path, tensor) in enumerate(zip(call.paths, call.tensors, strict=True))
    )
    device = call.tensors[0].device.type if call.tensors else "cpu"
    return (freeze(call.template), layouts, torch.is_grad_enabled(), autocast_state(device), torch.backends.mha.get_fastpath_enabled())


class ModelState:
    """The part of a model's state that its recorded forward may have read without a trace.

    These are the plain attributes (``training``, ``gradient_checkpointing``, ...) of the modules whose forward the graph replaced, and the
    dtype and device of the first parameter of every leaf.
    """

    def __init__(self, inlined: Iterable[torch.nn.Module], leaves: Iterable[torch.nn.Module]) -> None:
        self._inlined = list(inlined)
        self._leaves = list(leaves)

    def key(self) -> Hashable:
        """Return the present state as a hashable value."""
        attributes = tuple(
            (name, value)
            for module in self._inlined
            for name, value in vars(module).items()
            if type(value) in (bool, int, float, str, type(None)) and (name == "training" or not name.startswith("_"))
        )
        first = map(_first_parameter, self._leaves)
        return attributes, tuple((p.dtype, p.device) for p in first if p is not None)


def _first_parameter(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """Return what ``next(module.parameters(), None)`` does; every call of a model asks all its leaves."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


def model_device(model: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device a model computes on: its first input's, else its first parameter's."""
    first = next(iter(tensors), None)
    first = _first_parameter(model) if first is None else first
    return torch.device("cpu") if first is None else first.device
