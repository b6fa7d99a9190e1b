"""Stage 7, specialize: fix the ratios, drop what no longer decides anything."""

from __future__ import annotations

import torch

from diffcr_surgery._shards import is_sharded
from diffcr_surgery.errors import ConfigError, ConversionError
from diffcr_surgery.runtime.convert import state_of
from diffcr_surgery.runtime.subclass import leave_to_compiler

__all__ = ["specialize_"]


def specialize_(model: torch.nn.Module, budget: float | None = None) -> torch.nn.Module:
    """Make a converted model an inference model: its ratios become bins, fixed; routers that decide nothing go.

    Every call then runs one pass with kept counts that are Python ints: a site at ratio 0 is a plain call of its block. The result equals
    the converted model in ``eval()`` at the same ratios. Save the adapter first: routers that went cannot be trained on.

    Args:
        model: A converted model.
        budget: Share of the blocks' dense cost to keep, counted as the configuration does (tokens, FLOPs or latency): picks another point
            than the trained one by shifting the table until it saves ``1 - budget``. ``None`` keeps the table's own saving.

    Returns:
        The same object, in ``eval()``.

    Raises:
        ConversionError: If the model is not converted, or specialised already.
        ConfigError: If the budget is out of range.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> from diffcr_surgery import convert_, ratio_table
        >>> model = specialize_(convert_(model, inputs), budget=0.7)
        >>> ratio_table(model).flatten()
        tensor([0.3000, 0.3000])
    """
    state = state_of(model)
    if state.specialized:
        raise ConversionError("This model is specialised already; restore_ it and load its adapter to choose another budget.")
    if is_sharded(model):
        raise ConversionError(
            f"The weights of this {type(model).__name__} are sharded, so that routers cannot be taken out; save_adapter, and load it onto "
            "a model that is not. For samples during training, model.eval() runs the same ratios."
        )
    lowest = 1.0 - state.budget.uniform(state.config.max_ratio)
    if budget is not None and not (isinstance(budget, (int, float)) and lowest - 1e-6 <= budget <= 1.0):
        raise ConfigError(f"budget={budget!r}: expected the share of the blocks' cost to keep, in [{lowest:g}, 1].")
    ratios = state.executed_ratios()
    if budget is not None:
        ratios = state.budget.round(state.budget.project(state.ratios(), 1.0 - budget))
    dead = [str(row) for row, values in enumerate(ratios) if not values.any() and state.config.gate != "sigmoid"]
    state.fix(ratios)
    for row in dead:
        del state.routers[row]
    leave_to_compiler(next(type(module) for module in model.modules() if module._modules.get("diffcr") is state))
    return model.eval()
