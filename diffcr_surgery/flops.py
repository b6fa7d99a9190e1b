"""Floating-point operations of a call, those of torch's fused attention included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "flop_counter"]


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of floating-point operations, to be used in a `with` block.

    Some releases of torch, 2.14 among them, count nothing for scaled dot-product attention on a CPU, and none does for the fast paths of
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``. Here they count as their matrix products, like everything else.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes longer to import than all of this package

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._native_multi_head_attention: _multi_head_attention,
        aten._transformer_encoder_layer_fwd: _encoder_layer,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


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


def _multi_head_attention(query: torch.Size, *others: Any, **more: Any) -> int:
    """Count four projections and the attention of tokens `b n c` among themselves; the fast path knows no other."""
    batch, tokens, width = query
    return 2 * batch * tokens * 4 * width**2 + 2 * 2 * batch * tokens**2 * width


def _encoder_layer(
    tokens: torch.Size, embed_dim: int, num_heads: int, qkv: Any, qkv_bias: Any, out: Any, out_bias: Any, gelu: Any, first: Any, eps: Any,
    norm_1: Any, norm_1_bias: Any, norm_2: Any, norm_2_bias: Any, linear_1: torch.Size, *others: Any, **more: Any,
) -> int:  # fmt: skip
    """Count the attention of tokens `b n c`, and the two products of the MLP."""
    batch, count, width = tokens
    return _multi_head_attention(tokens) + 2 * 2 * batch * count * width * linear_1[0]
