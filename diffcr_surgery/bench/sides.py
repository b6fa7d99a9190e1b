"""What is compared: dense, routed, its limit and token merging, each a model of its own, all on one set of weights."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery.bench.hooks import Limit, attach
from diffcr_surgery.runtime.convert import state_of

__all__ = ["DENSE", "LIMIT", "MERGING", "ROUTED", "Side", "build_sides", "load_merging"]

DENSE, ROUTED, LIMIT, MERGING = "dense", "routed", "limit", "token merging"

Merging = Callable[[nn.Module, dcs.SurgeryPlan, float], None]


@dataclass(frozen=True)
class Side:
    """One of the models compared.

    Attributes:
        name: What is done to its blocks.
        ratio: The ratio asked for.
        model: It. Its weights are those of all other sides.
    """

    name: str
    ratio: float
    model: nn.Module


def build_sides(
    dense: nn.Module, inputs: dict[str, Any], ratios: Sequence[float], merging: Merging | None, limit: bool = True
) -> tuple[list[Side], dcs.SurgeryPlan, list[str]]:
    """Build the sides of a comparison.

    Args:
        dense: The model; it stays as it is.
        inputs: Arguments of a call.
        ratios: Ratios to compare at; routed at 0 is built besides.
        merging: What adds token merging to a model; `None` leaves it out.
        limit: Whether to build the limit too.

    Returns:
        The sides, the plan of their blocks, and a note for each side that could not be built.
    """
    first = _routed(dense, inputs, 0.0)
    plan = state_of(first).plan
    sides, notes = [Side(DENSE, 0.0, dense), Side(ROUTED, 0.0, first)], []
    for ratio in ratios:
        sides.append(Side(ROUTED, ratio, _routed(dense, inputs, ratio)))
        if limit:
            attach(twin := share(dense), plan, Limit(plan, ratio))
            sides.append(Side(LIMIT, ratio, twin))
        if merging is not None:
            try:
                merging(twin := share(dense), plan, ratio)
            except ValueError as error:
                notes.append(f"{MERGING} at {ratio:g} is missing: {error}.")
            else:
                sides.append(Side(MERGING, ratio, twin))
    return sides, plan, notes


def share(model: nn.Module) -> nn.Module:
    """Return a twin with modules of its own and the same tensors as weights and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _routed(dense: nn.Module, inputs: dict[str, Any], ratio: float) -> nn.Module:
    """Return a twin, converted and specialised at a ratio. Its routers are random: with zeros all scores would tie."""
    model = dcs.convert_(share(dense), inputs, dcs.DiffCRConfig(initial_ratio=ratio, learn_ratios=False))
    for weight in state_of(model).routers.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return dcs.specialize_(model)


def load_merging(path: Path) -> tuple[Merging | None, list[str]]:
    """Load token merging from a file that has `attach(model, plan, ratio)`; it is not installed with the package.

    Returns:
        That function, and no note; or `None`, and a note that says what is missing.
    """
    if not path.is_file():
        why = (
            f"there is no file {path}. It is not installed with the package; give --baseline the path of recipes/baselines/token_merging.py"
        )
        return None, [f"{MERGING} is missing: {why}."]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        return None, [f"{MERGING} is missing: {path} is no Python file."]
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Merging = module.attach
    return found, []
