"""Runs of the model itself, on other inputs of the same shapes, to compare a recording with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from diffcr_surgery._tree import flatten, map_tensors
from diffcr_surgery.trace.key import Call, copies
from diffcr_surgery.trace.perturb import perturb_inputs, tame
from diffcr_surgery.trace.undisturbed import Rewind, foreign_random

__all__ = ["OUT_OF_MEMORY", "BlockSample", "Place", "Reference", "perturbed_run", "reference_run"]

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # it tells of the machine and not of the model, so no trial may take it for an answer

Place = tuple[torch.nn.Module, int]  # a call of a module, and how many calls of it come before in a run


@dataclass(frozen=True)
class BlockSample:
    """Arguments a block was really called with; the raw material of the permutation proof."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """What a run of the model did.

    Attributes:
        tensors: Its inputs.
        output: What it returned.
        left: Its inputs as it left them.
        random: The state of the random generators other than torch's after it.
        samples: Kind of block call -> arguments one such call had.
    """

    tensors: list[torch.Tensor]
    output: Any
    left: list[torch.Tensor]
    random: dict[str, Hashable]
    samples: dict[Hashable, BlockSample]


def perturbed_run(call: Call, forward: Callable[..., Any], rewind: Rewind, places: dict[Hashable, Place]) -> Reference:
    """Run the model on perturbed inputs; fewer are perturbed if it cannot take them, and broken numbers taken out if no output is sound."""
    for integers, given in ((True, call.tensors), (False, call.tensors), (False, list(map(tame, call.tensors)))):
        rewind()
        try:
            reference = reference_run(call, perturb_inputs(given, integers=integers), forward, places)
            if _finite(reference.output):
                return reference
        except OUT_OF_MEMORY:
            raise
        except Exception:  # a model may refuse any input by any error; the unperturbed ones are known to work
            pass
    rewind()
    return reference_run(call, call.tensors, forward, places)


def reference_run(call: Call, tensors: list[torch.Tensor], forward: Callable[..., Any], places: dict[Hashable, Place]) -> Reference:
    """Run the model on copies of ``tensors``.

    Args:
        call: The call to run.
        tensors: What to put in the place of its tensors.
        forward: The model's own bound forward.
        places: Kind of block call -> the one whose arguments are kept.
    """
    given = copies(tensors)
    args, kwargs = call.on(given)
    samples: dict[Hashable, BlockSample] = {}
    with _sampling(samples, places):
        output = forward(*args, **kwargs)
    return Reference(tensors, output, given, foreign_random(), samples)


def _finite(output: Any) -> bool:
    """Tell whether a run made sense: a text mask perturbed to all zeros, say, makes attention divide by zero."""
    return all(bool(t.isfinite().all()) for t in flatten(output)[1] if t.is_floating_point())


@contextmanager
def _sampling(samples: dict[Hashable, BlockSample], places: dict[Hashable, Place]) -> Iterator[None]:
    """Keep the arguments of one call of each kind of block while the body runs the model once."""
    thread = threading.get_ident()
    kinds: dict[torch.nn.Module, dict[int, Hashable]] = {}
    for kind, (module, number) in places.items():
        kinds.setdefault(module, {})[number] = kind

    def keep(wanted: dict[int, Hashable]) -> Callable[..., None]:
        numbers = count()

        def hook(module: torch.nn.Module, args: Any, kwargs: Any = None) -> None:  # another thread may come by while it is being put on
            if threading.get_ident() == thread and (number := next(numbers)) in wanted:
                samples[wanted[number]] = BlockSample(module, *map_tensors((args, kwargs), lambda tensor: tensor.detach().clone()))

        return hook

    handles = []
    try:
        for module, wanted in kinds.items():
            handles.append(module.register_forward_pre_hook(keep(wanted), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
