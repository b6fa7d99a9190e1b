"""Record one run of a model: every torch function called, and every module entered and left.

The log is made from the run itself, so control flow, ``isinstance``, factories and shapes need no analysis: whatever the model
did is what was logged. Tensors are held by weak reference and number, never by the log, so recording keeps no activation alive.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
import torch.utils.checkpoint
import torch.utils.hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from diffcr_surgery._tree import Leaf, flatten, leaves_of, map_tensors

__all__ = [
    "Effect",
    "Frame",
    "FunctionEvent",
    "Meta",
    "Recorder",
    "Ref",
    "autocast_state",
    "function_name",
    "has_hooks",
    "rng_state",
    "writes",
    "writes_by_name",
]


MAX_INDEX = 1 << 20  # entries of an index tensor whose content is remembered
_TRANSPARENT = (torch.utils.checkpoint.__file__, torch.utils.hooks.__file__)  # custom functions of torch that pass gradients on as they are
_SWITCHES = (__file__, torch.autograd.grad_mode.__file__)  # code between a forward and the switch of gradients it asked for


@dataclasses.dataclass(frozen=True)
class Ref(Leaf):
    """The tensor that was logged under number ``value``."""

    value: int


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is remembered of a logged tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Effect(Enum):
    """Why a function call is kept: it makes tensors, writes into one, or lets Python see a tensor's content."""

    MAKES = "makes"
    WRITES = "writes"
    READS = "reads"


@dataclasses.dataclass
class FunctionEvent:
    """A torch function called outside every inner frame."""

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    output: Any
    effect: Effect
    grad: bool
    autocast: tuple[Any, ...]
    inside: type | None = None  # the custom autograd function whose forward made the call


@dataclasses.dataclass
class Frame:
    """One call of a module, with what happened inside."""

    module: torch.nn.Module
    path: str
    args: Any
    kwargs: dict[str, Any]
    grad: bool
    autocast: tuple[Any, ...]
    inside: type | None = None
    checkpointed: bool = False
    random: bool = False
    output: Any = None
    events: list[FunctionEvent | Frame] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[FunctionEvent | Frame]:
        """Yield every event inside, at any depth, in order of start."""
        for event in self.events:
            yield event
            if isinstance(event, Frame):
                yield from event.walk()


# Python sees a tensor's layout through these; the key of a recording already determines what they return.
_METADATA = frozenset(
    """
    shape dtype device layout ndim names requires_grad is_leaf grad_fn grad output_nr is_cuda is_cpu is_meta
    is_mps is_xpu is_xla is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_mtia is_ipu is_maia is_vulkan
    is_hpu itemsize nbytes _version retains_grad size dim ndimension numel nelement
    element_size is_floating_point is_complex is_signed is_conj is_neg is_inference get_device
    is_same_size result_type can_cast is_tensor __len__ has_names is_pinned is_shared is_coalesced data_ptr
    __repr__ __str__ __format__ __hash__ broadcast_shapes _is_view _base is_storage untyped_storage storage
    __dir__ __class__ _has_compatible_shallow_copy_type __deepcopy__ register_hook requires_grad_ _is_all_true
    """.split()
)


def function_name(function: Any) -> str:
    """Return the short name of a torch function, method, or property getter."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        return str(getattr(function.__self__, "__name__", name))
    return str(name)


def autocast_state(device: str) -> tuple[Any, ...]:
    """Return what autocast does on ``device`` now; part of a recording's key."""
    enabled = torch.is_autocast_enabled(device)
    return (enabled, torch.get_autocast_dtype(device)) if enabled else (False,)


def rng_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the state of the default random generators a model on ``device`` draws from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


