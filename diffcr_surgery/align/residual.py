"""Tell blocks that carry their stream on by themselves from those that return an update alone."""

from __future__ import annotations

import torch

from diffcr_surgery._tree import flatten, map_tensors
from diffcr_surgery.align import Alignment
from diffcr_surgery.caches import bare_copy
from diffcr_surgery.trace.key import device_of
from diffcr_surgery.trace.reference import OUT_OF_MEMORY, BlockSample

__all__ = ["has_no_residual"]


def has_no_residual(sample: BlockSample, found: Alignment) -> bool | None:
    """Tell whether a block has no residual of its own: with its linear maps at zero, its stream comes out as zeros.

    Args:
        sample: The block and arguments it was really called with; both stay as they are.
        found: Its alignment, of which the output is read that continues the stream.

    Returns:
        Whether it has none; ``None`` where zero weights make no sense: a weight norm, say, divides by them.
    """
    twin = bare_copy(sample.module, device_of(flatten((sample.args, sample.kwargs))[1])).eval()
    args, kwargs = map_tensors((sample.args, sample.kwargs), torch.clone)
    try:
        for name, weight in twin.named_parameters():
            # Norms keep their scale: one that stands after the residual would hide it otherwise.
            weight.requires_grad_(False).fill_(0.0 if weight.ndim > 1 or "bias" in name else 1.0)
        with torch.no_grad():
            paths, outputs, _ = flatten(twin(*args, **kwargs))
    except OUT_OF_MEMORY:
        raise
    except Exception:  # packed weights, say, that zeros are no values of
        return None
    stream = outputs[paths.index(found.output)]
    return not bool(stream.any()) if bool(stream.isfinite().all()) else None
