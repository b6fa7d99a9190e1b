"""What a recording was specialised on: the key under which it may answer a call."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch

from diffcr_surgery._tree import Leaf, attributes_of_object, by_name, flatten, freeze, map_leaves, plain
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace.recorder import autocast_state, has_hooks

__all__ = [
    "Call",
    "InputKey",
    "ModelState",
    "Settings",
    "StateKey",
    "bind_call",
    "check_arguments",
    "copies",
    "device_of",
    "example_call",
    "input_key",
    "model_device",
    "plain_values_that_differ",
    "settings",
]

# What torch keeps in every module, and what diffusers and accelerate hang on one: their hooks run around a recording.
_NO_SETTINGS = frozenset(vars(torch.nn.Module())) - {"training"} | {"_diffusers_hook", "_hf_hook"}


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

    def on(self, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs with other tensors, in containers of their own, which a forward may pop from."""
        other = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        swapped: tuple[tuple[Any, ...], dict[str, Any]] = map_leaves((self.args, self.kwargs), lambda _, leaf: other.get(id(leaf), leaf))
        return swapped


def bind_call(forward: Callable[..., Any] | inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Bind a call to ``forward`` (a bound method, or its signature).

    Raises:
        TraceError: If the arguments do not fit the signature.
    """
    signature = forward if isinstance(forward, inspect.Signature) else inspect.signature(forward)
    try:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # so that equal calls look equal
    except TypeError as error:
        raise TraceError(
            f"The inputs do not fit the model's forward: {error}. Expected {signature}; got {len(args)} positional arguments and the "
            f"keywords {sorted(kwargs)}. Give a dict of keyword arguments or a tuple of positional ones, such as capture_inputs collects."
        ) from None
    arguments = by_name(bound)
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
        call = bind_call(forward, *_by_position(inspect.signature(forward), example_inputs))
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


def _by_position(signature: inspect.Signature, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split arguments given by name, as ``capture_inputs`` notes them: what has no keyword (``*args``, ``x, /``) goes by position."""
    keyless = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    parameters = signature.parameters.values()
    if not any(p.kind in keyless for p in parameters):
        return (), arguments
    named = {p.name: arguments[p.name] for p in parameters if p.name in arguments and p.kind is not p.VAR_KEYWORD}
    bound = inspect.BoundArguments(signature, OrderedDict(named))
    return bound.args, bound.kwargs | {name: value for name, value in arguments.items() if name not in named}


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies that a forward may write into: alike in strides and gradients, and one where a tensor stands twice."""
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in made:
            source = tensor.detach()
            if tensor.is_leaf:
                made[id(tensor)] = _copy(source).requires_grad_(tensor.requires_grad)
            else:  # no forward writes into a leaf that requires gradients, so what is none must not become one
                with torch.enable_grad():
                    made[id(tensor)] = _copy(source.requires_grad_(tensor.requires_grad))
    return [made[id(tensor)] for tensor in tensors]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    if tensor.layout is not torch.strided or copy.stride() == tensor.stride():
        return copy
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def check_arguments(call: Call) -> None:
    """Refuse argument objects that hide tensors, since nothing would see it if one were exchanged.

    Raises:
        TraceError: If there is one; it names the argument.
    """

    def visit(path: str, leaf: Any) -> None:
        if not isinstance(leaf, Leaf) and _hides_tensor(leaf, set()):
            name = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
            raise TraceError(
                f"The argument {path!r} is a {name}, an object that holds a tensor in its attributes. A recording cannot follow it there; "
                "give the tensor as an argument of its own, or in a tuple, list, dict or dataclass."
            )

    map_leaves(call.template, visit)


def _hides_tensor(value: Any, seen: set[int]) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if id(value) in seen or isinstance(value, (type, FunctionType, ModuleType, torch.nn.Module)):
        return False  # the weights of a module are its own, and followed
    seen.add(id(value))
    if isinstance(value, (tuple, list)):
        held: Iterable[Any] = value
    else:
        held = value.values() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).values()
    return any(_hides_tensor(each, seen) for each in held)


InputKey = tuple[Any, Hashable]  # the arguments without their tensors; all else


def input_key(model: torch.nn.Module, call: Call) -> InputKey:
    """Return what a recording depends on in its inputs: structure, plain values, shapes, dtypes, devices, gradients, aliasing, modes."""
    first: dict[int, int] = {}
    layouts = tuple(
        (path, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, first.setdefault(id(tensor), index))
        for index, (path, tensor) in enumerate(zip(call.paths, call.tensors, strict=True))
    )
    device = model_device(model, call.tensors).type
    modes = (torch.is_grad_enabled(), autocast_state(device), torch.backends.mha.get_fastpath_enabled())
    return freeze(call.template), (layouts, modes)


def plain_values_that_differ(one: InputKey, other: InputKey) -> list[str]:
    """Return the names of the arguments in which two keys differ, if they differ in plain values alone."""
    if one[1] != other[1]:
        return []
    values, others = dict(one[0][1:]), dict(other[0][1:])
    return [name for name in values | others if values.get(name) != others.get(name)]


Settings = tuple[tuple[int, str, Hashable], ...]  # number of the module, name and key of an attribute
StateKey = tuple[Settings, Hashable]


class ModelState:
    """The part of a model's state that its recorded forward may have read without a trace.

    These are the plain attributes (``training``, ``gradient_checkpointing``, ...) of the modules whose forward the graph replaced, small
    containers of plain values among them, the plain attributes of objects among them, such as a configuration, and the dtype and device of
    the first parameter of every leaf.
    """

    def __init__(self, inlined: Iterable[torch.nn.Module], leaves: Iterable[torch.nn.Module]) -> None:
        self._inlined = list(inlined)
        self._leaves = list(leaves)

    def key(self) -> StateKey:
        """Return the present state as a hashable value."""
        attributes = tuple(
            (number, name, key)
            for number, module in enumerate(self._inlined)
            for name, value in _own(module)
            if (key := plain(value) or attributes_of_object(value)) is not None
        )
        first = map(_first_parameter, self._leaves)
        hooks = tuple(map(has_hooks, self._inlined[1:]))  # the first is the model itself, whose hooks run around the graph
        return attributes, (hooks, tuple((p.dtype, p.device) for p in first if p is not None))

    def changed(self, since: Settings) -> list[str]:
        """Return the names of the attributes that are others than in the first part of an earlier key."""
        others = {(number, name) for number, name, _ in set(since) ^ set(self.key()[0]) if name != "training"}
        # The earlier key may be that of a recording which kept fewer modules whole.
        return sorted({f"{type(self._inlined[number]).__name__}.{name}" for number, name in others if number < len(self._inlined)})


def settings(module: torch.nn.Module) -> Iterator[tuple[str, Hashable]]:
    """Yield name and key of a module's own attributes that are plain values or small containers of nothing else."""
    for name, value in _own(module):
        key = plain(value)
        if key is not None:
            yield name, key


def _own(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(module).items() if name not in _NO_SETTINGS)


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


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device that is computed on with these tensors: the first that is not the CPU, where a stray mask or timestep may be."""
    devices = (tensor.device for tensor in tensors)
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def model_device(model: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device a model computes on, judged by its inputs and its first parameter."""
    first = _first_parameter(model)
    return device_of([*tensors, *([] if first is None else [first])])
