"""Checkpoints of a training run: what is trained, the optimizers and the random state, whole or not at all.

Frozen weights are not in them, so a checkpoint of a LoRA run is small whatever the model's size. For DDP or a single process; a sharded
model needs torch.distributed.checkpoint.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

import diffcr_surgery as dcs

__all__ = ["Checkpoints"]


class Checkpoints:
    """Folders `step-N` in one folder; the newest is what a run goes on from.

    Args:
        accelerator: With everything prepared; one model.
        folder: Where they lie.
        keep: How many are kept; the oldest go first.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int = 2) -> None:
        self.accelerator, self.folder, self.keep = accelerator, folder, keep
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def newest(self) -> int:
        """Return the number of the last step there is a checkpoint of, 0 if there is none."""
        return max(self._steps(), default=0)

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def save(self, step: int) -> None:
        """Write the checkpoint of a step. Every process makes this call."""
        with dcs.atomic_folder(self.folder / f"step-{step}") as folder:
            self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")

    def resume(self) -> int:
        """Go back to the newest checkpoint and return its step."""
        step = self.newest()
        if step:
            self.accelerator.load_state(str(self.folder / f"step-{step}"))
        return step

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # accelerate would write all of them
        if self.accelerator.is_main_process:
            save_file(trained(self.accelerator.unwrap_model(models[0])), Path(folder, "trained.safetensors"))

    def _load(self, models: list[nn.Module], folder: str) -> None:
        model = self.accelerator.unwrap_model(models.pop())
        state = model.state_dict()
        with torch.no_grad():
            for name, value in load_file(Path(folder, "trained.safetensors")).items():
                state[name].copy_(value)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights of a model, and all of what a conversion added to it."""
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict()
    return {name: value.contiguous() for name, value in state.items() if name in learned or "diffcr." in name}
