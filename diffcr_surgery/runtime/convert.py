"""Convert a model in place, and give it back.

The object gets a subclass of its own class, as ``fully_shard`` and ``parametrize`` do it, and one new child, ``diffcr``. No module is
copied, wrapped or renamed, so checkpoints, adapters, hooks and pipelines go on working.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Literal, overload

import torch

from diffcr_surgery._shards import is_sharded
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import ConversionError
from diffcr_surgery.plan import SurgeryPlan, modules_of, plan
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.runtime.subclass import original_class, subclass

__all__ = ["changing", "convert_", "original_class", "ratio_loss", "ratio_table", "restore_", "state_of"]

_CHANGING: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def changing(model: torch.nn.Module) -> threading.RLock:
    """Return the lock of a model: one thread at a time converts, specialises or restores it, and the second finds what the first has made.

    The lock as it is: Ctrl-C can stop ``contextlib`` on the way into and out of a context, and would leave it locked.
    """
    with _LOCK:
        return _CHANGING.setdefault(model, threading.RLock())


def state_of(model: torch.nn.Module) -> DiffCRState:
    """Return ``model.diffcr``, of the model itself or of the one converted model inside it (DDP, peft, ``torch.compile`` wrap models).

    Raises:
        ConversionError: If the model is not converted, or several are inside it.
    """
    states = [module for module in model.modules() if isinstance(module, DiffCRState)]
    if not states:
        raise ConversionError(f"This {type(model).__name__} is not converted; call convert_(model, plan) first.")
    if len(states) > 1:
        raise ConversionError(f"This {type(model).__name__} holds {len(states)} converted models; give one of them.")
    return states[0]


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
    with changing(model):
        return _convert(model, plan_or_inputs, config)


def _convert(model: torch.nn.Module, plan_or_inputs: Any, config: DiffCRConfig | None) -> torch.nn.Module:
    if hasattr(model, "diffcr"):
        raise ConversionError(f"This {type(model).__name__} is converted already; call restore_(model) before converting it anew.")
    if is_sharded(model):
        raise ConversionError(
            f"The weights of this {type(model).__name__} are sharded, so that nothing about its blocks can be proven, and routers added "
            "now would not be; convert the model first, then call fully_shard."
        )
    if isinstance(plan_or_inputs, SurgeryPlan):
        if config is not None and config != plan_or_inputs.config:
            raise ConversionError("convert_ got a plan and a config that differs from the plan's own; plan again with that config.")
        planned = plan_or_inputs
    else:
        planned = plan(model, plan_or_inputs, config)
    _check_fits(model, planned)
    converted = subclass(type(model))
    # What is made in inference mode could never be trained, and torch's default device may be another than the model's.
    with torch.inference_mode(False), torch.device("cpu"):
        state = DiffCRState(planned).train(model.training)
    reference = next((p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
    if reference is not None:
        state.to(device=reference.device, dtype=reference.dtype)
    original = type(model)
    try:
        model.diffcr = state
        model.__class__ = converted
    except BaseException as error:
        _take_back(model, original)
        if not isinstance(error, TypeError):
            raise
        raise ConversionError(  # a class with slots or another metaclass's layout cannot be exchanged
            f"{original.__name__} does not allow its class to be exchanged ({error}); it cannot be converted in place."
        ) from error
    return model


def _take_back(model: torch.nn.Module, original: type) -> None:
    """Give a model its class back, and then take ``diffcr`` away; the second is done whatever stops the first."""
    try:
        model.__class__ = original
    finally:
        if type(model) is original:
            model._modules.pop("diffcr", None)


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
    wanted, present = dict(planned.modules), dict(modules_of(model, {site.block_class for site in planned.routed_sites}))
    # Weights may have come since, such as LoRA's; none may have gone.
    wrong = [path for path in {**wanted, **present} if path not in wanted or not wanted[path] <= present.get(path, frozenset())]
    if wrong:
        raise ConversionError(
            f"The plan was made for another {type(model).__name__}: {wrong[0]} is not in both, or has weights of other shapes here. Call "
            "plan(model, example_inputs) on this model."
        )
    if _forward_replaced(model):
        raise ConversionError(
            f"{type(model).__name__}.forward was replaced on the object itself (offloading hooks of accelerate and diffusers do that), so "
            "a conversion would go unseen. Remove the hook (accelerate.hooks.remove_hook_from_module, or "
            "model._diffusers_hook.remove_hook(name)), convert, and add it again."
        )


def _forward_replaced(model: torch.nn.Module) -> bool:
    """Tell whether forward was replaced on the object; what wrappers and hooks that are off left behind is taken away first."""
    if getattr(vars(model).get("forward"), "__func__", None) is type(model).forward:
        del model.forward
    return "forward" in vars(model)


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
    with changing(model):
        return _restore(model)


def _restore(model: torch.nn.Module) -> torch.nn.Module:
    if not isinstance(dict(model.named_children()).get("diffcr"), DiffCRState):  # peft's wrappers hand out the attributes of what they wrap
        state_of(model)  # says what is wrong, unless the converted model is inside this one
        raise ConversionError(f"This {type(model).__name__} wraps a converted model; give restore_ the model itself.")
    if is_sharded(model):
        raise ConversionError(
            f"The weights of this {type(model).__name__} are sharded: fully_shard has exchanged its class, which it cannot take back. "
            "Load the weights (torch.distributed.checkpoint.state_dict.get_model_state_dict gathers them) into a converted model that is "
            "not, and restore that."
        )
    if _forward_replaced(model):
        raise ConversionError(
            f"{type(model).__name__}.forward was replaced on the object itself after the conversion (accelerate does that for mixed "
            "precision and offloading, diffusers for offloading); take that back first: accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False), accelerate.hooks.remove_hook_from_module, or model._diffusers_hook.remove_hook(name)."
        )
    original = original_class(model)
    if type(model) not in (subclass(original), original):  # of its own class already, if a restore was stopped half-way
        raise ConversionError(
            f"Something has given this {original.__name__} another class after the conversion ({type(model).__qualname__}), as "
            "torch.nn.utils.parametrize does for a parameter of the model itself; take that back first."
        )
    _take_back(model, original)
    return model


def ratio_table(model: torch.nn.Module) -> torch.nn.Parameter:
    """Return the live ratio table ``l r`` (routed sites × timestep regions, cleanest first), within ``[0, max_ratio]``.

    Writing to it under ``torch.no_grad()`` takes effect at the next call, until :func:`specialize_` fixes it.

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


