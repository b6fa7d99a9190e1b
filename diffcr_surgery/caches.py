"""What diffusers hangs on blocks: caches (First-Block-Cache and its like), which have to fit routing, and hooks that copies do without.

A cache is a hook that keeps something of one denoising step for the next: a module's output, a residual, a count of steps. At a
routed block other tokens come in at each step, so what was kept belongs to tokens that are not there, and the cache is refused. It is
sound where no token bypasses, and on the inner blocks of a cache that runs or skips a whole stack of blocks (First-Block-Cache, MagCache,
SeaCache): skipped, an inner block returns what it was given, so its gathered tokens go back as they came. What is kept is made by the
first and the last block of the stack alone, and these have to see all tokens.

Nothing of diffusers is imported: its hooks stand in a registry that a module holds as ``_diffusers_hook``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffcr_surgery.errors import ConversionError

__all__ = ["bare_copy", "check_caches", "is_quantized", "uncached"]

_REGISTRY = "_diffusers_hook"
_INNER = frozenset({"fbc_block_hook", "mag_cache_block_hook", "sea_cache_block"})  # on every block of a stack but its first
_FIRST = frozenset({"fbc_leader_block_hook", "mag_cache_leader_block_hook", "sea_cache_leader_block"})


def _keeps_state(hook: Any) -> bool:
    return hook._is_stateful or hasattr(hook, "state_manager")  # some that share a state with others are not marked as stateful


def _cache_hooks(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, hook and references of every hook on ``module`` itself that keeps something from call to call."""
    registry = vars(module).get(_REGISTRY)
    if registry is not None:
        for name, references in zip(registry._hook_order, registry._fn_refs, strict=True):
            hook = registry.hooks[name]
            if _keeps_state(hook):
                yield name, hook, references


def _hooked(module: nn.Module) -> list[nn.Module]:
    """Return everything in ``module`` that has a registry, without the cost of ``modules()``: every call does this."""
    found: list[nn.Module] = []
    everything: list[nn.Module | None] = [module]
    for inner in everything:  # which grows meanwhile
        if inner is not None:
            inside = inner.__dict__
            if _REGISTRY in inside:
                found.append(inner)
            if inside["_modules"]:
                everything += inside["_modules"].values()
    return found


def _place(module: nn.Module, root: nn.Module, path: str = "") -> str:
    name = next(name for name, inner in root.named_modules() if inner is module)
    return ".".join(filter(None, (path, name)))


def check_caches(model: nn.Module, altered: Mapping[str, bool], parts: int = 1) -> None:
    """Refuse caches whose state would be mixed up by routing. Takes microseconds for each block.

    Args:
        model: The converted model.
        altered: Path of each routed block -> whether it may run on fewer tokens than all, or its update is gated, in any region.
        parts: How many runs the call is split into, for samples that lie in several regions.

    Raises:
        ConversionError: If a cache sits on or in an altered block and is none that may, if it sits around a block, where a converted model
            does not come by, or if there is any and the call is split.
    """
    if parts > 1:
        _check_unsplit(model, parts)
    for name, hook, _ in _cache_hooks(model):
        if getattr(hook, "use_stack_boundary", False):
            raise _around(name, hook, type(model).__name__)
    for path, moves in altered.items():
        block = model
        for step in path.split("."):
            if block is not model:
                for name, hook, _ in _cache_hooks(block):
                    raise _around(name, hook, path)
            inner = block._modules.get(step)
            block = getattr(block, step) if inner is None else inner  # a wrapper hands out what it wraps
        if moves:
            _check_block(block, path)


