"""A converted model next to the original it came from, and how a law calls them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import flatten, map_leaves, map_tensors
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.plan import SurgeryPlan
from diffcr_surgery.runtime.convert import convert_, ratio_table, restore_, state_of
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.testing.by_hand import Way, bracket
from diffcr_surgery.trace.key import example_call

__all__ = ["Pair", "call", "differentiate", "projections", "rounding", "sample_of", "sample_of_output"]

# Equal up to rounding, in units of the largest entry: by hand, sums over kept tokens are taken in another order.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass
class Pair:
    """A converted model and the original it came from, both copies.

    Attributes:
        original: Not converted, in eval.
        converted: With routers that tell tokens apart, if it was converted here.
        arguments: Arguments of the call, by name.
    """

    original: nn.Module
    converted: nn.Module
    arguments: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, config: DiffCRConfig | None, seed: int) -> Pair:
        """Copy a model twice, onto the CPU and in single precision at least: converted, if it is not yet, and not converted.

        Raises:
            ValueError: If the model is specialised, or converted and given other settings; if its forward takes unnamed arguments.
        """
        if hasattr(model, "diffcr") and (config is not None or state_of(model).specialized):
            raise ValueError("The laws take a plain model and settings, or a converted one with the settings it has, not yet specialised.")
        converted = copy.deepcopy(model).cpu()
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in converted.parameters()):
            converted = converted.float()
        unnamed = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
        if unnamed:
            raise ValueError(f"{type(model).__name__}.forward takes {unnamed} by position alone; the laws call a model by names.")
        inputs = map_tensors(inputs, _raised)
        _wake(converted, seed)
        original = copy.deepcopy(converted)
        if hasattr(model, "diffcr"):
            restore_(original)
        else:
            convert_(converted, inputs, config)
            _train_by_hand(converted, seed)
        return cls(original.eval(), converted, example_call(original.forward, inputs).arguments)

    @property
    def state(self) -> DiffCRState:
        """Return the converted model's ``diffcr``."""
        return state_of(self.converted)

    @property
    def plan(self) -> SurgeryPlan:
        """Return the plan it was converted by."""
        return self.state.plan

    def regions(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the region of each sample in exact arithmetic: the range in equal parts, each with its lower end."""
        settled, batch = self.plan.regions, _batch_size(self.plan, arguments)
        value = arguments.get(settled.argument) if settled.argument else None
        if settled.count == 1 or value is None:
            return [0] * batch
        value = torch.as_tensor(value).detach().double()
        times = (value.flatten(1)[:, 0] if value.ndim > 1 else value.flatten()).tolist()  # those of a sample's tokens lie in one region
        low, high = Fraction(settled.low), Fraction(settled.high)
        found = [min(settled.count - 1, math.floor((Fraction(t) - low) * settled.count / (high - low))) for t in times]
        return found * batch if len(found) == 1 else found

    def ways(self, region: int, training: bool) -> list[list[Way]]:
        """Return how each site is run in a region: in training at the two bins around its ratio, else at one."""
        config = self.state.config
        if training and config.learn_ratios:
            return [bracket(ratio, config.reachable_bins) for ratio in self.state.ratios()[:, region].tolist()]
        return [[Way(1.0, row[region])] for row in self.executed()]

    def executed(self) -> list[list[float]]:
        """Return the ratio of each site and region in eval, as the settings write it and not as the table rounds it."""
        bins = self.state.config.bins

        def nearest(ratio: float) -> float:
            return min(bins, key=lambda own: abs(own - ratio))

        return [[nearest(ratio) for ratio in row] for row in self.state.executed_ratios().tolist()]

    def at(self, arguments: Mapping[str, Any], regions: Sequence[int]) -> dict[str, Any]:
        """Return the arguments with timesteps in the middles of the given regions."""
        settled = self.plan.regions
        value = arguments[str(settled.argument)]
        middles = [settled.low + (settled.high - settled.low) * (region + 0.5) / settled.count for region in regions]
        return {**arguments, str(settled.argument): torch.tensor(middles, dtype=torch.float64, device=value.device).to(value.dtype)}

    def spread(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with timesteps of several regions, if they have one each and all lie in one."""
        regions, count = self.regions(arguments), self.plan.regions.count
        value = arguments.get(self.plan.regions.argument or "")
        if count == 1 or len(set(regions)) > 1 or not (isinstance(value, Tensor) and value.shape == (len(regions),)):
            return arguments
        return self.at(arguments, [i % count for i in range(len(regions))])

    def of_one_region(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the arguments at timesteps of each region in turn."""
        value, batch = arguments.get(self.plan.regions.argument or ""), len(self.regions(arguments))
        if self.plan.regions.count == 1 or not (isinstance(value, Tensor) and value.shape == (batch,)):
            return []
        return [self.at(arguments, [region] * batch) for region in range(self.plan.regions.count)]


def _raised(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _wake(model: nn.Module, seed: int) -> None:
    """Give noise to weights that are all zero: a block behind a closed gate does nothing that a law could see."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not bool(parameter.any()) and "diffcr" not in name.split("."):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))


def _train_by_hand(converted: nn.Module, seed: int) -> None:
    """Give routers an opinion, and every entry of the table a ratio of its own: between two bins, or now and then on one or on a bound."""
    source, state = torch.Generator().manual_seed(seed + 1), state_of(converted)
    with torch.no_grad():
        for router in state.routers.values():
            weight = router.get_parameter("weight")
            weight.copy_(torch.randn(weight.shape, generator=source) * 2 / weight.numel() ** 0.5)
        if state.config.learn_ratios:
            table, most = ratio_table(converted), state.config.max_ratio
            between = torch.rand(table.shape, generator=source) * most
            ends = torch.tensor([ratio for ratio in state.config.bins if ratio < most] + [most])
            exact = ends[torch.randint(len(ends), table.shape, generator=source)]
            table.copy_(torch.where(torch.rand(table.shape, generator=source) < 0.3, exact, between))


def _batch_size(planned: SurgeryPlan, arguments: Mapping[str, Any]) -> int:
    """Return the number of samples: of timesteps where there are several, else of rows in the first floating-point input."""
    if any("b" not in next(iter(site.aligned.values())).split() for site in planned.routed_sites):
        return 1  # a packed stream is one sample
    timestep = arguments.get(planned.regions.argument or "")
    if isinstance(timestep, Tensor) and timestep.ndim and len(timestep) > 1:
        return len(timestep)
    return next((len(v) for v in flatten(arguments)[1] if v.ndim > 1 and v.is_floating_point()), 1)


def sample_of(arguments: Mapping[str, Any], index: int, batch: int, shared: Collection[str]) -> dict[str, Any]:
    """Return one sample of a call: of every tensor whose first axis is as long as the batch, unless it is shared, that row."""

    def cut(path: str, leaf: Any) -> Any:
        own = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch and path.split(".")[0] not in shared
        return leaf[index : index + 1] if own else leaf

    return {name: map_leaves(value, cut, name) for name, value in arguments.items()}


def rounding(tree: Any) -> float:
    """Return the tolerance that rounding asks for in a tree's dtypes, and in autocast's, as :func:`compare.same` takes it."""
    tensors = flatten(tree)[1]
    dtypes = [t.dtype for t in tensors]
    dtypes += [torch.get_autocast_dtype(t.device.type) for t in tensors if torch.is_autocast_enabled(t.device.type)]
    return max((_ROUNDING.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model from a fixed random state, on containers of its own: a forward may pop from them."""
    own = map_leaves(inputs, lambda _, leaf: leaf)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(**own) if isinstance(own, dict) else model(own) if isinstance(own, Tensor) else model(*own)


def differentiate(model: nn.Module, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a model's output, and the gradient of a fixed random projection of it in every parameter that gets one."""
    model.zero_grad()
    with torch.enable_grad():
        output = call(model, inputs)
        outputs = [t for t in flatten(output)[1] if t.is_floating_point()]
        losses = [loss for loss in projections(outputs) if loss.requires_grad]
    if losses:
        torch.stack([loss.float() for loss in losses]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return map_tensors(output, Tensor.detach), gradients


def projections(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each output times fixed noise: one row for all samples, so that a sample's is its share of the batch's."""
    source = torch.Generator().manual_seed(7)
    return [(t * torch.randn(t.shape[1:] if t.ndim > 1 else (), generator=source).to(t.device, t.dtype)).sum() for t in outputs]


def sample_of_output(output: Any, index: int, batch: int) -> Any:
    """Return one sample of what a model returns."""
    return map_leaves(
        output, lambda _, t: t[index : index + 1] if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch and batch > 1 else t
    )
