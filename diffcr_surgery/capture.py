"""Collect the inputs a model is really called with, from a pipeline or a training step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffcr_surgery._tree import map_tensors
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace.key import bind_call

__all__ = ["CapturedInputs", "capture_inputs"]


class CapturedInputs:
    """The calls seen so far, as dicts of keyword arguments."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the first call.

        Raises:
            TraceError: If the model was not called.
        """
        if not self.calls:
            raise TraceError("capture_inputs saw no call of the model; run the pipeline or the model itself inside the `with` block.")
        return self.calls[0]


@contextmanager
def capture_inputs(model: torch.nn.Module) -> Iterator[CapturedInputs]:
    """Note the arguments of every call of ``model`` made inside the ``with`` block, by name.

    Tensors are copied and detached. Calls of other threads, and calls of ``model.forward`` that go round hooks, are not seen.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> with capture_inputs(model) as seen:
        ...     y = model(torch.ones(1, 2))
        >>> {name: tuple(t.shape) for name, t in seen.inputs.items()}
        {'input': (1, 2)}
    """
    seen = CapturedInputs()
    thread = threading.get_ident()

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == thread:
            call = bind_call(module.forward, args, kwargs)
            seen.calls.append(map_tensors(call.arguments, lambda tensor: tensor.detach().clone()))

    with model.register_forward_pre_hook(note, prepend=True, with_kwargs=True):
        yield seen
