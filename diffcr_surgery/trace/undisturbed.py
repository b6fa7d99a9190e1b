"""Run a model without leaving a trace: random states, buffers and plain attributes are put back."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from diffcr_surgery._tree import freeze, map_leaves, plain
from diffcr_surgery.caches import uncached
from diffcr_surgery.trace.key import settings
from diffcr_surgery.trace.recorder import rng_state

__all__ = ["Rewind", "equal", "foreign_random", "own_modules", "set_rng_state", "undisturbed"]


class Rewind(Protocol):
    """What :func:`undisturbed` yields."""

    def __call__(self, keep: Collection[int] = ()) -> None:
        """Put everything back, but for the plain attributes of the modules with the ``id`` in ``keep``."""


def set_rng_state(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def own_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules of a model, without ``diffcr``, which the original forward never reads."""
    return [module for path, module in model.named_modules() if path.split(".")[0] != "diffcr"]


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[Rewind]:
    """Restore random states, buffers and plain attributes at the end; the yielded function does so in between. Caches stand aside."""
    start, foreign = rng_state(device), _foreign_states()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    # Whether a module trains is no doing of its forward; another thread may switch it meanwhile.
    settled = ((module, name, key) for module in own_modules(model) for name, key in settings(module) if name != "training")
    attributes = [_Attribute(*each) for each in settled]

    def rewind(keep: Collection[int] = ()) -> None:
        set_rng_state(start, device)
        _set_foreign_states(foreign)
        with torch.no_grad():
            for buffer, value in buffers:
                if not equal(buffer, value):
                    buffer.copy_(value)
        for attribute in attributes:
            if id(attribute.module) not in keep:
                attribute.put_back()

    try:
        with uncached(model):
            yield rewind
    finally:
        rewind()


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are the same, bit for bit but for what kind of no number they hold."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())


# --- plain attributes --------------------------------------------------------------------------------------------------
class _Attribute:
    """A plain attribute as it was."""

    def __init__(self, module: torch.nn.Module, name: str, key: Hashable) -> None:
        self.module, self.name, self.key = module, name, key
        self.value = vars(module)[name]
        self.content = copy.deepcopy(self.value)

    def put_back(self) -> None:
        """Set it again if it is another.

        One that was ``None`` or is no plain value any more stays: the first run of a model may make it once and for all.
        """
        now = plain(vars(self.module).get(self.name))
        if self.value is None or now is None or now == self.key:
            return
        if type(self.value) is list:  # the very object, which others may share
            self.value[:] = copy.deepcopy(self.content)
        elif type(self.value) in (dict, set):
            self.value.clear()
            self.value.update(copy.deepcopy(self.content))
        vars(self.module)[self.name] = self.value


# --- randomness that is not torch's --------------------------------------------------------------------------------------
def _foreign_states() -> dict[str, Any]:
    """Return the states of the global generators of Python and, where it is in use, of NumPy."""
    numpy = sys.modules.get("numpy.random")
    return {"random": random.getstate(), **({"numpy.random": numpy.get_state(legacy=False)} if numpy else {})}


def _set_foreign_states(states: dict[str, Any]) -> None:
    random.setstate(states["random"])
    if "numpy.random" in states:
        sys.modules["numpy.random"].set_state(states["numpy.random"])


def foreign_random() -> dict[str, Hashable]:
    """Return module -> the state of its global random generator, to compare."""
    content = lambda _, leaf: leaf.tobytes() if hasattr(leaf, "tobytes") else leaf  # noqa: E731
    return {name: freeze(map_leaves(state, content)) for name, state in _foreign_states().items()}
