"""The few things that differ where a parameter is sharded (a DTensor of ``fully_shard``) or each process has a gradient of its own."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

__all__ = ["assign_", "mean_over_processes", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered, with gradient; any other as it is. A collective call where it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def assign_(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor, sharded or not, with values that every process has alike."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(tensor, DTensor):
            own = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(own.to_local())
            return
    tensor.copy_(values)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean over all processes of a distributed run; what is averaged already stays what it is."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
