"""The ratio table's own update rule: the saving follows a schedule, the gradient decides only who gets what of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from diffcr_surgery._shards import assign_, mean_over_processes, several_processes, whole
from diffcr_surgery.errors import ConfigError, ConversionError, NonFiniteError
from diffcr_surgery.runtime.convert import state_of
from diffcr_surgery.runtime.state import DiffCRState

__all__ = ["RatioOptimizer"]

LARGEST = 1e36  # gradient there is: beyond, the averages overflow in single precision

LEAST_SLOPE = 0.1  # of the mean: where a higher ratio saves next to nothing, as latency curves show, it is not worth an endless push down


class RatioOptimizer(torch.optim.Optimizer):
    """Allocates a scheduled saving between layers and timestep regions.

    With one optimizer for all, the budget's gradient is large and equal for all entries, the diffusion loss's is small and noisy, and the
    table rises in unison. Here the two have separate paths: after each step

        ρ ← Π(ρ − η · s · d),  d = (ĥ − mean ĥ) / √v,  s = max(0, 1 − E / ‖d‖²)

    where ĥ is the moving average of the diffusion loss's gradient over what a little more ratio saves at the entry (1 if tokens are what
    counts), advanced only for the regions the batch saw, and v the moving average of its variance over the entries a batch saw. So a
    step is as long as the gradient stands out of its noise, whatever the scale of the loss, and entries keep their proportions, which
    Adam's second moment of each would take from them. The gradient of a region that made up a part of the samples since the last step is
    divided by that part, so that batches of one region and mixed ones tell the same of an entry.

    E is what ‖d‖² would be if gradients were noise alone, and s a factor in the manner of the positive-part James-Stein estimator
    ("Estimation with quadratic loss", 1961): a table of many regions, each of them seldom seen, is moved less by chance, and a first
    gradient, which nothing confirms yet, moves none.

    At rest all entries between the bounds cost the loss equally much for what they save. Π shifts the table to the scheduled saving and
    clips it to ``[0, max_ratio]``. The saving ramps linearly from its value at the start to the target; η falls linearly to 0. Then the
    table settles: it stands at the bins inference runs at, and for the rest of the training the weights get used to just what they will
    do. (While it moves, a ratio between two bins runs on the tokens of both, and with ``branches="boundary"`` one at ``max_ratio`` on those
    of the bin below.) No budget term is needed in the loss.

    Under DDP and ``fully_shard`` the gradient is averaged over all processes, and every process takes the same step.

    Args:
        model: A converted model, bare or wrapped; its ratio table is the only parameter.
        total_steps: Number of training steps.
        lr: η at the start.
        averaging: Decay of the moving averages, in (0, 1).
        ramp: Share of the steps in which the table moves, after which the target is reached, in (0, 1].
        settle: Share of ``total_steps``, the last ones, in which the table stands, in [0, 1).

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffcr_surgery import DiffCRConfig, convert_, ratio_table
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> model = convert_(model, inputs, DiffCRConfig(target_ratio=0.3)).train()
        >>> optimizer = RatioOptimizer(model, total_steps=4)
        >>> for _ in range(4):
        ...     model(**inputs).sample.square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(ratio_table(model).mean().item(), 4)
        0.3
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        total_steps: int,
        lr: float = 0.1,
        averaging: float = 0.98,
        ramp: float = 0.5,
        settle: float = 0.5,
    ) -> None:
        state = state_of(model)
        fits = total_steps >= 1 and lr >= 0.0 and 0.0 < averaging < 1.0 and 0.0 < ramp <= 1.0 and 0.0 <= settle < 1.0
        if not fits:
            raise ConfigError(
                f"RatioOptimizer got total_steps={total_steps}, lr={lr}, averaging={averaging}, ramp={ramp}, settle={settle}; expected "
                "total_steps >= 1, lr >= 0, averaging in (0, 1), ramp in (0, 1] and settle in [0, 1)."
            )
        if state.specialized or not state.config.learn_ratios:
            raise ConfigError("RatioOptimizer needs learnable ratios: convert with learn_ratios=True, and train before specialize_.")
        _check_learned(state)
        super().__init__(
            [state.ratio_table], {"lr": lr, "averaging": averaging, "ramp": ramp, "settle": settle, "total_steps": total_steps}
        )
        self._diffcr = state
        state.settled = False

    def __getstate__(self) -> dict[str, Any]:
        # torch's own form leaves out what a subclass adds, so that a copy could not take a step.
        return super().__getstate__() | {"_diffcr": self._diffcr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; if the table had settled, the model runs at bins from the next call on."""
        super().load_state_dict(state_dict)
        self._diffcr.settled = self._settled(self.state.get(self.param_groups[0]["params"][0], {}))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the table by the gradient it holds, then to the scheduled saving.

        Raises:
            NonFiniteError: If the gradient holds what is no finite number; the table is untouched then.
            ConversionError: If the table is frozen, or another one than this optimizer was made for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameter = self._parameter()
        if not self.state.get(parameter) and several_processes():  # each may have measured latencies of its own
            self._diffcr.site_costs.copy_(mean_over_processes(self._diffcr.site_costs))
        table, visits, earlier = whole(parameter).double().cpu(), self._diffcr.visits, self.state.get(parameter)
        gradient = self._gradient(parameter)
        moved, state = self._next(table, gradient, {} if earlier is None else earlier)
        settled = self._diffcr.settled
        try:
            assign_(parameter, moved.to(parameter.dtype))
            self._diffcr.settled = self._settled(state)
            if gradient is not None:
                self._diffcr.visits = torch.zeros_like(visits)
            self.state[parameter] = state
            return loss
        except BaseException:  # by Ctrl-C, say: a step that is stopped midway has not been taken
            assign_(parameter, table.to(parameter.dtype))
            self._diffcr.visits, self._diffcr.settled = visits, settled
            self.state.pop(parameter, None)
            if earlier is not None:
                self.state[parameter] = earlier
            raise

    def _parameter(self) -> torch.Tensor:
        """Return the table, if it is still the model's own and trained."""
        parameter: torch.Tensor = self.param_groups[0]["params"][0]
        current = self._diffcr.ratio_table
        gathered = hasattr(parameter, "full_tensor") and not hasattr(current, "full_tensor")  # fully_shard, between forward and backward
        if parameter is not current and not gathered:
            raise ConversionError(
                "The model's ratio table was exchanged, as fully_shard and load_state_dict(assign=True) do it; make the RatioOptimizer "
                "after that."
            )
        _check_learned(self._diffcr)
        return parameter

    def _next(self, table: torch.Tensor, gradient: torch.Tensor | None, earlier: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the table after the step, and the state that goes with it; what is given stays as it is."""
        group, budget, state = self.param_groups[0], self._diffcr.budget, dict(earlier)
        if state:
            for name in ("average", "seen"):  # a state that was loaded is where the table is
                state[name] = state[name].to("cpu", torch.float32, copy=True)
        else:
            state = {
                "step": 0,
                "start": float(budget.saving(table)),
                "average": torch.zeros(table.shape, dtype=torch.float32, device="cpu"),
                "seen": torch.zeros(table.shape[1], dtype=torch.float32, device="cpu"),
                "noise": 0.0,
                "updates": 0,
            }
        state["step"] += 1
        moving = self._moving_steps()
        if self._settled(state):
            return budget.round(table), state  # what has been rounded stays as it is
        slopes = budget.slopes(table).clamp_min(LEAST_SLOPE)
        direction = self._direction(state, None if gradient is None else gradient / slopes, group["averaging"])
        known = (state["seen"] > 0).to(table)  # regions no batch has shown yet have no say
        direction = (direction - (direction * known).sum() / (known.sum() * len(table)).clamp_min(1.0)) * known
        direction *= _above_noise(direction, state["seen"], group["averaging"])
        left = max(0.0, 1.0 - (state["step"] - 1) / moving)
        share = min(1.0, state["step"] / max(1.0, group["ramp"] * moving))
        saving = state["start"] + share * (self._diffcr.target_saving - state["start"])
        step = (group["lr"] * left * direction).clamp(-1.0, 1.0)  # from bound to bound at most
        return budget.project(table - step, saving), state

    def _moving_steps(self) -> int:
        """Return after how many steps the table settles."""
        group = self.param_groups[0]
        return max(1, math.ceil(float(group["total_steps"] * (1.0 - group["settle"])) - 1e-9))

    def _settled(self, state: dict[str, Any]) -> bool:
        return bool(self.param_groups[0]["settle"]) and state.get("step", 0) > self._moving_steps()

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        own = parameter.grad
        if own is None and not several_processes():
            return None
        own = torch.zeros_like(parameter) if own is None else own  # the other processes, which have one, wait for this one's
        gradient = whole(own) if hasattr(own, "full_tensor") else mean_over_processes(own)
        visits = mean_over_processes(self._diffcr.visits)
        # Each region's is smaller than if it had been alone, by its share of the samples since the last step.
        gradient = gradient.cpu().double() / torch.where(visits > 0, visits / visits.sum().clamp_min(1e-12), 1.0)
        broken = sorted({int(row) for row in (~(gradient.abs() < LARGEST)).nonzero()[:, 0]})
        if broken:
            names = [self._diffcr.plan.routed_sites[row].path for row in broken]
            raise NonFiniteError(
                f"The gradients of the ratios of {names} are not finite; the loss is not, or overflowed. Under a GradScaler call "
                "scaler.step(ratio_optimizer), which passes over such a step; otherwise go back to an earlier checkpoint."
            )
        return gradient

    def _direction(self, state: dict[str, Any], gradient: torch.Tensor | None, averaging: float) -> torch.Tensor:
        """Return the averaged harm per saving in units of its noise, ``l r``."""
        average: torch.Tensor = state["average"]
        seen: torch.Tensor = state["seen"]
        if gradient is not None:
            shown = gradient.abs().sum(0) > 0
            seen += shown
            average[:, shown] = averaging * average[:, shown] + (1.0 - averaging) * gradient[:, shown].float()
            if bool(shown.any()):
                own = gradient[:, shown]
                usual = own if own.numel() > 1 else _corrected(average, seen, averaging)[:, seen > 0]
                deviation = (own - usual.mean()).square().sum() / max(1, own.numel() - 1)
                state["updates"] += 1
                state["noise"] = averaging * state["noise"] + (1.0 - averaging) * float(deviation)
        if not state["noise"]:
            return torch.zeros_like(average)
        noise = math.sqrt(state["noise"] / (1.0 - averaging ** state["updates"]))
        return _corrected(average, seen, averaging) / noise


def _corrected(average: torch.Tensor, seen: torch.Tensor, averaging: float) -> torch.Tensor:
    """Return moving averages that started at 0, ``l r``, as means of what they have seen; 0 where that is nothing."""
    return average / torch.where(seen > 0, 1.0 - averaging ** seen.double(), 1.0)


def _above_noise(direction: torch.Tensor, seen: torch.Tensor, averaging: float) -> float:
    """Return which part of a direction, in units of one gradient's noise, is more than averages of noise alone would give."""
    found = float(direction.square().sum())
    if not found:
        return 0.0
    count = seen[seen > 0].double()
    variance = (1.0 - averaging) / (1.0 + averaging) * (1.0 + averaging**count) / (1.0 - averaging**count)  # of an average's entry
    expected = (len(direction) - 1 / len(count)) * float(variance.sum())  # less one degree of freedom, for the mean
    return max(0.0, 1.0 - expected / found)


def _check_learned(state: DiffCRState) -> None:
    if not state.ratio_table.requires_grad:
        raise ConversionError(
            "The ratio table is frozen, so that no gradient would say who gets what. Adding a LoRA adapter freezes it, as "
            "requires_grad_(False) does; call model.diffcr.requires_grad_(True) afterwards."
        )
