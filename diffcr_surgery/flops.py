"""Floating-point operations of a call, attention on a CPU included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "flop_counter"]


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of floating-point operations, to be used in a `with` block.

    torch has no formula for the kernel that scaled dot-product attention runs on a CPU, and counts nothing for it; here it counts as its
    two matrix products, which is what torch's formulas for GPUs say.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes longer to import than all of this package

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention})


def count_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of a call as they are executed. A converted model's first call runs more than later ones."""
    with flop_counter() as counter:
        call()
    total: int = counter.get_total_flops()
    return total


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *others: Any, **more: Any) -> int:
    """Count queries against keys, and weights against values: `b h n c`, `b h m c` and `b h m d`."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])
