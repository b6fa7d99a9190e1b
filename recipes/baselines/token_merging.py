"""Token merging, to compare with: similar tokens are averaged, the block runs on fewer, and each gets what became of its group.

    python -m diffcr_surgery bench --model dit-xl-2 --tokens 256 --ratio 0.2 0.5 --out DIR

Written after the papers: bipartite soft matching (arXiv 2210.09461), and its form for diffusion (arXiv 2303.17604), where one token of each
2 x 2 cell of the image is a destination and the other three are sources. Each source is matched with the destination most like it (cosine
similarity of the tokens as they enter the block), and the sources with the best matches are averaged into theirs. So at most three quarters
of the tokens can be merged.

The second paper merges around the attention alone, and advises against merging for the MLP. Here the whole block runs on the merged
tokens, of every block at every timestep, as routing has it: otherwise no such share of the compute could be saved. The destination of a
cell is its upper left token instead of a random one, and where an argument that moves with the tokens is shared by the batch (FLUX's
rotary tables), one matching is made for the whole batch, by the mean similarity, instead of running sample by sample.

In the cheapest form merged tokens leave a block as copies of each other; with ``skips`` each keeps itself, and only what the block adds to
it is its group's, as in the second paper, which is kinder to the image. The bench, which asks for speed, takes the first; whoever asks for
quality takes the second.
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
    """Token merging around the routed blocks of a plan, in the form that :func:`diffcr_surgery.bench.hooks.attach` takes.

    Args:
        plan: Says which blocks, and what goes with their tokens.
        ratio: Share of the tokens that are merged away.
        device: Where the model is.
        skips: Whether each token keeps itself, and gets no more than its group's update.
    """

    def __init__(self, plan: dcs.SurgeryPlan, ratio: float, device: torch.device, skips: bool = False) -> None:
        self.skips = skips
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
        merged = merge(stream, self.matching)
        if self.skips:
            self.whole, self.merged = stream, merged
        return merged

    def pick(self, argument: Tensor, pattern: str) -> Tensor:
        return gather_tokens(argument, self.matching.order, pattern, self.tokens)

    def leave(self, site: object, stream: Tensor) -> Tensor:
        return self.whole + unmerge(stream - self.merged, self.matching) if self.skips else unmerge(stream, self.matching)


def attach(model: nn.Module, plan: dcs.SurgeryPlan, ratio: float, skips: bool = False) -> None:
    """Merge tokens around the routed blocks of a model that is not converted; `skips` as in `TokenMerging`.

    Raises:
        ValueError: If the ratio is more than merging can do.
    """
    hooks.attach(model, plan, TokenMerging(plan, ratio, next(model.parameters()).device, skips))
