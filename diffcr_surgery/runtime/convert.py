"""Convert a model in place, and give it back.

The object gets a subclass of its own class, as ``fully_shard`` and ``parametrize`` do it, and one new child, ``diffcr``. No module is
copied, wrapped or renamed, so checkpoints, adapters, hooks and pipelines go on working.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import ConversionError
from diffcr_surgery.plan import SurgeryPlan, plan
from diffcr_surgery.runtime.execute import answer
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.trace.key import bind_call

__all__ = ["convert_", "original_class", "ratio_loss", "ratio_table", "restore_", "state_of"]

_SUBCLASSES: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _rebuild(original: type, make: Any, args: tuple[Any, ...]) -> Any:
    """Recreate a converted object for pickle and deepcopy, whose class cannot be found by name."""
    converted = _subclass(original)
    return make(*(converted if arg is original else arg for arg in args))


def _own_children(model: torch.nn.Sequential) -> Iterator[torch.nn.Module]:
    """Iterate over what a ``Sequential`` runs: its children without ``diffcr``."""
    return (child for name, child in model.named_children() if name != "diffcr")


def _count_own(model: torch.nn.Sequential) -> int:
    return sum(1 for _ in _own_children(model))


def _subclass(original: type) -> type:
    """Return the converted twin of a model class: same name and module, another forward."""
    with _LOCK:
        found = _SUBCLASSES.get(original)
        if found is not None:
            return found
        signature = inspect.signature(original.forward)  # type: ignore[attr-defined]
        own = signature.replace(parameters=list(signature.parameters.values())[1:])

        @functools.wraps(original.forward)  # type: ignore[attr-defined]
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = bind_call(own, args, kwargs)
            return answer(self, self.diffcr, call, functools.partial(original.forward, self))  # type: ignore[attr-defined]

        def reduce(self: Any, protocol: Any) -> Any:
            standard: Any = super(converted, self).__reduce_ex__  # type: ignore[arg-type]
            make, args, *rest = standard(protocol)
            return (_rebuild, (original, make, tuple(original if arg is converted else arg for arg in args)), *rest)

        extra: dict[str, Any] = {"__iter__": _own_children, "__len__": _count_own} if issubclass(original, torch.nn.Sequential) else {}
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        converted = type(
            original.__name__,
            (original,),
            {**names, **extra, "forward": forward, "__reduce_ex__": reduce, "_diffcr_original": original},
        )
        _SUBCLASSES[original] = converted
        return converted


def original_class(model: torch.nn.Module) -> type:
    """Return the class a converted model had before (its own if it is not converted)."""
    return getattr(type(model), "_diffcr_original", type(model))


def state_of(model: torch.nn.Module) -> DiffCRState:
    """Return ``model.diffcr``.

    Raises:
        ConversionError: If the model is not converted.
    """
    state = getattr(model, "diffcr", None)
    if not isinstance(state, DiffCRState):
        raise ConversionError(f"This {type(model).__name__} is not converted; call convert_(model, plan) first.")
    return state


def convert_(model: torch.nn.Module, plan_or_inputs: Any, config: DiffCRConfig | None = None) -> torch.nn.Module:
    """Turn a model into a DiffCR model, in place.

    With ratios at 0 and a gate other than ``"sigmoid"`` it computes what it did before, bit for bit, outputs and gradients.

    Args:
        model: The model the plan was made for.
        plan_or_inputs: A :class:`SurgeryPlan`, or example inputs to plan with.
        config: Settings, when example inputs are given.

    Returns:
        The same object: same class as far as ``isinstance`` goes, same state-dict keys and ``diffcr.*`` besides.

    Raises:
        ConversionError: If the model is converted already, or the plan is another model's. The model is untouched then.
        SurgeryError: Whatever :func:`plan` raises.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> model = convert_(model.eval(), inputs, DiffCRConfig(target_ratio=0.3, timestep_regions=4))
        >>> isinstance(model, DiTTransformer2DModel), ratio_table(model).shape
        (True, torch.Size([2, 4]))
    """
    if hasattr(model, "diffcr"):
        raise ConversionError(f"This {type(model).__name__} is converted already; call restore_(model) before converting it anew.")
    if isinstance(plan_or_inputs, SurgeryPlan):
        if config is not None and config != plan_or_inputs.config:
            raise ConversionError("convert_ got a plan and a config that differs from the plan's own; plan again with that config.")
        planned = plan_or_inputs
    else:
        planned = plan(model, plan_or_inputs, config)
    _check_fits(model, planned)
    converted = _subclass(type(model))
    state = DiffCRState(planned).train(model.training)
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is not None:
        state.to(device=reference.device, dtype=reference.dtype)
    model.diffcr = state
    try:
        model.__class__ = converted
    except TypeError as error:  # a class with slots or another metaclass's layout cannot be exchanged
        del model.diffcr
        raise ConversionError(
            f"{type(model).__name__} does not allow its class to be exchanged ({error}); it cannot be converted in place."
        ) from error
    return model


def _check_fits(model: torch.nn.Module, planned: SurgeryPlan) -> None:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if name != planned.model_class:
        raise ConversionError(
            f"The plan was made for a {planned.model_class}, not a {name}; call plan(model, example_inputs) on this model."
        )
    modules = dict(model.named_modules())
    for site in planned.routed_sites:
        found = type(modules[site.path]).__name__ if site.path in modules else "nothing"
        if found != site.block_class:
            raise ConversionError(
                f"The plan routes {site.path} ({site.block_class}), but this {type(model).__name__} has {found} there; plan again for it."
            )
    if "forward" in vars(model):
        raise ConversionError(
            f"{type(model).__name__}.forward was replaced on the object itself (an offloading hook of accelerate does that), so a "
            "conversion would go unseen. Remove the hook (accelerate.hooks.remove_hook_from_module), convert, and add it again."
        )


def restore_(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`convert_`: the model has its class, modules and keys back; weights stay as training left them.

    Returns:
        The same object.

    Raises:
        ConversionError: If the model is not converted.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> keys = list(model.state_dict())
        >>> list(restore_(convert_(model, inputs)).state_dict()) == keys
        True
    """
    state_of(model)
    del model.diffcr
    model.__class__ = original_class(model)
    return model


def ratio_table(model: torch.nn.Module) -> torch.nn.Parameter:
    """Return the live ratio table ``l r`` (routed sites × timestep regions, cleanest first), within ``[0, max_ratio]``.

    Writing to it under ``torch.no_grad()`` takes effect at the next call.

    Raises:
        ConversionError: If the model is not converted.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> ratio_table(convert_(model, inputs, DiffCRConfig(initial_ratio=0.3)))
        Parameter containing:
        tensor([[0.3000],
                [0.3000]], requires_grad=True)
    """
    state = state_of(model)
    state.ratios()
    return state.ratio_table


def ratio_loss(model: torch.nn.Module) -> torch.Tensor:
    """Return the budget term λ · (mean ρ − target)² of the paper's loss, a scalar to add to the diffusion loss.

    The mean is over the whole table, regions weighted by how often inference visits them, so that layers and regions can trade.

    Raises:
        ConversionError: If the model is not converted.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> loss = ratio_loss(convert_(model, inputs, DiffCRConfig(target_ratio=0.2, ratio_loss_weight=0.3)))
        >>> round(loss.item(), 4)
        0.012
    """
    state = state_of(model)
    return state.config.ratio_loss_weight * (state.mean_ratio() - state.config.target_ratio) ** 2
