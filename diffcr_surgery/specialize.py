"""Stage 7, specialize: fix the ratios, drop what no longer decides anything."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from diffcr_surgery._shards import is_sharded
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import ConfigError, ConversionError, NonFiniteError
from diffcr_surgery.ratios import Budget
from diffcr_surgery.runtime.convert import changing, state_of
from diffcr_surgery.runtime.execute import costs_of
from diffcr_surgery.runtime.state import Achieved, DiffCRState
from diffcr_surgery.runtime.subclass import leave_to_compiler, original_class
from diffcr_surgery.trace.key import example_call

__all__ = ["specialize_"]

logger = logging.getLogger(__name__)


def specialize_(
    model: torch.nn.Module,
    budget: float | None = None,
    *,
    cost: Literal["tokens", "flops", "latency"] | None = None,
    example_inputs: Any = None,
) -> torch.nn.Module:
    """Make a converted model an inference model: its ratios become bins, fixed; routers that decide nothing go.

    Every call then runs with kept counts that are Python ints: a block at ratio 0 is plainly called, one at ratio 1 is left out, tables are
    gathered once for each set of kept tokens, and tokens are put back in place where no one else reads their stream. It runs under
    ``torch.compile(fullgraph=True)`` without a graph break, and compiles once for each region and input shape. The result equals the
    converted model in ``eval()`` at the same ratios. Save the adapter first: routers that went cannot be trained on.

    Args:
        model: A converted model.
        budget: Share of the dense cost to keep: of the model's FLOPs or latency, or of the routed blocks' tokens. It picks another point
            than the trained one off the same table: the nearest that shifting all ratios alike leads to. A larger budget never takes
            tokens from a block. ``None`` keeps the trained ratios.
        cost: What the budget counts, if not what the configuration does; it is counted or measured anew then, as it is whenever
            ``example_inputs`` are given: latency depends on the device and the size of the inputs.
        example_inputs: Inputs to count or measure on, as for :func:`plan`.

    Returns:
        The same object, in ``eval()``. ``print(model.diffcr.achieved)`` says what it costs, and what was requested.

    Raises:
        ConversionError: If the model is not converted, or specialised already.
        NonFiniteError: If a ratio or a weight of a router is no finite number.
        ConfigError: If the budget is out of range, or a cost cannot be counted without inputs.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> from diffcr_surgery import convert_, ratio_table
        >>> model = specialize_(convert_(model, inputs), budget=0.7)
        >>> ratio_table(model).flatten(), str(model.diffcr.achieved)
        (tensor([0.3000, 0.3000]), "0.700 of the routed blocks' tokens, 0.700 requested; mean ratio 0.300")
    """
    state = state_of(model)
    converted = next(module for module in model.modules() if module._modules.get("diffcr") is state)
    with changing(converted):
        if converted._modules.get("diffcr") is not state:  # restored by another thread meanwhile, and perhaps converted anew
            state = state_of(model)
        return _specialize(model, converted, state, budget, cost, example_inputs)


def _specialize(
    model: torch.nn.Module,
    converted: torch.nn.Module,
    state: DiffCRState,
    budget: float | None,
    cost: Literal["tokens", "flops", "latency"] | None,
    example_inputs: Any,
) -> torch.nn.Module:
    if state.specialized:
        raise ConversionError("This model is specialised already; restore_ it and load its adapter to choose another budget.")
    if is_sharded(model):
        raise ConversionError(
            f"The weights of this {type(model).__name__} are sharded, so that routers cannot be taken out; save_adapter, and load it onto "
            "a model that is not. For samples during training, model.eval() runs the same ratios."
        )
    for name, weight in state.routers.named_parameters():
        if not bool(weight.isfinite().all()):  # a call would say so now, and no longer then
            path = state.plan.routed_sites[int(name.partition(".")[0])].path
            raise NonFiniteError(
                f"The router of {path} has weights that are no finite numbers; the loss or the learning rate broke training. Load an "
                "earlier adapter."
            )
    counted = replace(state.config, cost=cost or state.config.cost)
    measured = _budget(converted, state, counted, example_inputs)
    whole = float(measured.costs[:, 0].sum())  # of the model, the share that the routed blocks take
    ratios = state.executed_ratios()
    if budget is not None:
        lowest = 1.0 - whole * measured.uniform(state.config.max_ratio)
        if not (isinstance(budget, (int, float)) and lowest - 1e-6 <= budget <= 1.0):
            raise ConfigError(f"budget={budget!r}: expected a share of the dense {counted.cost} in [{lowest:g}, 1].")
        ratios = measured.dial(state.ratios(), (1.0 - budget) / whole)
    share, mean = 1.0 - whole * float(measured.saving(ratios)), float((ratios * measured.region_weights).sum(1).mean())
    leave_to_compiler(type(converted))
    with _all_or_nothing(model, state):
        for row in [row for row in state.routers if not _decides(state, ratios, int(row))]:
            del state.routers[row]
        model.eval()
        state.fix(ratios, Achieved(counted.cost, share, budget, mean))
    logger.info("%s specialised: %s", type(model).__name__, state.achieved)
    return model


@contextmanager
def _all_or_nothing(model: torch.nn.Module, state: DiffCRState) -> Iterator[None]:
    """Put back what the body has changed, if it raises."""
    training = [module for module in model.modules() if module.training]
    table, routers = state.ratio_table, dict(state.routers.items())
    values, gradient, learned = table.detach().clone(), table.grad, table.requires_grad
    try:
        yield
    except BaseException:
        state.fixed = state.achieved = None
        table.data.copy_(values)
        table.requires_grad_(learned).grad = gradient
        state.routers._modules.clear()  # to have them in their order again
        state.routers._modules.update(routers)
        for module in training:
            module.training = True
        raise


def _budget(converted: torch.nn.Module, state: DiffCRState, config: DiffCRConfig, example_inputs: Any) -> Budget:
    """Return what ratios save in the wanted unit: as known from planning, or counted now."""
    if example_inputs is None:
        if config.cost != state.config.cost:
            raise ConfigError(
                f"cost={config.cost!r}: the model was planned with cost={state.config.cost!r}, so this one has to be counted now; give "
                "example_inputs=... as for plan."
            )
        return state.budget
    dense = functools.partial(original_class(converted).forward, converted)
    costs = costs_of(converted, state, example_call(converted.forward, example_inputs), dense, config)
    return Budget.of(config, torch.tensor(costs, dtype=torch.float64, device="cpu"))


def _decides(state: DiffCRState, ratios: torch.Tensor, router: int) -> bool:
    """Tell whether any block needs the scores of a router at these ratios."""
    rows = [row for row, site in enumerate(state.plan.routed_sites) if site.router == router]
    return state.config.gate == "sigmoid" or bool(ratios[rows].any())