@overload
def ratio_loss(model: torch.nn.Module) -> torch.Tensor: ...


@overload
def ratio_loss(model: torch.nn.Module, *, return_parts: Literal[True]) -> tuple[torch.Tensor, dict[str, float]]: ...


def ratio_loss(model: torch.nn.Module, *, return_parts: bool = False) -> torch.Tensor | tuple[torch.Tensor, dict[str, float]]:
    """Return the budget term λ · (saving − target)² of the paper's loss, a scalar to add to the diffusion loss.

    The saving is that of the whole table, regions weighted by how often inference visits them, so that layers and regions can trade. If
    tokens are what counts, it is the mean ratio.

    Args:
        model: A converted model, bare or wrapped.
        return_parts: Whether to return numbers for a log too: ``ratio_loss``; ``saving`` and ``target_saving``, shares of the blocks' dense
            cost; ``executed_saving``, that of the bins inference runs at; and ``mean_ratio``, weighted by region as well.

    Raises:
        ConversionError: If the model is not converted.
        NonFiniteError: If a ratio is no finite number.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> loss = ratio_loss(convert_(model, inputs, DiffCRConfig(target_ratio=0.2, ratio_loss_weight=0.3)))
        >>> round(loss.item(), 4)
        0.012
    """
    state = state_of(model)
    saving = state.saving()
    loss = state.config.ratio_loss_weight * (saving - state.target_saving) ** 2
    if not return_parts:
        return loss
    parts = {
        "ratio_loss": float(loss.detach()),
        "saving": float(saving.detach()),
        "target_saving": state.target_saving,
        "executed_saving": float(state.budget.saving(state.executed_ratios())),
        "mean_ratio": float((state.ratios() * state.budget.region_weights).sum(1).mean()),
    }
    return loss, parts
