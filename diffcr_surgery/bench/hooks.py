"""Fewer tokens for the routed blocks of an unconverted model, by hooks: what routing is compared with is made this way."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffcr_surgery import SurgeryPlan
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.plan import BlockSite
from diffcr_surgery.tokens import kept_count

__all__ = ["Limit", "Shortening", "attach", "stream_of"]


class Shortening(Protocol):
    """A way to run a block on fewer tokens. Streams are ``b n c``; blocks take turns, so one object serves all of a model."""

    def enter(self, site: BlockSite, stream: Tensor) -> Tensor:
        """Return what the block is to see of its stream."""

    def pick(self, argument: Tensor, pattern: str) -> Tensor:
        """Return what it is to see of another argument that moves with the tokens, of the axes given."""

    def leave(self, site: BlockSite, stream: Tensor) -> Tensor:
        """Return the stream that goes on, given what the block made of it."""


def attach(model: nn.Module, plan: SurgeryPlan, shortening: Shortening) -> list[RemovableHandle]:
    """Shorten the routed blocks of a plan in a model that is not converted; what is returned takes it back."""
    handles = []
    for site in plan.routed_sites:
        block = model.get_submodule(site.path)
        names = list(inspect.signature(block.forward).parameters)
        handles.append(block.register_forward_pre_hook(_before(shortening, site, names), with_kwargs=True))
        handles.append(block.register_forward_hook(_after(shortening, site)))
    return handles


def stream_of(site: BlockSite) -> tuple[str, str]:
    """Return the name of the argument that is a block's stream, and the place among its outputs that continues it ('' for a lone one)."""
    alignment, _ = site.hint
    return alignment.stream, alignment.output


def _before(shortening: Shortening, site: BlockSite, names: list[str]) -> Any:
    stream, _ = stream_of(site)
    others = {path: pattern for path, pattern in site.aligned.items() if path != stream}

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        values[stream] = shortening.enter(site, values[stream])
        for path, pattern in others.items():
            name, _, item = path.partition(".")  # "image_rotary_emb.0" is the first of a tuple
            if item:
                parts = list(values[name])
                parts[int(item)] = shortening.pick(parts[int(item)], pattern)
                values[name] = tuple(parts)
            else:
                values[name] = shortening.pick(values[name], pattern)
        return (), values

    return before


def _after(shortening: Shortening, site: BlockSite) -> Any:
    _, place = stream_of(site)

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not place:
            return shortening.leave(site, output)
        parts = list(output)
        parts[int(place)] = shortening.leave(site, parts[int(place)])
        return tuple(parts)

    return after


class Limit:
    """The most that routing at a ratio can gain: blocks on the first k = ⌈(1 - ratio) · n⌉ tokens, with no router, gather or scatter.

    A run of routed blocks hands the k tokens on from one to the next; after its last the rest is put back, so that what stands around the
    blocks runs on all tokens, as it does in the routed model. Cutting and putting back costs one copy a run.

    Args:
        plan: Which blocks are routed.
        ratio: The compression ratio.
    """

    def __init__(self, plan: SurgeryPlan, ratio: float) -> None:
        self.tokens = plan.routed_sites[0].tokens
        self.kept = kept_count(ratio, self.tokens)
        following = (*plan.sites[1:], None)
        self._last = {site.path for site, then in zip(plan.sites, following, strict=True) if site.routed and not (then and then.routed)}
        self._rest: Tensor | None = None

    def enter(self, site: BlockSite, stream: Tensor) -> Tensor:
        """Cut a stream of full length; a later block of the run gets it cut already."""
        if stream.shape[1] == self.tokens and self.kept < self.tokens:
            self._rest = stream[:, self.kept :]
            return stream[:, : self.kept]
        return stream

    def pick(self, argument: Tensor, pattern: str) -> Tensor:
        """Cut an argument as long as the full stream, behind its prefix."""
        for axis in parse_axes(pattern).tokens:
            argument = argument.narrow(axis, 0, argument.shape[axis] - self.tokens + self.kept)
        return argument

    def leave(self, site: BlockSite, stream: Tensor) -> Tensor:
        """Put the rest back after the last block of a run."""
        if self._rest is None or site.path not in self._last:
            return stream
        rest, self._rest = self._rest, None
        return torch.cat([stream, rest], dim=1)
