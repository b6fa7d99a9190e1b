"""The loop all arms share: equal seeds give equal batches, timesteps and noise, whatever the model is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

import diffcr_surgery as dcs
from study.tasks import PARTS, Task, part_timesteps

__all__ = ["OwnRule", "PapersRule", "Rule", "Schedule", "Teacher", "held_out_losses", "train"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        batch: Images a step.
        lr: The highest learning rate; it warms up over the first 5 % of the steps and falls to 0 along a cosine.
    """

    steps: int
    batch: int
    lr: float


class Rule(Protocol):
    """What moves a ratio table after each step."""

    def step(self, loss: Tensor, part: int) -> None:
        """Move it by the gradient it holds, and forget that.

        Args:
            loss: Of the step, a number.
            part: Of the timestep range, in which the step's batch lay.
        """


class OwnRule:
    """`RatioOptimizer`.

    Args:
        model: A converted model.
        total_steps: Number of training steps.
        relative: Whether each gradient is divided by the usual loss of its part of the timestep range: a part in which the loss is small
            however much is missing then has as much say as one in which it is large.
        options: Of the optimizer.
    """

    def __init__(self, model: nn.Module, total_steps: int, relative: bool, options: Mapping[str, Any]) -> None:
        self._model, self._relative = model, relative
        self._optimizer = dcs.RatioOptimizer(model, total_steps=total_steps, **options)
        self._losses, self._seen = torch.zeros(PARTS), torch.zeros(PARTS)

    def step(self, loss: Tensor, part: int) -> None:
        gradient = dcs.ratio_table(self._model).grad
        if self._relative and gradient is not None:
            self._losses[part] = 0.95 * self._losses[part] + 0.05 * float(loss)
            self._seen[part] += 1
            gradient /= float(self._losses[part] / (1 - 0.95 ** self._seen[part]))
        self._optimizer.step()
        self._optimizer.zero_grad()


class PapersRule:
    """The paper's way: a budget term in the loss, and Adam for the table.

    Args:
        model: A converted model.
        lr: Of Adam.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self._model, self._adam = model, torch.optim.Adam([dcs.ratio_table(model)], lr=lr)

    def step(self, loss: Tensor, part: int) -> None:
        dcs.ratio_loss(self._model).backward()
        self._adam.step()
        self._adam.zero_grad()


@dataclass(frozen=True)
class Teacher:
    """A dense model to learn from besides the data.

    Attributes:
        model: It.
        weight: Of the squared distance to its prediction in the loss.
    """

    model: nn.Module
    weight: float


def _squared(error: Tensor, counts: Tensor) -> Tensor:
    """Return the mean square of an error `b c h w` where it counts, `b 1 h w`."""
    return (error.square() * counts).sum() / (counts.sum() * error.shape[1])


def train(
    task: Task,
    model: nn.Module,
    schedule: Schedule,
    *,
    seed: int,
    rule: Rule | None = None,
    teacher: Teacher | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train a denoiser in place.

    Args:
        task: Where the images come from.
        model: The denoiser, converted or not.
        schedule: How long and how fast.
        seed: Of batches, timesteps and noise.
        rule: What moves the ratio table of a converted model; without one, it stays as it is.
        teacher: A dense model to learn from.
        on_step: Called after every step.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    # The table is left to its rule, and routers are not decayed.
    weights = [p for name, p in model.named_parameters() if not name.startswith("diffcr.")]
    routers = [p for name, p in model.named_parameters() if name.startswith("diffcr.routers.")]
    groups = [{"params": weights, "weight_decay": 0.01}, *([{"params": routers, "weight_decay": 0.0}] if routers else [])]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, foreach=True)
    learning_rate = get_cosine_schedule_with_warmup(optimizer, schedule.steps // 20, schedule.steps)
    model.train()
    for _ in range(schedule.steps):
        given = task.training[torch.randint(len(task.training), (schedule.batch,), generator=generator)]
        part = int(torch.randint(PARTS, (), generator=generator))
        own = part_timesteps(part)
        timesteps = torch.randint(own.start, own.stop, (schedule.batch,), generator=generator).to(device)
        noise = torch.randn(given.clean.shape, generator=generator).to(device)
        given = given.to(device)
        noisy, target = task.objective.noisy_and_target(given.clean, noise, timesteps)
        predicted = model(x=noisy, timestep=timesteps, **given.known)
        loss = _squared(predicted - target, given.counts)
        if teacher is not None:
            with torch.no_grad():
                shown = teacher.model(x=noisy, timestep=timesteps, **given.known)
            loss = loss + teacher.weight * _squared(predicted - shown, given.counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        if rule is not None:
            rule.step(loss.detach(), part)
        on_step()
    model.eval()


@torch.inference_mode()
def held_out_losses(task: Task, model: nn.Module, *, seed: int, batch: int) -> list[float]:
    """Return the loss on held-out images in the middle of each part of the timestep range, with the same noise for every model.

    Args:
        task: Where the images come from.
        model: The denoiser.
        seed: Of the noise.
        batch: Images at a time.
    """
    device = next(model.parameters()).device
    generator, losses = torch.Generator().manual_seed(seed), []
    for part in range(PARTS):
        middle = part_timesteps(part)[len(part_timesteps(part)) // 2]
        squares = counted = 0.0
        for piece in task.held_out.split(batch):
            noise, given = torch.randn(piece.clean.shape, generator=generator).to(device), piece.to(device)
            timesteps = torch.full((len(given),), middle, device=device)
            noisy, target = task.objective.noisy_and_target(given.clean, noise, timesteps)
            error = model(x=noisy, timestep=timesteps, **given.known) - target
            squares += float((error.square() * given.counts).sum()) / error.shape[1]
            counted += float(given.counts.sum())
        losses.append(squares / counted)
    return losses
