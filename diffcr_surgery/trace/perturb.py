"""Other inputs of the same shapes, to tell what a recording computes from what it has merely baked in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["generator", "normal", "perturb_floats", "perturb_inputs", "tame"]

HUGE = 1e4  # larger entries overflow somewhere in a model, in half precision at the latest


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator of its own, so that no global random state is touched."""
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], source: torch.Generator) -> torch.Tensor:
    """Draw from the normal distribution, in single precision on the CPU, whatever torch's defaults are set to."""
    return torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")


def _uniform(shape: torch.Size, source: torch.Generator, device: torch.device) -> torch.Tensor:
    return torch.rand(shape, generator=source, dtype=torch.float32, device="cpu").to(device)


def perturb_floats(tensor: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Shrink each entry by a random factor in [0.5, 1): another value that stays inside the range the model expects."""
    factor = 0.5 + 0.5 * _uniform(tensor.shape, source, tensor.device)
    return (tensor.detach() * factor).to(tensor.dtype)


def perturb_integers(tensor: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Lower positive entries by 0 or 1: ids and labels stay inside the range seen."""
    lower = (_uniform(tensor.shape, source, tensor.device) < 0.5) & (tensor > 0)
    return tensor - lower.to(tensor.dtype)


def tame(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with zeros in place of entries that are huge or no finite numbers; itself if there are none."""
    if not tensor.is_floating_point():
        return tensor
    sound = tensor.detach().abs() < HUGE
    return tensor if bool(sound.all()) else tensor.detach().where(sound, torch.zeros_like(tensor)).requires_grad_(tensor.requires_grad)


def perturb_inputs(tensors: list[torch.Tensor], *, integers: bool) -> list[torch.Tensor]:
    """Return other inputs of the same shapes; booleans, and integers unless asked for, stay as they are."""
    source = generator(0)
    changed: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if id(tensor) in changed:
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            other = perturb_floats(tensor, source).requires_grad_(tensor.requires_grad)
        elif integers and tensor.dtype not in (torch.bool, torch.uint8):
            other = perturb_integers(tensor, source)
        else:
            other = tensor.clone()
        changed[id(tensor)] = other
    return [changed[id(tensor)] for tensor in tensors]