def _check_block(block: nn.Module, path: str) -> None:
    for module in _hooked(block):
        for name, hook, _ in _cache_hooks(module):
            at_an_end = name in _FIRST or getattr(hook, "is_tail", False)
            if module is block and name in _INNER and not at_an_end:
                continue
            way_out = (
                f"Such a cache works if the first and the last of its blocks keep all tokens: convert with a DiffCRConfig(blocks=...) that "
                f"does not match {path}, or set its ratios to 0 before specialize_."
                if at_an_end
                else "Take it off (model.disable_cache()), or leave this block out with DiffCRConfig(blocks=...). Caches that skip a whole "
                "stack of blocks, such as First-Block-Cache, do work if their first and last block are left out."
            )
            raise ConversionError(
                f"The cache {name!r} ({type(hook).__name__}) sits on {_place(module, block, path)} and keeps its state from one step to "
                f"the next, but tokens bypass {path}, other ones at each step, so what it keeps would be used for other tokens. {way_out}"
            )


def _check_unsplit(model: nn.Module, parts: int) -> None:
    for module in _hooked(model):
        for name, hook, _ in _cache_hooks(module):
            place = _place(module, model) or "the model"
            raise ConversionError(
                f"The samples of this call lie in timestep regions of different ratios, so it is run in {parts} parts, and the cache "
                f"{name!r} ({type(hook).__name__}) on {place} would take each part for a step of its own. Give one call the "
                "samples of one region, as a pipeline does, or take the cache off (model.disable_cache())."
            )


def _around(name: str, hook: Any, path: str) -> ConversionError:
    return ConversionError(
        f"The cache {name!r} ({type(hook).__name__}) sits around {path}, which a converted model calls by itself, so the cache would "
        "never act. Take it off (model.disable_cache()), or put it on the block."
    )


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Let every cache of ``model`` stand aside for a while, its state untouched.

    For runs that are none of the user's, such as those that record the model: a cache would count them as steps, and skip blocks.
    """
    switched = []
    try:
        for module in _hooked(model):
            for _, _, references in _cache_hooks(module):
                switched.append((references, references.pre_forward, references.forward, references.post_forward))
                references.pre_forward = _pass_arguments
                references.forward = references.original_forward or references.forward
                references.post_forward = _pass_output
        yield
    finally:
        for references, before, forward, after in reversed(switched):  # a module with two names was switched twice
            references.pre_forward, references.forward, references.post_forward = before, forward, after


def _pass_arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _pass_output(module: nn.Module, output: Any) -> Any:
    return output


def is_quantized(weight: torch.Tensor) -> bool:
    """Tell whether a weight is a tensor of torchao's kind, which stands for float numbers and takes part in few operations."""
    return type(weight).dequantize is not torch.Tensor.dequantize


class _WithoutGraphs(TorchFunctionMode):
    """Copies what a block keeps of a run, such as an attention map, without the graph that made it, which torch refuses to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def bare_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """Return a deep copy of ``block`` without diffusers' hooks and quantisation, its weights ready for a run on ``device``.

    What it keeps of earlier runs is copied without gradients.

    A hook replaces ``forward`` by one that runs the module it was put on, so a plain copy would run the original, whose weights are stored
    elsewhere (group offloading) or in eight bits (layerwise casting). And a step of rounding to integers is no small error in a proof.
    """
    hooked = _hooked(block)
    gone = object()
    memo: dict[int, Any] = {}
    for module in hooked:
        memo[id(vars(module)[_REGISTRY])] = gone
        if vars(module)[_REGISTRY].hooks:  # an empty registry has replaced nothing
            memo[id(vars(module).get("forward"))] = gone
    with _WithoutGraphs():
        twin = copy.deepcopy(block, memo)
    for module in hooked:
        bare = twin.get_submodule(_place(module, block))
        for name in (_REGISTRY, "forward"):
            if vars(bare).get(name) is gone:
                delattr(bare, name)
        for hook in vars(module)[_REGISTRY].hooks.values():
            if hasattr(hook, "compute_dtype"):
                bare.to(hook.compute_dtype)
    for module in twin.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if is_quantized(weight):
                setattr(module, name, nn.Parameter(weight.dequantize(), requires_grad=False))
    return twin.to(device) if hooked else twin
