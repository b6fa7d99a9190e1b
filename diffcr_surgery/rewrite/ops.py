"""The functions that appear as nodes in a routed graph, besides those of :mod:`diffcr_surgery.tokens`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from diffcr_surgery._tree import flatten, is_dataclass_value
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.errors import NonFiniteError
from diffcr_surgery.tokens import per_sample
from diffcr_surgery.trace.key import device_of
from diffcr_surgery.trace.recorder import rng_state
from diffcr_surgery.trace.undisturbed import set_rng_state

__all__ = [
    "blend",
    "blend_weight",
    "boundary_factor",
    "check_scores",
    "checkpointed",
    "gate_factor",
    "gate_update",
    "named_item",
    "per_sample_without_random_trace",
    "take_factors",
    "with_zero_gradients",
    "without_random_trace",
]


def named_item(output: Any, name: str) -> Any:
    """Return a field of a block's output, a dataclass or a dict."""
    return getattr(output, name) if is_dataclass_value(output) else output[name]


def gate_factor(scores: Tensor, gate: str, staying: Tensor | None = None) -> Tensor:
    """Return by how much each token's update is scaled, ``b n``.

    It is ``2 s`` for ``"doubled_sigmoid"``, ``s`` for ``"sigmoid"`` (the paper's form, section 3.1), and 1 with the gradient of s for
    ``"straight_through"``.

    Args:
        scores: s, ``b n``.
        gate: One of the three forms.
        staying: Which tokens never bypass, ``b n`` or ``1 n``: no router decides on them, so none scales them.
    """
    if gate == "straight_through":
        factor = 1.0 + (scores - scores.detach())
    else:
        factor = 2.0 * scores if gate == "doubled_sigmoid" else scores
    return factor if staying is None else factor.masked_fill(staying, 1.0)


def boundary_factor(factor: Tensor, order: Tensor, count: int, weight: Tensor, decided: bool) -> Tensor:
    """Return the factors that stand for both runs of a site between two bins, after one run on the larger kept set.

    Kept sets are nested, being the first tokens of one ranking. With w the blend weight and g a token's gate, a token that both bins keep
    has the update ``(1 - w) g + w g``, one that only the lower ratio keeps ``(1 - w) g + w 0``: one factor a token.

    Args:
        factor: Gate factors g, ``b n``.
        order: Ranking, ``b n``.
        count: Tokens kept at the higher ratio.
        weight: Blend weights w, ``b`` or one.
        decided: Whether the lower ratio lets any token bypass; if not, its update is not gated and counts with factor 1.

    Returns:
        Factors ``b n``; at w = 0 those of the lower ratio, bit for bit.
    """
    kept = torch.zeros_like(factor).scatter(1, order[:, :count], 1.0)
    return torch.lerp(factor if decided else torch.ones_like(factor), kept * factor, weight[:, None].to(factor))


def check_scores(sites: tuple[str, ...], scores: tuple[Tensor, ...]) -> None:
    """Refuse scores that are no numbers: a ranking of them would choose tokens, and say nothing.

    All sites are looked at together at the end of a run, so that a GPU is waited for once.

    Raises:
        NonFiniteError: Naming the first site that has such scores.
    """
    sums = torch.stack([s.detach().sum().to(scores[0].device) for s in scores])  # scores lie in (0, 1)
    if bool(sums.isfinite().all()):
        return
    broken = [site for site, s in zip(sites, sums.tolist(), strict=True) if not math.isfinite(s)]
    raise NonFiniteError(
        f"The router of {broken[0]} gives scores that are no finite numbers"
        + (f", and so do those of {len(broken) - 1} sites after it" if broken[1:] else "")
        + ": its weights, or the tokens that enter the block, are not finite. The loss or the learning rate broke training, or the inputs "
        "are broken; go back to an earlier checkpoint."
    )


def take_factors(factor: Tensor, kept: Tensor) -> Tensor:
    """Return the factors of the kept tokens, ``b n`` -> ``b k``."""
    return factor.gather(1, kept)


def gate_update(tokens: Tensor, processed: Tensor, factor: Tensor, pattern: str) -> Tensor:
    """Scale what the block did to each token.

    With x the tokens, y what the block made of them and g their factors, the result is x + g (y - x). At g = 1 it is y bit for bit:
    ``torch.lerp`` computes y - (1 - g)(y - x) there.

    Args:
        tokens: x, ``b k c`` or another layout.
        processed: y, same shape.
        factor: g, ``b k``.
        pattern: Axis pattern of x and y.
    """
    axes = parse_axes(pattern)
    (axis,) = axes.tokens
    shape = [1] * processed.ndim
    shape[axis] = factor.shape[1]
    if axes.batch is not None:
        shape[axes.batch] = factor.shape[0]
        factor = factor if axes.batch < axis else factor.T
    return torch.lerp(tokens.to(processed.dtype), processed, factor.reshape(shape).to(processed.dtype))


def with_zero_gradients(output: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """Return the output as it is, with a gradient of zero for ratio and router, which had no say in it.

    With none at all they would be left out of the backward, and processes that average gradients would wait for them.

    Args:
        output: Of a block, any shape.
        weight: Blend weights, ``b`` or one.
        scores: ``b n``.
    """
    return output + (0.0 * (weight.sum() + scores.sum())).to(output)  # zero first: in half precision the sum may be infinite


def blend_weight(table: Tensor, site: int, region: Tensor, lower: float, upper: float) -> Tensor:
    """Return how far each sample's ratio lies between two bins: 0 at ``lower``, 1 at ``upper``.

    The forward value is held in [0, 1]; the gradient passes the bound, since a ratio starts on it (METHOD: a clamp there stops
    learning without a sound).

    Args:
        table: Ratio table ``l r``.
        site: Row.
        region: Region of each sample ``b``, or a single one for all.
        lower: Bin below.
        upper: Bin above.

    Returns:
        Weights ``b`` (or one).
    """
    # In single precision, whatever a mixed-precision policy has made of the table.
    weight = (table[site].float().index_select(0, region) - lower) / (upper - lower)
    return weight + (weight.clamp(0.0, 1.0) - weight).detach()


def blend(lower: Tensor, upper: Tensor, weight: Tensor, batch: int | None) -> Tensor:
    """Blend the results at two bins linearly; at weight 0 it is ``lower`` bit for bit, at 1 ``upper``.

    Args:
        lower: Result at the lower ratio.
        upper: Result at the higher ratio, same shape.
        weight: Weights ``b``, or one for all.
        batch: Batch axis of both; ``None`` if they have none.
    """
    shape = [1] * lower.ndim
    if batch is not None:
        shape[batch] = weight.shape[0]
    return torch.lerp(lower, upper.to(lower.dtype), weight.reshape(shape).to(lower))


def without_random_trace(block: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a block with dropout once more than the original model does, and leave the random state as if it had not run.

    Its own run and the blocks after it then draw what they would draw in the original model.
    """
    device = device_of(flatten((args, kwargs))[1])
    state = rng_state(device)
    try:
        return block(*args, **kwargs)
    finally:
        set_rng_state(state, device)


def per_sample_without_random_trace(*arguments: Any) -> Any:
    """Do :func:`per_sample`, and leave the random state as if it had not run."""
    return without_random_trace(per_sample, arguments, {})


def checkpointed(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a compiled site so that its activations are recomputed in the backward pass: router, gathers, block and skip together."""

    def site(model: torch.nn.Module, *values: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(run, model, *values, use_reentrant=False)

    site.__name__ = site.__qualname__ = name
    return site
