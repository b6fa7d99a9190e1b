"""The class a converted model has: a subclass of its own, with a forward that routes.

``torch.compile`` sees of a specialised model the routed graphs and nothing else. Which region a call is in, and which graph answers it, is
Python that reads tensors; so the frame of ``forward`` is passed over (:func:`leave_to_compiler`), and the compiler begins anew at each
graph that is called from there. Every graph is a function of its own with static shapes and no decision: one compilation for each region
and input shape, no graph break, and none from step to step. Of a model in training, whose kept counts move, it sees nothing.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffcr_surgery.runtime.execute import Prepared, answer, prepare
from diffcr_surgery.trace.builder import StaleRecordingError
from diffcr_surgery.trace.key import bind_call

__all__ = ["leave_to_compiler", "original_class", "subclass"]

_SUBCLASSES: weakref.WeakKeyDictionary[type[torch.nn.Module], type[torch.nn.Module]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def _answer(model: Any, signature: inspect.Signature, args: Any, kwargs: Any, dense: Callable[..., Any]) -> Any:
    return answer(model, model.diffcr, bind_call(signature, args, kwargs), dense)


def _prepare(model: Any, signature: inspect.Signature, args: Any, kwargs: Any, dense: Callable[..., Any]) -> Prepared:
    return prepare(model, model.diffcr, bind_call(signature, args, kwargs), dense)


def _finish(prepared: Prepared, values: list[Any]) -> Any:
    return prepared.finish(values)


def _start_over(prepared: Prepared, stopped: int, *call: Any) -> Any:
    prepared.rewind(stopped)
    return _answer(*call)


def _hidden(*call: Any) -> Any:
    return torch.compiler.disable(_answer)(*call)  # type: ignore[no-untyped-call]


_hidden._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets, which takes 2 s to import

# These functions as they are to be called from forward's frame: themselves, or out of the compiler's sight.
_OUTSIDE: dict[Callable[..., Any], Callable[..., Any]] = {function: function for function in (_answer, _prepare, _finish, _start_over)}


def leave_to_compiler(converted: Any) -> None:
    """Let ``torch.compile`` pass over the forward of a converted class, and begin at the graphs that are called from it."""
    from torch._dynamo.decorators import skip  # as torch.compiler.disable(recursive=False), but in place; it takes 2 s to import

    with _LOCK:
        skip(converted.forward)
        for function, outside in _OUTSIDE.items():
            if outside is function:
                _OUTSIDE[function] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]


def _rebuild(original: type[torch.nn.Module], make: Any, args: tuple[Any, ...], specialized: bool) -> Any:
    """Recreate a converted object for pickle and deepcopy, whose class cannot be found by name."""
    converted = subclass(original)
    if specialized:
        leave_to_compiler(converted)
    return make(*(converted if arg is original else arg for arg in args))


def _own_children(model: torch.nn.Sequential) -> Iterator[torch.nn.Module]:
    """Iterate over what a ``Sequential`` runs: its children without ``diffcr``."""
    return (child for name, child in model.named_children() if name != "diffcr")


def _count_own(model: torch.nn.Sequential) -> int:
    return sum(1 for _ in _own_children(model))


def subclass(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return the converted twin of a model class: same name and module, another forward."""
    with _LOCK:
        found = _SUBCLASSES.get(original)
        if found is None:
            found = _SUBCLASSES[original] = _twin(original)
        return found


def _twin(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    signature = inspect.signature(original.forward)
    own = signature.replace(parameters=list(signature.parameters.values())[1:])

    # Python functions called from this frame must be the compiler's business or in _OUTSIDE: it would try to compile any other.
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = (self, own, args, kwargs, functools.partial(original.forward, self))
        if self.diffcr.fixed is None:
            return (_hidden if torch.compiler.is_dynamo_compiling() else _OUTSIDE[_answer])(*call)
        prepared = _OUTSIDE[_prepare](*call)
        values = []
        for step in prepared.steps:
            try:
                values.append(step.run(*step.inputs))
            except StaleRecordingError:
                return _OUTSIDE[_start_over](prepared, len(values), *call)
            finally:
                torch._C._set_grad_enabled(prepared.gradients)  # a model may switch them off and be stopped, or never switch them on again
        return _OUTSIDE[_finish](prepared, values)

    # accelerate takes its mixed-precision wrappers off a model by following `__wrapped__`, and would find the dense forward there.
    del forward.__wrapped__
    forward.__signature__ = signature  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:
        make, args, *rest = super(converted, self).__reduce_ex__(protocol)
        given = (original, make, tuple(original if arg is converted else arg for arg in args), self.diffcr.fixed is not None)
        return (_rebuild, given, *rest)

    def item(self: Any, index: Any) -> Any:  # a slice is a model of its own, and not converted
        chosen = [child for child in self.named_children() if child[0] != "diffcr"][index]
        return original(OrderedDict(chosen)) if isinstance(index, slice) else chosen[1]

    sequential = {"__iter__": _own_children, "__len__": _count_own, "__getitem__": item}
    extra: dict[str, Any] = sequential if issubclass(original, torch.nn.Sequential) else {}
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own_names = {"forward": forward, "__reduce_ex__": reduce, "_diffcr_original": original}
    converted: type[torch.nn.Module] = type(original.__name__, (original,), {**names, **extra, **own_names})
    return converted


def original_class(model: torch.nn.Module) -> type[torch.nn.Module]:
    """Return the class a converted model had before (its own if it is not converted)."""
    return getattr(type(model), "_diffcr_original", type(model))
