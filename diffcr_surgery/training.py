"""What a training loop needs beyond the model: timesteps from one region a batch, and parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcr_surgery.errors import ConfigError, ConversionError, TimestepError
from diffcr_surgery.runtime.convert import state_of

__all__ = ["RegionSampler", "parameter_groups"]

MAX_DRAWS = 1000  # of a batch each; a region that is then still not filled has all but no probability


class RegionSampler:
    """Draws the timesteps of a batch from one timestep region: the fast path, since samples of several regions run apart.

    The region is that of a first draw, the batch is drawn until as many timesteps as wanted lie in it. So a region comes up as often, and
    every timestep is as likely, as if each sample were drawn by itself; only within a batch samples depend on each other.

    Args:
        model: A converted model, bare or wrapped; its regions count.
        draw: ``(count, generator)`` -> timesteps ``count`` as the training loop would draw them one by one, in the unit the model's forward
            takes: uniform, logit-normal, shifted, whatever the recipe says.
        seed: Of the regions. The same in every process of a distributed run, so that all work on one region and none waits for another.
        rank: Number of this process, so that each draws timesteps of its own.

    Raises:
        TimestepError: If a draw lies outside the model's range.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffcr_surgery import DiffCRConfig, convert_
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> model = convert_(model, inputs, DiffCRConfig(timestep_regions=4, timestep_range=(0, 1000)))
        >>> sampler = RegionSampler(model, lambda count, generator: torch.randint(1000, (count,), generator=generator))
        >>> timesteps = sampler(8)
        >>> timesteps.shape, len({int(t) // 250 for t in timesteps})
        (torch.Size([8]), 1)
    """

    def __init__(self, model: torch.nn.Module, draw: Callable[[int, torch.Generator], Tensor], *, seed: int = 0, rank: int = 0) -> None:
        self._regions = state_of(model).plan.regions
        self._draw = draw
        self._shared = torch.Generator().manual_seed(seed)
        self._own = torch.Generator().manual_seed(seed + 1_000_003 * (rank + 1))

    def __call__(self, count: int) -> Tensor:
        """Return ``count`` timesteps of one region."""
        (region,) = self._of(self._draw(1, self._shared))
        found: list[Tensor] = []
        for _ in range(MAX_DRAWS):
            drawn = self._draw(count, self._own)
            found.append(drawn[torch.tensor([r == region for r in self._of(drawn)], device=drawn.device)])
            if sum(map(len, found)) >= count:
                return torch.cat(found)[:count]
        raise TimestepError(
            f"RegionSampler drew a timestep of region {region} and then none to fill a batch of {count} in {MAX_DRAWS} draws; does "
            "draw(count, generator) use its generator, and draw from the same distribution each time?"
        )

    def _of(self, timesteps: Tensor) -> list[int]:
        if timesteps.ndim != 1:
            raise TimestepError(f"RegionSampler: draw(count, generator) gave a shape of {tuple(timesteps.shape)}; expected `count`.")
        return [self._regions.region(t) for t in timesteps.tolist()] if self._regions.count > 1 else [0] * len(timesteps)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of both generators, to resume from."""
        return {"shared": self._shared.get_state(), "own": self._own.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._shared.set_state(state["shared"].cpu())
        self._own.set_state(state["own"].cpu())


def parameter_groups(
    model: torch.nn.Module, *, lr: float, router_lr: float | None = None, ratio_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return groups for a ``torch.optim`` optimizer: the model's own trainable weights, the routers, and the ratio table if asked for.

    Frozen parameters are left out. Routers and ratios are not decayed: decay would pull every ratio to 0 and every score to 1/2.

    Args:
        model: A converted model, bare or wrapped (DDP, peft, ...).
        lr: Learning rate of the model's own weights, LoRA's among them.
        router_lr: That of the routers; ``lr`` if left out.
        ratio_lr: That of the ratio table, for training with :func:`ratio_loss`; without one, the table is left to
            :class:`RatioOptimizer`.
        weight_decay: Of the model's own weights.

    Raises:
        ConversionError: If the model is not converted, or its routers are frozen.
        ConfigError: If ``ratio_lr`` is given and the table is not learned.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffcr_surgery import convert_
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> groups = parameter_groups(convert_(model, inputs), lr=1e-4, router_lr=1e-3, weight_decay=0.01)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('weights', 0.0001, 0.01), ('routers', 0.001, 0.0)]
    """
    state = state_of(model)
    if not all(router.requires_grad for router in state.routers.parameters()):
        raise ConversionError(
            "The routers are frozen, so nothing would decide which tokens bypass. Adding a LoRA adapter freezes every other parameter, as "
            "requires_grad_(False) does; call model.diffcr.requires_grad_(True) afterwards."
        )
    if ratio_lr is not None and not (state.config.learn_ratios and state.ratio_table.requires_grad):
        raise ConfigError("ratio_lr is given, but the ratio table is not learned; leave it out, or convert with learn_ratios=True.")
    ours = {id(p) for p in state.parameters()}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    groups: list[dict[str, Any]] = [{"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay}] if weights else []
    groups.append(
        {"name": "routers", "params": list(state.routers.parameters()), "lr": lr if router_lr is None else router_lr, "weight_decay": 0.0}
    )
    if ratio_lr is not None:
        groups.append({"name": "ratios", "params": [state.ratio_table], "lr": ratio_lr, "weight_decay": 0.0})
    return groups
