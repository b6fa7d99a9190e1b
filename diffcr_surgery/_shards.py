"""The few things that differ where a parameter is sharded (a DTensor of ``fully_shard``) or each process has a gradient of its own."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

__all__ = ["assign_", "by_first", "is_sharded", "mean_over_processes", "several_processes", "whole"]


def is_sharded(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was called on a module or one inside it, or its parameters are DTensors for another reason."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported for this: who has not, has sharded nothing
    kind = getattr(fsdp, "FSDPModule", ())
    return any(isinstance(m, kind) for m in module.modules()) or any(hasattr(p, "full_tensor") for p in module.parameters())


def several_processes() -> bool:
    """Tell whether this process is one of several of a distributed run."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


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
    if not several_processes():
        return tensor
    on_gpu = tensor.device.type == "cpu" and distributed.get_backend() == "nccl"  # which takes nothing from the CPU
    total = tensor.to("cuda") if on_gpu else tensor.clone()
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).to(tensor.device)


def by_first(work: Callable[[], None]) -> None:
    """Do something in the first of all processes, while the others wait; what it raises there is raised in all of them."""
    if not several_processes():
        work()
        return
    failure: BaseException | None = None
    if distributed.get_rank() == 0:
        try:
            work()
        except BaseException as error:
            failure = error
    told = [_to_send(failure)]
    distributed.broadcast_object_list(told, src=0)
    failure = failure or told[0]
    if failure is not None:
        raise failure


def _to_send(error: BaseException | None) -> BaseException | None:
    """Return an error as another process can be given it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its class may be anyone's
        return RuntimeError(f"the first process raised {type(error).__name__}: {error}")
    return error
