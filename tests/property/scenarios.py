"""What the laws are tested on: a drawn model, ratio table and batch, and the method done by hand as the oracle.

Sizes are drawn so that axes often have the same length: as many tokens as words in the prompt, samples, or channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_surgery as dcs
from tests.models import Case, Size, output

SPOTS = 12  # timesteps are drawn from the middles of so many parts of the range: no region of 1, 2, 3, 4 or 6 cuts one
GATES = ("doubled_sigmoid", "straight_through", "sigmoid")
BRANCHES = ("two", "boundary")
BINS = tuple(tenths / 10 for tenths in range(10))

# Each example converts a model or two, so the laws take a share of the profile's examples.
few = settings(
    max_examples=max(2, settings().max_examples // 10),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@dataclass(frozen=True)
class Scenario:
    """A drawn situation; everything random in it follows from `seed`.

    Attributes:
        example_size: Size of the inputs shown to `plan`; `size` is what the model is called with.
        spots: Timestep of each sample, as a number below `SPOTS`, 0 = least noise.
        table: Ratio of each site and region.
        share: Number of blocks for which one router decides.
    """

    case: Case
    size: Size
    example_size: Size
    width: int
    regions: int
    spots: tuple[int, ...]
    gate: str
    table: tuple[tuple[float, ...], ...]
    seed: int
    branches: str = "two"
    share: int = 1

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.spots)

    @property
    def sample_regions(self) -> list[int]:
        """Timestep region of each sample."""
        return [spot * self.regions // SPOTS for spot in self.spots]

    def original(self, **options: Any) -> nn.Module:
        """Build the model."""
        return self.case.build(self.seed, size=self.size, width=self.width, **options)

    def inputs(self, model: nn.Module, spots: Sequence[int] | None = None, size: Size | None = None) -> dict[str, Any]:
        """Draw the call's inputs."""
        times = self.case.times(SPOTS, list(self.spots if spots is None else spots))
        return self.case.inputs(model, len(times), self.seed + 1, timesteps=times, size=size or self.size)

    def config(self, **changes: Any) -> dcs.DiffCRConfig:
        """Write the configuration, with the timestep range of the class."""
        drawn = {
            "timestep_regions": self.regions, "gate": self.gate, "timestep_range": self.case.timestep_range, "branches": self.branches,
            "share_routing": self.share,
        }  # fmt: skip
        return dcs.DiffCRConfig(**{"target_ratio": 0.3} | drawn | changes)

    def convert(self, model: nn.Module, *, trained: bool = True, **changes: Any) -> nn.Module:
        """Convert the model; `trained` gives the routers an opinion and the table the drawn ratios."""
        dcs.convert_(model, self.inputs(model, size=self.example_size), self.config(**changes))
        if trained:
            self.train_by_hand(model)
        return model

    def train_by_hand(self, model: nn.Module) -> None:
        """Overwrite routers and table with the drawn ones."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        with torch.no_grad():
            for router in model.diffcr.routers.values():
                noise = torch.randn(router.weight.shape, generator=generator)
                router.weight.copy_(noise * 2 / router.weight.numel() ** 0.5)
            dcs.ratio_table(model).copy_(torch.tensor(self.table))


@st.composite
def scenarios(
    draw: st.DrawFn, case: Case, *, ratios: st.SearchStrategy[float] | None = None, min_tokens: int = 1,
    gates: Sequence[str] = GATES, branches: Sequence[str] = BRANCHES, same_region: bool = False,
    shares: Sequence[int] = (1, 2, 3),
) -> Scenario:  # fmt: skip
    """Draw a scenario of a case.

    Args:
        draw: Given by hypothesis.
        case: The model class.
        ratios: Strategy of the table's entries, by default bins and values between bins.
        min_tokens: Shortest stream. From ten tokens on, every bin keeps another number of tokens.
        gates: Gate forms to choose from.
        branches: Ways to run a ratio between two bins to choose from.
        same_region: Whether all samples share their timestep region.
        shares: Numbers of blocks for which one router decides, to choose from.
    """
    grids = [grid for grid in case.sizes if grid.tokens >= min_tokens]
    grid = draw(st.sampled_from(grids))
    spots = draw(st.lists(st.integers(0, SPOTS - 1), min_size=1, max_size=3))
    regions = draw(st.integers(1, 4))
    if grid.tokens <= 4 and draw(st.booleans()):  # as many samples as tokens
        spots = [draw(st.integers(0, SPOTS - 1)) for _ in range(grid.tokens)]
    if same_region:
        spots = spots[:1] * len(spots)
    text = draw(st.sampled_from([5, grid.tokens, len(spots)]))
    size = grid._replace(text=text)
    other = draw(st.sampled_from(grids))._replace(text=text) if case.resizable else size
    between = st.integers(0, 900).map(lambda thousandths: thousandths / 1000)
    entries = st.sampled_from(BINS) | between if ratios is None else ratios
    table = draw(st.lists(st.tuples(*[entries] * regions), min_size=len(case.sites), max_size=len(case.sites)))
    return Scenario(
        case, size, other, draw(st.sampled_from([16, 24])), regions, tuple(spots), draw(st.sampled_from(gates)),
        tuple(table), draw(st.integers(0, 999)), draw(st.sampled_from(branches)),
        draw(st.sampled_from(shares)),
    )  # fmt: skip


def kept_count(ratio: float, tokens: int) -> int:
    """⌈(1 − ρ)·N⌉ in whole tenths, free of rounding errors (0.3 of 10 tokens keeps 7, not 8)."""
    tenths = round(10 * ratio)
    if not math.isclose(tenths / 10, ratio, abs_tol=1e-6):
        raise ValueError(f"{ratio} is no bin")
    return max(1, -(-(10 - tenths) * tokens // 10))


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices `b k` of the highest scores `b n`, ties to the lower index, in rising order."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


class Branch(NamedTuple):
    """One way through a site: its share in the output and the number of tokens it keeps."""

    weight: float
    count: int


def bracket(ratio: float, tokens: int) -> list[Branch]:
    """Return the two bins around a ratio, with the weights of the blend."""
    low = min(int(10 * ratio + 1e-6), 8)
    share = 10 * ratio - low
    return [Branch(1 - share, kept_count(low / 10, tokens)), Branch(share, kept_count((low + 1) / 10, tokens))]


def route_by_hand(
    model: nn.Module, case: Case, weights: dict[int, Tensor], routers: Sequence[int], ways: list[list[Branch]], gate: str, branches: str
) -> None:
    """Make every site of an unconverted model route its tokens, in the plainest way there is: for a batch of one.

    Args:
        model: A model of its own, changed for good.
        case: Its case, which says what moves with the tokens.
        weights: Router weight of each site that has a router.
        routers: Which site's router decides at each site.
        ways: The branches of each site, the one that keeps more first.
        gate: Gate form.
        branches: Whether each branch is a run of its own, or all are told from the first run.
    """
    scores: dict[int, Tensor] = {}
    for site, ((path, _), router, ways_here) in enumerate(zip(case.sites, routers, ways, strict=True)):
        block = model.get_submodule(path)

        def score(stream: Tensor, site: int = site, router: int = router) -> Tensor:
            if router == site:
                scores[site] = torch.sigmoid(stream @ weights[site].detach().reshape(-1))
            return scores[router]

        block.forward = _site(block.forward, case, score, ways_here, gate, branches)


def _site(forward: Callable[..., Any], case: Case, score: Callable[[Tensor], Tensor], ways: list[Branch], gate: str, branches: str) -> Any:
    signature = inspect.signature(forward)

    def routed(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        stream = bound.arguments[case.stream]
        scores = score(stream)
        results = []
        for share, runs in [(way.weight, [way._replace(weight=1.0)]) for way in ways] if branches == "two" else [(1.0, ways)]:
            kept = _clear_choice(scores, runs[0].count)
            length = stream.shape[1]
            given = {name: _gather(value, case.moved.get(name), kept, length) for name, value in bound.arguments.items()}
            result = forward(**given | {case.stream: stream[:, kept]})
            text, tokens = result if isinstance(result, tuple) else (None, result)
            factor = torch.zeros_like(scores)[..., None]
            for way in runs:
                own = _clear_choice(scores, way.count)
                gates = _factor(scores[:, own], gate) if way.count < length or gate == "sigmoid" else 1.0
                factor[:, own] += way.weight * gates
            out = stream.clone()
            out[:, kept] = tokens + (factor[:, kept] - 1) * (tokens - stream[:, kept])
            results.append((share, text, out))
        tokens = sum(share * out for share, _, out in results)
        if not isinstance(result, tuple):
            return tokens
        return (None if text is None else sum(share * text for share, text, _ in results)), tokens

    return routed


def _clear_choice(scores: Tensor, count: int) -> Tensor:
    """Kept indices `k` of one sample; a draw in which rounding could decide between two tokens is discarded."""
    ranked = scores[0].sort(descending=True).values
    assume(count == len(ranked) or ranked[count - 1] - ranked[count] > 1e-5)
    return top_tokens(scores, count)[0]


def _gather(value: Any, axes: str | None, kept: Tensor, tokens: int) -> Any:
    """Gather the token axis of a block's argument, written in words as `n c`, `b n c` or `m+n c`."""
    if axes is None or value is None:
        return value
    if not isinstance(value, Tensor):
        return type(value)(_gather(item, axes, kept, tokens) for item in value)
    if axes == "b n c":
        return value[:, kept]
    if axes == "n c":
        return value[kept]
    return torch.cat([value[:-tokens], value[-tokens:][kept]])  # m+n: the prompt's part stays


