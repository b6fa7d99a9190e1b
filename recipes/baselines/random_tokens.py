"""Random token dropping, to compare with: at every call another random share of the tokens bypasses a block.

    python recipes/evaluate.py --demo demo-out --baseline dense random --ratio 0.3 --out out

It is what routing would be if routers knew nothing and ratios were not learned: k = ⌈(1 - ratio) · n⌉ tokens of each sample run through the
block, the rest leaves it as it entered. Where an argument that moves with the tokens is shared by the batch (FLUX's
rotary tables), one choice is made for the whole batch, instead of running sample by sample; so it is in evaluations, where guidance
subtracts one half of a batch from the other and would amplify what differs by chance.
"""

import torch
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.bench import hooks
from diffcr_surgery.tokens import gather_tokens, kept_count, scatter_tokens

STREAM = "b n c"


def choose(samples: int, tokens: int, kept: int, generator: torch.Generator) -> Tensor:
    """Choose tokens of each sample, every set of them as likely as any other: indices ``b k`` in rising order."""
    return torch.rand(samples, tokens, generator=generator, device=generator.device).argsort(dim=1)[:, :kept].sort(dim=1).values


class RandomTokens:
    """Random tokens around the routed blocks of a plan, in the form that :func:`diffcr_surgery.bench.hooks.attach` takes."""

    def __init__(self, plan: dcs.SurgeryPlan, ratio: float, seed: int, device: torch.device | str = "cpu", shared: bool = False) -> None:
        self.tokens = plan.routed_sites[0].tokens
        self.kept = kept_count(ratio, self.tokens)
        self.generator = torch.Generator(device).manual_seed(seed)  # where the model is, so that drawing does not wait for it
        patterns = {pattern for site in plan.routed_sites for pattern in site.aligned.values()}
        self.shared = shared or any("b" not in parse_axes(pattern).words for pattern in patterns)

    def enter(self, site: object, stream: Tensor) -> Tensor:
        chosen = choose(1 if self.shared else len(stream), self.tokens, self.kept, self.generator)
        self.chosen, self.whole = chosen.expand(len(stream), -1), stream
        return gather_tokens(stream, self.chosen, STREAM, self.tokens)

    def pick(self, argument: Tensor, pattern: str) -> Tensor:
        return gather_tokens(argument, self.chosen if "b" in parse_axes(pattern).words else self.chosen[:1], pattern, self.tokens)

    def leave(self, site: object, stream: Tensor) -> Tensor:
        return scatter_tokens(self.whole, stream, self.chosen, STREAM)


def attach(model: nn.Module, plan: dcs.SurgeryPlan, ratio: float, seed: int = 0, shared: bool = False) -> None:
    """Have random tokens bypass the routed blocks of a model that is not converted, if asked to the same ones in all samples of a call."""
    hooks.attach(model, plan, RandomTokens(plan, ratio, seed, next(model.parameters()).device, shared))
