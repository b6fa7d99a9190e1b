"""Record one run of a model: every torch function called, and every module entered and left.

The log is made from the run itself, so control flow, ``isinstance``, factories and shapes need no analysis: whatever the model
did is what was logged. Tensors are held by weak reference and number, never by the log, so recording keeps no activation alive.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from diffcr_surgery._tree import Leaf, map_leaves

__all__ = [
    "Effect",
    "Frame",
    "FunctionEvent",
    "Meta",
    "Recorder",
    "Ref",
    "autocast_state",
    "function_name",
    "rng_state",
]


MAX_INDEX = 1 << 20  # entries of an index tensor whose content is remembered


@dataclasses.dataclass(frozen=True)
class Ref(Leaf):
    """The tensor that was logged under number ``value``."""

    value: int


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is remembered of a logged tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Effect:
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
    effect: str
    grad: bool
    autocast: tuple[Any, ...]


@dataclasses.dataclass
class Frame:
    """One call of a module, with what happened inside."""

    module: torch.nn.Module
    path: str
    args: Any
    kwargs: dict[str, Any]
    grad: bool
    autocast: tuple[Any, ...]
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
    is_hpu itemsize nbytes _version retains_grad size dim ndimension numel nelement stride storage_offset
    element_size is_contiguous is_floating_point is_complex is_signed is_conj is_neg is_inference get_device type
    is_same_size result_type can_cast is_tensor __len__ has_names is_pinned is_shared is_coalesced data_ptr
    __repr__ __str__ __format__ __hash__ broadcast_shapes _is_view _base is_storage untyped_storage storage
    __dir__ __class__ _has_compatible_shallow_copy_type __deepcopy__ register_hook requires_grad_ _is_all_true
    """.split()
)


def function_name(function: Callable[..., Any]) -> str:
    """Return the short name of a torch function, method, or property getter."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        return str(getattr(function.__self__, "__name__", name))  # type: ignore[attr-defined]
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

    def _refer(self, tree: Any) -> Any:
        return map_leaves(tree, lambda _, leaf: Ref(self.number(leaf)) if isinstance(leaf, torch.Tensor) else leaf)

    def _mint(self, tree: Any) -> Any:
        return map_leaves(tree, lambda _, leaf: Ref(self._renumber(leaf)) if isinstance(leaf, torch.Tensor) else leaf)

    def _is_dynamic(self, tree: Any) -> bool:
        found: list[bool] = []
        map_leaves(tree, lambda _, leaf: found.append(isinstance(leaf, Ref) and leaf.value in self.dynamic))
        return any(found)

    def _mark(self, tree: Any) -> None:
        map_leaves(tree, lambda _, leaf: self.dynamic.add(leaf.value) if isinstance(leaf, Ref) else None)

    # --- the run -------------------------------------------------------------------------------------------------
    def record(self, forward: Callable[..., Any], model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Frame, Any]:
        """Run ``forward(*args, **kwargs)`` once and return its root frame and what it returned."""
        with self._hooks():
            refs = self._refer((args, kwargs))
            self._mark(refs)
            root = Frame(model, "", refs[0], refs[1], grad=torch.is_grad_enabled(), autocast=autocast_state(self.device.type))
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
            frame = Frame(module, self._paths[id(module)], refs[0], refs[1], grad=torch.is_grad_enabled(), autocast=state)
            frame.checkpointed = frame.grad and _inside_checkpoint()
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
        before = self._refer((args, kwargs))  # numbers as of before the call: an in-place write changes them
        output = func(*args, **kwargs)
        effect = _effect(func, args, kwargs, output)
        if effect is None:
            return output
        dynamic = self._is_dynamic(before) or effect == Effect.WRITES
        logged = self._mint(output) if effect != Effect.READS else output
        if dynamic or _draws(func):
            self._mark(logged)
        if effect == Effect.READS and not dynamic:
            return output  # what stems from constants alone reads the same in every call
        state = autocast_state(self.device.type)
        event = FunctionEvent(func, before[0], before[1], output=logged, effect=effect, grad=torch.is_grad_enabled(), autocast=state)
        self._stack[-1].events.append(event)
        return output


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_leaves(tree, lambda _, leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None)
    return found


def _effect(function: Any, args: Any, kwargs: dict[str, Any], output: Any) -> str | None:
    name = function_name(function)
    if name in _METADATA:
        return None
    if _writes(function, name, kwargs):
        return Effect.WRITES
    made = _tensors(output)
    if not made:
        return Effect.READS if _tensors((args, kwargs)) else None
    given = {id(tensor) for tensor in _tensors((args, kwargs))}
    # A call that hands its input back (`x.to(x.dtype)`) does nothing under the same key.
    return None if len(made) == 1 and id(made[0]) in given else Effect.MAKES


def _writes(function: Any, name: str, kwargs: dict[str, Any]) -> bool:
    if getattr(function, "__name__", "") == "__set__" or kwargs.get("out") is not None or kwargs.get("inplace") is True:
        return True
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__"))
    return name.endswith("_")


def _draws(function: Any) -> bool:
    name = function_name(function)
    return name.startswith(("rand", "normal", "bernoulli", "multinomial", "poisson")) or "dropout" in name


def _inside_checkpoint() -> bool:
    here: types.FrameType | None = sys._getframe()
    checkpoint = torch.utils.checkpoint.__file__
    while here is not None and here.f_code is not Recorder.record.__code__:
        if here.f_code.co_filename == checkpoint:
            return True
        here = here.f_back
    return False
