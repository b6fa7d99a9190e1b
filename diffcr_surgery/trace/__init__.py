"""Stage 1, trace: a model and example inputs become a ``torch.fx`` graph in which every block is one node.

The model is run once on real inputs while every torch function outside a block is logged. For a two-block model

    class Denoiser(nn.Module):
        def forward(self, x, t):
            c = self.embed(t)
            for block in self.blocks:
                x = block(x, c)
            return self.head(x) * 2

the graph reads ``embed``, ``blocks.0``, ``blocks.1``, ``head``, ``mul``: the loop is gone, the modules stay where they are, and the
generated code runs with the model as ``self``. The graph answers calls of the same key alone (see :mod:`.key`) and only after it has
reproduced the model bit for bit on other inputs; a call with another key is recorded anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from diffcr_surgery.errors import SurgeryError, TraceError
from diffcr_surgery.trace.key import bind_call, copies, example_call, input_key
from diffcr_surgery.trace.recording import Recording, Recordings
from diffcr_surgery.trace.reference import OUT_OF_MEMORY

__all__ = ["Trace", "trace"]


class Trace:
    """A recorded model.

    Attributes:
        graph: The graph recorded on the example inputs.
    """

    def __init__(self, model: torch.nn.Module, example_inputs: Any) -> None:
        self._model = model
        self._recordings = Recordings()
        call = example_call(model.forward, example_inputs)
        try:
            self.recording: Recording = self._recordings.answer(model, call, model.forward, lambda recording: recording)
        except (SurgeryError, *OUT_OF_MEMORY):
            raise
        except Exception as error:  # the model's own complaint about inputs it was not made for
            given = {path: tuple(t.shape) for path, t in zip(call.paths, call.tensors, strict=True)}
            raise TraceError(
                f"{type(model).__name__} raised {type(error).__name__} on the example inputs: {error}. They hold tensors of "
                f"the shapes {given}; give inputs the model itself runs on, such as capture_inputs collects."
            ) from error
        self.call = bind_call(model.forward, *call.on(copies(call.tensors)))  # for trial runs: a forward may write into its inputs
        self.key = input_key(model, call)
        self.graph: fx.Graph = self.recording.graph

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as ``model.forward(*args, **kwargs)`` would, bit for bit, from a graph; another key records anew."""
        call = bind_call(self._model.forward, args, kwargs)

        def use(recording: Recording) -> Any:
            recording.forget_proof()
            return recording.run(self._model, call.tensors)

        return self._recordings.answer(self._model, call, self._model.forward, use)

    def __len__(self) -> int:
        """Return the number of graphs recorded so far."""
        return len(self._recordings)


def trace(model: torch.nn.Module, example_inputs: Any) -> Trace:
    """Record ``model`` on example inputs.

    Args:
        model: Any module; it is left as it was, random state, buffers, plain attributes, modes and gradients included.
        example_inputs: A dict of keyword arguments, or a tuple of positional ones.

    Returns:
        A :class:`Trace` with ``.graph`` and ``.run``.

    Raises:
        TraceError: If the inputs do not fit, or the recording does not reproduce the model. Refused by name, outside of submodules that
            are kept whole: counting in an attribute, Python's or NumPy's random numbers, tensors hidden in objects, custom autograd
            functions, and hooks. Known limits: reads of Python state outside the model's own attributes (global variables), or deep in
            objects among them (what is plain of an object's own attributes is followed); and modules that leak tensors other than by
            returning them.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        >>> recorded = trace(model, (torch.randn(2, 4),))
        >>> x = torch.randn(2, 4)
        >>> torch.equal(recorded.run(x), model(x))
        True
    """
    return Trace(model, example_inputs)
