"""Token merging, to compare with: similar tokens are averaged, the block runs on fewer, and each gets a copy of its group's result.

    python -m diffcr_surgery bench --model dit-xl-2 --tokens 256 --ratio 0.2 0.5 --out DIR

Written after the papers: bipartite soft matching (arXiv 2210.09461), and its form for diffusion (arXiv 2303.17604), where one token of each
2 x 2 cell of the image is a destination and the other three are sources. Each source is matched with the destination most like it (cosine
similarity of the tokens as they enter the block), and the sources with the best matches are averaged into theirs. So at most three quarters
of the tokens can be merged.

Two choices favour it: the destination of a cell is its upper left token instead of a random one, and where an argument that moves with the
tokens is shared by the batch (FLUX's rotary tables), one matching is made for the whole batch, by the mean similarity, instead of running
sample by sample. The block is run on the merged stream as a whole, so merged tokens leave it as copies, skip connections included: that is
the cheapest form, and the harshest for the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.bench import hooks
from diffcr_surgery.tokens import gather_tokens, kept_count


class Matching(NamedTuple):
    """Which tokens merge with which. The batch axis has size 1 if the matching is shared.

    Attributes:
        alone: Sources that stay as they are, ``b u``.
        merged: Sources that are merged, ``b r``.
        into: The destination of each merged one, as a place in ``destinations``, ``b r``.
        destinations: One token of each cell, ``d``; u + r + d = n, u + d = k.
    """

    alone: Tensor
    merged: Tensor
    into: Tensor
    destinations: Tensor

    @property
    def order(self) -> Tensor:
        """The tokens that remain, ``b k``, as they stand in the merged stream."""
        return torch.cat([self.alone, self.destinations.expand(len(self.alone), -1)], dim=1)


def cells(side: int) -> tuple[Tensor, Tensor]:
    """Return the sources and destinations of a square grid, ``n - d`` and ``d`` indices."""
    chosen = torch.zeros(side, side, dtype=torch.bool)
    chosen[::2, ::2] = True
    return (~chosen).flatten().nonzero().flatten(), chosen.flatten().nonzero().flatten()


def match(tokens: Tensor, kept: int, sources: Tensor, destinations: Tensor, shared: bool = False) -> Matching:
    """Match tokens ``b n c`` so that ``kept`` of them remain; ``shared`` makes one matching for the batch."""
    unit = functional.normalize(tokens, dim=-1)
    similarity = unit[:, sources] @ unit[:, destinations].transpose(1, 2)
    if shared:
        similarity = similarity.mean(dim=0, keepdim=True)
    best, nearest = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merging = order[:, : tokens.shape[1] - kept]
    return Matching(sources[order[:, merging.shape[1] :]], sources[merging], nearest.gather(1, merging), destinations)


def _rows(index: Tensor, like: Tensor) -> Tensor:
    """Stretch indices ``b k`` or ``1 k`` over the batch and channels of a stream ``b n c``."""
    return index[..., None].expand(len(like), -1, like.shape[-1])


def merge(tokens: Tensor, matching: Matching) -> Tensor:
    """Average the merged sources with their destinations: ``b n c`` -> ``b k c``."""
    moved = tokens.gather(1, _rows(matching.merged, tokens))
    targets = tokens[:, matching.destinations]
    targets = targets.scatter_reduce(1, _rows(matching.into, tokens), moved, "mean", include_self=True)
    return torch.cat([tokens.gather(1, _rows(matching.alone, tokens)), targets], dim=1)


def unmerge(tokens: Tensor, matching: Matching) -> Tensor:
    """Give every token the result of its group: ``b k c`` -> ``b n c``."""
    alone, targets = tokens.split([matching.alone.shape[1], len(matching.destinations)], dim=1)
    whole = tokens.new_empty(len(tokens), tokens.shape[1] + matching.merged.shape[1], tokens.shape[2])
    whole[:, matching.destinations] = targets
    whole.scatter_(1, _rows(matching.alone, tokens), alone)
    return whole.scatter_(1, _rows(matching.merged, tokens), targets.gather(1, _rows(matching.into, tokens)))


class TokenMerging:
    """Token merging around the routed blocks of a plan, in the form that :func:`diffcr_surgery.bench.hooks.attach` takes."""

    def __init__(self, plan: dcs.SurgeryPlan, ratio: float, device: torch.device) -> None:
        self.tokens = plan.routed_sites[0].tokens
        self.kept = kept_count(ratio, self.tokens)
        self.sources, self.destinations = (index.to(device) for index in cells(round(self.tokens**0.5)))
        if self.kept < len(self.destinations):
            most = len(self.sources) / self.tokens
            raise ValueError(f"ratio {ratio:g} is more than token merging can do: at most {most:g} of {self.tokens} tokens are sources")
        patterns = {pattern for site in plan.routed_sites for pattern in site.aligned.values()}
        self.shared = any("b" not in parse_axes(pattern).words for pattern in patterns)

    def enter(self, site: object, stream: Tensor) -> Tensor:
        self.matching = match(stream, self.kept, self.sources, self.destinations, self.shared)
        return merge(stream, self.matching)

    def pick(self, argument: Tensor, pattern: str) -> Tensor:
        return gather_tokens(argument, self.matching.order, pattern, self.tokens)

    def leave(self, site: object, stream: Tensor) -> Tensor:
        return unmerge(stream, self.matching)


def attach(model: nn.Module, plan: dcs.SurgeryPlan, ratio: float) -> None:
    """Merge tokens around the routed blocks of a model that is not converted.

    Raises:
        ValueError: If the ratio is more than merging can do.
    """
    hooks.attach(model, plan, TokenMerging(plan, ratio, next(model.parameters()).device))
