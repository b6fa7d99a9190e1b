"""The ratio table's own update rule: the mean follows a schedule, the gradient decides only who gets what of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffcr_surgery.errors import ConfigError
from diffcr_surgery.runtime.convert import state_of

__all__ = ["RatioOptimizer"]


class RatioOptimizer(torch.optim.Optimizer):
    """Allocates a scheduled mean compression ratio between layers and timestep regions.

    With one optimizer for all, the budget's gradient is large and equal for all entries, the diffusion loss's is small and noisy, and the
    table rises in unison. Here the two have separate paths: after each step

        ρ ← Π(ρ − η · (ĝ − mean ĝ))

    where ĝ is the bias-corrected moving average of the diffusion loss's gradient, advanced only for the regions the batch saw, and Π shifts
    the table to the scheduled mean and clips it to ``[0, max_ratio]``. The mean ramps linearly from its value at the start to the target.
    No budget term is needed in the loss.

    Args:
        model: A converted model; its ratio table is the only parameter.
        total_steps: Number of training steps; the ramp takes ``ramp`` of them.
        lr: η.
        averaging: Decay of the moving average, in [0, 1).
        ramp: Share of ``total_steps`` after which the target is reached, in (0, 1].

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffcr_surgery import DiffCRConfig, convert_, ratio_table
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> model = convert_(model, inputs, DiffCRConfig(target_ratio=0.3)).train()
        >>> optimizer = RatioOptimizer(model, total_steps=4, ramp=0.5)
        >>> for _ in range(4):
        ...     model(**inputs).sample.square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(ratio_table(model).mean().item(), 4)
        0.3
    """

    def __init__(self, model: torch.nn.Module, *, total_steps: int, lr: float = 0.1, averaging: float = 0.98, ramp: float = 0.4) -> None:
        state = state_of(model)
        if not (total_steps >= 1 and lr >= 0.0 and 0.0 <= averaging < 1.0 and 0.0 < ramp <= 1.0):
            raise ConfigError(
                f"RatioOptimizer got total_steps={total_steps}, lr={lr}, averaging={averaging}, ramp={ramp}; expected total_steps >= 1, "
                "lr >= 0, averaging in [0, 1) and ramp in (0, 1]."
            )
        if state.specialized or not state.config.learn_ratios:
            raise ConfigError("RatioOptimizer needs learnable ratios: convert with learn_ratios=True, and train before specialize_.")
        super().__init__([state.ratio_table], {"lr": lr, "averaging": averaging, "ramp": ramp, "total_steps": total_steps})
        self._target, self._budget = state.target_saving, state.budget

    def __getstate__(self) -> dict[str, Any]:
        # torch's own form leaves out what a subclass adds, so that a copy could not take a step.
        own = {name: getattr(self, name) for name in ("_target", "_budget")}
        return super().__getstate__() | own

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the table by the gradient it holds, then to the scheduled mean."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        table = group["params"][0]
        state: dict[str, Any] = self.state[table]
        if not state:
            state["step"] = 0
            state["start"] = float(self._budget.saving(table))
            state["average"] = torch.zeros_like(table)
            state["seen"] = torch.zeros(table.shape[1], device=table.device)
        state["step"] += 1
        direction = self._direction(table, state, group["averaging"])
        share = min(1.0, state["step"] / max(1.0, group["ramp"] * group["total_steps"]))
        mean = state["start"] + share * (self._target - state["start"])
        moved = table - group["lr"] * direction
        table.copy_(self._budget.project(moved, mean))
        return loss

    def _direction(self, table: torch.Tensor, state: dict[str, Any], averaging: float) -> torch.Tensor:
        """Return the averaged gradient without its mean; regions no batch has shown yet have no say."""
        if table.grad is not None:
            size = table.grad.abs().sum(0)
            seen = (size > 0) & size.isfinite()  # an overflow of mixed precision is no opinion
            state["seen"] += seen
            average = state["average"]
            average[:, seen] = averaging * average[:, seen] + (1.0 - averaging) * table.grad[:, seen]
        correction = 1.0 - averaging ** state["seen"]
        corrected: torch.Tensor = state["average"] / correction.clamp_min(1e-12)
        known: torch.Tensor = (state["seen"] > 0).to(table)
        if not bool(known.any()):
            return torch.zeros_like(table)
        mean = (corrected * known).sum() / (known.sum() * table.shape[0])
        return (corrected - mean) * known