class Recorder(TorchFunctionMode):
    """Logs a call of ``forward`` as a tree of :class:`Frame`; other threads' calls pass by unseen."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.meta: dict[int, Meta] = {}
        self.alias: dict[int, int] = {}  # a later number of a tensor object -> its earlier one
        self.fresh: dict[int, torch.Tensor] = {}  # tensors no logged call made: inputs, parameters, constants
        self.dynamic: set[int] = set()  # numbers whose content may differ from call to call
        self.indices: dict[int, torch.Tensor] = {}  # content of integer and boolean tensors, which may say where tokens lie
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._thread = threading.get_ident()
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self._paths.setdefault(id(module), path)
        self._modules = [module for module in model.modules() if module is not model]
        self._stack: list[Frame] = []
        self._starts: list[tuple[torch.Tensor, ...]] = []
        self._grad = False  # whether gradients are on outside custom autograd functions

    # --- numbering -----------------------------------------------------------------------------------------------
    def number(self, tensor: torch.Tensor) -> int:
        """Return the current number of ``tensor``; one never seen before is noted as fresh."""
        entry = self._numbers.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        value = self._renumber(tensor)
        self.fresh[value] = tensor
        self.dynamic.add(value)
        return value

    def _renumber(self, tensor: torch.Tensor) -> int:
        entry = self._numbers.get(id(tensor))
        value = len(self.meta)
        if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= MAX_INDEX:
            self.indices[value] = tensor.detach().clone()
        if entry is not None and entry[0]() is tensor:
            self.alias[value] = entry[1]
        self.meta[value] = Meta(tuple(tensor.shape), tensor.dtype)
        self._numbers[id(tensor)] = (weakref.ref(tensor), value)
        return value

    def origin(self, value: int) -> int:
        """Return the first number that the tensor had which has this one."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def _refer(self, tree: Any) -> Any:
        return map_tensors(tree, lambda tensor: Ref(self.number(tensor)))

    def _mint(self, tree: Any) -> Any:
        return map_tensors(tree, lambda tensor: Ref(self._renumber(tensor)))

    def _is_dynamic(self, tree: Any) -> bool:
        return any(ref.value in self.dynamic for _, ref in leaves_of(tree, Ref))

    def _mark(self, tree: Any) -> None:
        self.dynamic.update(ref.value for _, ref in leaves_of(tree, Ref))

    def _mark_shared(self, written: list[torch.Tensor]) -> None:
        """Mark what was written into, and every view of it and tensor it is a view of."""
        with torch._C.DisableTorchFunctionSubclass():
            storages = {_storage(tensor) for tensor in written} - {None}
            alive = ((reference(), value) for reference, value in self._numbers.values())
            self.dynamic.update(value for tensor, value in alive if tensor is not None and _storage(tensor) in storages)

    # --- the run -------------------------------------------------------------------------------------------------
    def record(self, forward: Callable[..., Any], model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Frame, Any]:
        """Run ``forward(*args, **kwargs)`` once and return its root frame and what it returned."""
        with self._hooks():
            refs = self._refer((args, kwargs))
            self._mark(refs)
            self._grad = torch.is_grad_enabled()
            root = Frame(model, "", refs[0], refs[1], grad=self._grad, autocast=autocast_state(self.device.type))
            self._stack.append(root)
            with self:
                output = forward(*args, **kwargs)
            root.output = self._refer(output)
        return root, output

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for module in self._modules:
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Torch calls a hook without its last argument in a thread that comes by while the hook is being put on or taken off.
    def _enter(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        if threading.get_ident() != self._thread:
            return
        with torch._C.DisableTorchFunction():
            refs = self._refer((args, kwargs))
            state = autocast_state(self.device.type)
            grad, inside = self._gradients()
            frame = Frame(module, self._paths[id(module)], refs[0], refs[1], grad=grad, autocast=state, inside=inside)
            frame.checkpointed = grad and any(code.co_filename == torch.utils.checkpoint.__file__ for code in _callers())
            self._stack[-1].events.append(frame)
            self._stack.append(frame)
            self._starts.append(rng_state(self.device))

    def _leave(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
        if threading.get_ident() != self._thread:
            return
        with torch._C.DisableTorchFunction():
            while self._stack[-1].module is not module:  # a call that raised, and was caught by the model
                self._stack.pop()
                self._starts.pop()
            frame, start = self._stack.pop(), self._starts.pop()
            frame.random = not all(map(torch.equal, start, rng_state(self.device)))
            frame.output = self._mint(output)
            self._mark(frame.output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call ``func`` and log it if a tensor is made, written or read by it."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # flex attention compiles itself, and would compile the recorder with it
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return self._switch(*args)
        before = self._refer((args, kwargs))  # numbers as of before the call: an in-place write changes them
        grad, inside = self._gradients()
        output = func(*args, **kwargs)
        effect = _effect(func, args, kwargs, output)
        if effect is None:
            return output
        dynamic = self._is_dynamic(before) or effect == Effect.WRITES
        logged = self._mint(output) if effect != Effect.READS else output
        if dynamic or _draws(func):
            self._mark(logged)
        if effect == Effect.WRITES:
            self._mark_shared(flatten((args[:1], kwargs.get("input")) if kwargs.get("out") is None else kwargs["out"])[1])
        if effect == Effect.READS and not dynamic:
            return output  # what stems from constants alone reads the same in every call
        state = autocast_state(self.device.type)
        event = FunctionEvent(func, before[0], before[1], output=logged, effect=effect, grad=grad, autocast=state, inside=inside)
        self._stack[-1].events.append(event)
        return output

    def _gradients(self) -> tuple[bool, type | None]:
        """Return whether the backward pass will see what is done now, and the custom autograd function that hides it if one does.

        Its forward runs with gradients off, whatever its backward does. What a reentrant checkpoint runs is run again with them.
        """
        grad = torch.is_grad_enabled()
        self._grad |= grad
        if grad or not self._grad:
            return grad, None
        around = _custom_functions()
        if not around and torch.is_inference_mode_enabled():
            return False, None
        if not around and not any(code.co_filename in _TRANSPARENT for code in _callers()):
            return False, torch.autograd.Function  # after the forward of one: torch makes a view of an input that it returned
        hiding = next((function for function in around if function is not CheckpointFunction), None)
        return hiding is None, hiding

    def _switch(self, mode: bool) -> None:
        """Switch gradients on or off, as the model asked to."""
        around = _custom_functions() if self._grad and not torch.is_grad_enabled() else []
        torch._C._set_grad_enabled(mode)
        if not around:
            self._grad = mode
        elif next(code for code in _callers() if code.co_filename not in _SWITCHES) is not CheckpointFunction.forward.__code__:
            # Off before and off after: what the second run of a checkpoint leaves out of the backward pass cannot be told from here.
            state, call = autocast_state(self.device.type), torch._C._set_grad_enabled
            event = FunctionEvent(call, (mode,), {}, None, effect=Effect.MAKES, grad=True, autocast=state, inside=around[0])
            self._stack[-1].events.append(event)


def has_hooks(module: torch.nn.Module) -> bool:
    """Tell whether a hook other than a recorder's own is on ``module``, for its forward or its backward."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(not isinstance(getattr(hook, "__self__", None), Recorder) for hooks in kinds for hook in list(hooks.values()))


def _storage(tensor: torch.Tensor) -> int | None:
    """Return the address of what holds a tensor's entries: one for all its views, none for a sparse one."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _effect(function: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Effect | None:
    name = function_name(function)
    if name in _METADATA:
        return None
    if writes(function, kwargs):
        return Effect.WRITES
    made, taken = flatten(output)[1], flatten((args, kwargs))[1]
    if not made:
        return Effect.READS if taken else None
    given = {id(tensor) for tensor in taken}
    # A call that hands its input back (`x.to(x.dtype)`) does nothing under the same key; but strides are not in it.
    same = len(made) == 1 and id(made[0]) in given and name != "contiguous" and "memory_format" not in kwargs
    return None if same else Effect.MAKES


def writes(function: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of a torch function writes into a tensor it is given."""
    return getattr(function, "__name__", "") == "__set__" or writes_by_name(function_name(function), kwargs)


def writes_by_name(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function or method of torch with this name writes into a tensor it is given."""
    if kwargs.get("out") is not None or kwargs.get("inplace") is True:
        return True
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__"))
    return name.endswith("_")


def _draws(function: Any) -> bool:
    name = function_name(function)
    return name.startswith(("rand", "normal", "bernoulli", "multinomial", "poisson")) or "dropout" in name


def _callers() -> list[types.CodeType]:
    """Return the code of all that runs between the recorded forward and here, the innermost first."""
    found: list[types.CodeType] = []
    here: types.FrameType | None = sys._getframe(1)
    while here is not None and here.f_code is not Recorder.record.__code__:
        found.append(here.f_code)
        here = here.f_back
    return found


def _custom_functions() -> list[type]:
    """Return the custom autograd functions whose forward is running, the innermost first."""
    return [function for code in _callers() if (function := _function_of(code)) is not None]


@lru_cache(maxsize=1 << 12)
def _function_of(code: types.CodeType) -> type | None:
    """Return the custom autograd function that has ``code`` for its forward."""
    classes = torch.autograd.Function.__subclasses__()
    for each in classes:
        if getattr(inspect.unwrap(each.forward), "__code__", None) is code:
            return each
        classes += each.__subclasses__()
    return None