def _factor(scores: Tensor, gate: str) -> Tensor:
    scores = scores[..., None]
    return {"doubled_sigmoid": 2 * scores, "straight_through": torch.ones_like(scores), "sigmoid": scores}[gate]


def by_hand(scenario: Scenario, trained: nn.Module, ratios: Callable[[int, int], list[Branch]]) -> Tensor:
    """Run the scenario's batch sample by sample through the plain model routed by hand.

    Args:
        scenario: The drawn situation.
        trained: The converted model, of which only the router weights are read.
        ratios: The branches of a site (index) in a region.
    """
    weights = {int(site): router.weight for site, router in trained.diffcr.routers.items()}
    routers = [site.router for site in trained.diffcr.plan.routed_sites]
    rows = []
    for index, region in enumerate(scenario.sample_regions):
        model = scenario.original(label_dropout=False)
        ways = [ratios(site, region) for site in range(len(routers))]
        route_by_hand(model, scenario.case, weights, routers, ways, scenario.gate, scenario.branches)
        rows.append(output(model(**scenario.case.sample(scenario.inputs(model), index))))
    return torch.cat(rows)


def loss_and_gradients(model: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model and backpropagate a fixed random projection of its output; returns output and gradients by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    result = output(model(**inputs))
    noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed + 7))
    (result * noise).sum().backward()
    return result.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
