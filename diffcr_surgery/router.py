"""The router: what scores a block's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Router"]


class Router(nn.Module):
    """Scores how much each token needs the block: one linear map C -> 1 without bias, then a sigmoid (paper, section 3.1).

    Args:
        width: C.

    The weight starts at zero, so that all scores are 1/2 and the doubled gate is 1. It is no ``nn.Linear``: adapters that are added
    to every linear layer of a model pass it by.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, tokens: Tensor, checked: bool = True) -> Tensor:
        """Return the scores ``b n`` of tokens ``b n c``, in (0, 1) and float32.

        Args:
            tokens: The tokens that enter the block.
            checked: Whether an infinite logit, which would hide behind the sigmoid, becomes NaN to be seen.
        """
        logits = functional.linear(tokens, self.weight.to(tokens.device, tokens.dtype)).squeeze(-1).float()
        return logits.sigmoid() + 0.0 * logits if checked else logits.sigmoid()

    def extra_repr(self) -> str:
        """Show the width."""
        return f"width={self.weight.shape[1]}"
