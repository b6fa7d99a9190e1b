"""The diffusion loss a pipeline's scheduler stands for: how timesteps are drawn, noise is mixed in, and what is to be predicted."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

__all__ = ["FlowMatching", "NoisePrediction", "objective_of"]


class NoisePrediction:
    """The loss of DDPM: timesteps uniform over whole numbers; target epsilon, v or the sample (arXiv 2006.11239, 2202.00512).

    Args:
        scheduler: The pipeline's; its noise schedule and prediction type count.
    """

    def __init__(self, scheduler: Any) -> None:
        self._noising: Any = DDPMScheduler.from_config(scheduler.config)
        self.highest = float(self._noising.config.num_train_timesteps)
        self.name = self._noising.config.prediction_type

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` timesteps, in the scheduler's unit."""
        return torch.randint(int(self.highest), (count,), generator=generator)

    def noisy_and_target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the model is shown, and what it is to predict: both of the shape of `clean`, `b ...`."""
        timesteps = timesteps.round().long()
        noisy = self._noising.add_noise(clean, noise, timesteps)
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self._noising.get_velocity(clean, noise, timesteps),
            "sample": lambda: clean,
        }
        return noisy, targets[self.name]()


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x = (1 - σ) clean + σ noise, target noise - clean, σ logit-normal, then shifted (arXiv 2403.03206).

    Attributes:
        highest: The timestep of pure noise.
        shift: How far σ moves towards noise: shift · u / (1 + (shift - 1) · u).
    """

    highest: float
    shift: float
    name = "flow matching"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` timesteps, in the scheduler's unit."""
        u = torch.randn(count, generator=generator).sigmoid()
        return self.highest * self.shift * u / (1 + (self.shift - 1) * u)

    def noisy_and_target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the model is shown, and what it is to predict: both of the shape of `clean`, `b ...`."""
        sigma = (timesteps / self.highest).to(clean).reshape(-1, *[1] * (clean.ndim - 1))
        return torch.lerp(clean, noise, sigma), noise - clean


def objective_of(scheduler: Any) -> NoisePrediction | FlowMatching:
    """Return the loss that fits a pipeline's scheduler.

    Raises:
        ValueError: If it is none of those known.
    """
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch"):
        # Where the shift depends on the resolution (FLUX), it is the pipeline's matter in sampling and left out in training.
        shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
        return FlowMatching(float(config.num_train_timesteps), shift)
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FlowMatching(float(config.num_train_timesteps), float(config.get("flow_shift", 1.0)))
    if config.get("prediction_type") in ("epsilon", "v_prediction", "sample"):
        return NoisePrediction(scheduler)
    raise ValueError(
        f"{type(scheduler).__name__} predicts {config.get('prediction_type')!r}; expected epsilon, v_prediction, sample or a flow"
    )
