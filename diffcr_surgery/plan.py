"""Stage 4, plan: what a conversion would do to a model, as a value to print and decide from. Planning changes nothing."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from diffcr_surgery.axes import parse_axes
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.costs import site_costs
from diffcr_surgery.detect import named_leaves
from diffcr_surgery.errors import ConfigError, ConversionError, NoRoutableBlockError
from diffcr_surgery.ratios import Budget
from diffcr_surgery.rewrite import Decision, RoutedCall, RouteTokens, used_items
from diffcr_surgery.sites import Hint, SiteCall, site_calls
from diffcr_surgery.timesteps import TimestepRegions, timestep_regions
from diffcr_surgery.tokens import staying_count
from diffcr_surgery.trace import Trace
from diffcr_surgery.trace.recording import Recording

__all__ = ["BlockSite", "SurgeryPlan", "modules_of", "plan", "plan_blocks", "routed_call"]


@dataclass(frozen=True)
class BlockSite:
    """One block call of the model, and what would be done to it.

    Attributes:
        path: Module path of the block.
        block_class: Name of its class.
        routed: Whether a router decides which tokens enter it.
        reason: Why it is not routed; or the error of the proof.
        hint: What was proven, in full; for other inputs to begin with, and for sharded weights to rely on.
        aligned: Argument path -> axis pattern of every argument that moves with the tokens, the stream among them.
        occurrence: 0 for the first call of this module in a forward, 1 for the second, ...
        tokens: n in the example inputs, those that may bypass (0 if not routed).
        width: Channels of the stream (0 if not routed).
        staying: Tokens in the same stream that never bypass: text, registers, class tokens.
        router: Number, among the routed sites, of the one whose router decides here.
    """

    path: str
    block_class: str
    routed: bool
    reason: str
    hint: Hint = field(repr=False, compare=False)
    aligned: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    occurrence: int = 0
    tokens: int = 0
    width: int = 0
    staying: int = 0
    router: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _site, ({**vars(self), "aligned": dict(self.aligned)},)  # a mapping proxy cannot be pickled


def _site(values: dict[str, Any]) -> BlockSite:
    return BlockSite(**{**values, "aligned": MappingProxyType(values["aligned"])})


@dataclass(frozen=True)
class SurgeryPlan:
    """The plan of a conversion; print it as a table.

    Attributes:
        model_class: Qualified name of the model's class.
        config: Settings.
        sites: Every block call found, in order of execution.
        regions: Timestep argument, range and regions.
        folded: Whether a routed block sees other samples than the call has, such as the frames of a video, or a packed sequence.
        site_costs: Share of the dense cost that each routed site takes at each reachable bin (of the model's cost; of the blocks', if
            tokens are what counts).
        modules: Every module of a class that is routed, called or not: its path and the shapes of its weights.
        graph: The routed ``torch.fx`` graph at the ratio that reaches the target if all sites have it (not kept by pickle and deepcopy).

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> print(plan(model, inputs))
        DiTTransformer2DModel: 2 of 2 blocks routed; target ratio 0.2, counted in tokens, in ...
        site  block                 class                  tokens  moves with the tokens  note
        0     transformer_blocks.0  BasicTransformerBlock  16      hidden_states: b n c   proven, error ...
        1     transformer_blocks.1  BasicTransformerBlock  16      hidden_states: b n c   proven, error ...
    """

    model_class: str
    config: DiffCRConfig
    sites: tuple[BlockSite, ...]
    regions: TimestepRegions
    folded: bool
    site_costs: tuple[tuple[float, ...], ...]
    modules: tuple[tuple[str, frozenset[tuple[int, ...]]], ...]
    graph: fx.Graph | None = field(default=None, repr=False, compare=False)

    @property
    def routed_sites(self) -> tuple[BlockSite, ...]:
        """The sites that get a router; their order is that of the ratio table's rows."""
        return tuple(site for site in self.sites if site.routed)

    def __reduce__(self) -> tuple[Any, ...]:
        return SurgeryPlan, tuple(getattr(self, f.name) for f in fields(self) if f.name != "graph")

    def __deepcopy__(self, memo: dict[int, Any]) -> SurgeryPlan:
        return replace(self, graph=None)

    def __str__(self) -> str:
        config, routed = self.config, self.routed_sites
        target = f"ratio {config.target_ratio:g}" if config.target_share is None else f"share {config.target_share:g} of the dense cost"
        target = target if config.learn_ratios else f"ratio {config.initial_ratio:g}, fixed"
        head = (
            f"{self.model_class.rpartition('.')[2]}: {len(routed)} of {len(self.sites)} blocks routed; target {target}, counted in "
            f"{config.cost}, in steps of {', '.join(f'{b:g}' for b in config.bins)}; {self.regions}; gate {config.gate}"
        )
        rows = [("site", "block", "class", "tokens", "moves with the tokens", "note")]
        index = iter(range(len(routed)))
        for site in self.sites:
            moved = "; ".join(f"{name}: {axes}" for name, axes in site.aligned.items())
            row = next(index) if site.routed else -1
            number, tokens = (_number(site, row), _count(site)) if site.routed else ("-", "-")
            name = site.path if site.occurrence == 0 else f"{site.path} (call {site.occurrence + 1})"
            rows.append((number, name, site.block_class, tokens, moved or "-", site.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows]
        return "\n".join([head, *lines])


def plan(model: torch.nn.Module, example_inputs: Any, config: DiffCRConfig | None = None) -> SurgeryPlan:
    """Work out which blocks of ``model`` can be routed and what moves with their tokens.

    The model is run three times on inputs like the examples, and each distinct kind of block a few times more (many times, where
    several of its arguments have axes as long as the tokens). Nothing about the model changes, random state included.

    Args:
        model: Any transformer denoiser, or an encoder without a timestep.
        example_inputs: A dict of keyword arguments or a tuple of positional ones, such as :func:`capture_inputs` collects.
        config: Settings; the defaults of :class:`DiffCRConfig` if left out.

    Raises:
        TraceError: If the inputs do not fit or the model cannot be recorded.
        NoRoutableBlockError: If no block can be routed.
        TimestepError: If the timestep argument or its range cannot be told.
        PatternError: If a registered pattern is wrong.
        ConversionError: If the model is converted already.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([1])
        >>> planned = plan(model.eval(), {"hidden_states": x, "timestep": t, "class_labels": y})
        >>> [site.path for site in planned.routed_sites]
        ['transformer_blocks.0', 'transformer_blocks.1']
    """
    config = DiffCRConfig() if config is None else config
    if not isinstance(config, DiffCRConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected a DiffCRConfig.")
    return plan_blocks(model, example_inputs, config)


def plan_blocks(model: torch.nn.Module, example_inputs: Any, config: DiffCRConfig, only: Collection[str] | None = None) -> SurgeryPlan:
    """Do what :func:`plan` does; ``only`` are the paths of the blocks to route, whatever the configuration's expression for them."""
    if hasattr(model, "diffcr"):
        raise ConversionError(f"This {type(model).__name__} is converted already; call restore_(model) first to plan anew.")
    recorded = Trace(model, example_inputs)
    regions = timestep_regions(config, recorded.call.arguments)
    calls = site_calls(recorded.recording)
    sites = tuple(_block_site(recorded.recording, call, config, only) for call in calls)
    if not any(site.routed for site in sites):
        raise NoRoutableBlockError(_no_block(model, sites))
    routed = [call for call, site in zip(calls, sites, strict=True) if site.routed]
    routers = _routers(recorded.recording, routed, config.share_routing)
    sites = _with_routers(sites, routers)
    table = {call.node: routed_call(recorded.recording, call, i, routers[i], config) for i, call in enumerate(routed)}
    batch = _batch_size(recorded.call.arguments, regions)
    folded = any(parse_axes(site.pattern).batch is None or site.samples != batch for site in table.values())
    costs = site_costs(model, recorded.recording, recorded.call, table, config)
    decisions = dict.fromkeys(range(len(table)), Decision(_uniform_ratio(config, costs)))
    graph = RouteTokens(table, decisions, recorded.recording.blocks)(recorded.recording.graph).graph
    modules = modules_of(model, {site.block_class for site in sites if site.routed})
    return SurgeryPlan(_qualified(model), config, sites, regions, folded, costs, modules, graph)


def modules_of(model: torch.nn.Module, classes: Collection[str]) -> tuple[tuple[str, frozenset[tuple[int, ...]]], ...]:
    """Return path and shapes of the weights, LoRA's apart, of every module whose class has one of these names."""
    own = ((path, module) for path, module in model.named_modules() if type(module).__name__ in classes)
    return tuple((path, frozenset(tuple(p.shape) for name, p in m.named_parameters() if "lora_" not in name)) for path, m in own)


def _uniform_ratio(config: DiffCRConfig, costs: tuple[tuple[float, ...], ...]) -> float:
    """Return the ratio that reaches the target if all sites have it.

    Raises:
        ConfigError: If the highest ratio does not.
    """
    if not config.learn_ratios:
        return config.initial_ratio
    budget = Budget.of(config, torch.tensor(costs, dtype=torch.float64, device="cpu"))
    wanted, most = budget.target(config), budget.uniform(config.max_ratio)
    if config.target_share is None:
        if config.target_ratio > 0 and wanted < 1e-3 * config.target_ratio:
            raise ConfigError(
                f'cost="{config.cost}": on the example inputs a ratio of {config.target_ratio:g} at all routed blocks saves nothing, '
                'so there is nothing to aim at. Give longer sequences or larger batches, or use cost="tokens" or "flops".'
            )
        return config.target_ratio
    if wanted > most + 1e-6:
        lowest = 1.0 - most * sum(row[0] for row in costs)
        raise ConfigError(
            f"target_share={config.target_share:g} of the dense model's {config.cost} cannot be reached: with "
            f"max_ratio={config.max_ratio:g} at all {len(costs)} routed blocks, {lowest:.3f} is left. Choose a share of at least that or "
            "a higher max_ratio."
        )
    return float(budget.project(torch.zeros(len(costs), config.timestep_regions, device="cpu"), wanted).max())


def _qualified(model: torch.nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _block_site(recording: Recording, call: SiteCall, config: DiffCRConfig, only: Collection[str] | None) -> BlockSite:
    name = type(recording.blocks[call.node].module).__name__
    found = call.alignment
    routable, reason, hint = found.routable, found.reason, (found, call.outside)
    chosen = config.blocks is None or (call.path in only if only is not None else re.fullmatch(config.blocks, call.path) is not None)
    if routable and not chosen:
        routable, reason = False, f"left out by blocks={config.blocks!r}"
    if routable and (used_items(call.node) is None or found.output.count(".")):
        routable, reason = False, "its outputs are handed on as a whole, so the stream cannot be replaced among them"
    if not routable:
        return BlockSite(call.path, name, False, reason, hint, occurrence=call.occurrence)
    _, stream = named_leaves(recording.blocks[call.node].module, call.node.args, call.node.kwargs, fx.Node)[found.stream]
    width, staying = stream.meta["shape"][-1], staying_count(call.staying)
    tokens = found.tokens - staying
    return BlockSite(call.path, name, True, reason, hint, MappingProxyType(found.aligned), call.occurrence, tokens, width, staying)


def _number(site: BlockSite, row: int) -> str:
    return str(row) if site.router == row else f"{row} (as {site.router})"


def _count(site: BlockSite) -> str:
    return f"{site.tokens} (+{site.staying})" if site.staying else str(site.tokens)


def _routers(recording: Recording, routed: list[SiteCall], length: int) -> list[int]:
    """Return for each routed site the site whose router decides: the first of a run of up to ``length`` that hand on one stream."""
    routers: list[int] = []
    for row, call in enumerate(routed):
        first = routers[-1] if routers else row
        joins = 0 < row < first + length and _continues(recording, call, routed[row - 1])
        routers.append(first if joins else row)
    return routers


def _continues(recording: Recording, call: SiteCall, before: SiteCall) -> bool:
    """Tell whether a block reads the very stream that the block before it returned, with the same tokens free to bypass."""
    stream = named_leaves(recording.blocks[call.node].module, call.node.args, call.node.kwargs, fx.Node)[call.alignment.stream][1]
    taken = (
        stream.target in (operator.getitem, getattr) and stream.args[0] is before.node and str(stream.args[1]) == before.alignment.output
    )
    alike = (call.staying, call.outside, call.alignment.tokens) == (before.staying, before.outside, before.alignment.tokens)
    return (stream is before.node or taken) and alike and not call.outside


def _with_routers(sites: tuple[BlockSite, ...], routers: list[int]) -> tuple[BlockSite, ...]:
    rows = iter(routers)
    return tuple(replace(site, router=next(rows)) if site.routed else site for site in sites)


def routed_call(recording: Recording, call: SiteCall, index: int, router: int, config: DiffCRConfig) -> RoutedCall:
    """Translate a proven alignment from argument names to the call at hand.

    Args:
        recording: The recording.
        call: The call of the block.
        index: Row of the site in the ratio table.
        router: Row of the site whose router decides.
        config: Settings.
    """
    block, found = recording.blocks[call.node], call.alignment
    named = named_leaves(block.module, call.node.args, call.node.kwargs, fx.Node)
    pattern = found.axes[found.stream]
    batch = parse_axes(pattern).batch
    raw_stream, stream = named[found.stream]
    numbers = named_leaves(block.module, call.node.args, call.node.kwargs, int)
    return RoutedCall(
        index=index,
        router=router,
        path=call.path,
        axes={named[name][0]: words for name, words in found.axes.items()},
        stream=raw_stream,
        pattern=pattern,
        output=int(found.output) if found.output.isdigit() else found.output or None,
        tokens=found.tokens,
        staying=call.staying,
        samples=1 if batch is None else stream.meta["shape"][batch],
        outside=call.outside,
        overwrites=found.overwrites,
        counts={numbers[name][0]: word for name, word in found.counts.items()},
        batches={int(path) if path.isdigit() else path: axis for path, axis in found.batches.items()},
        random=block.random,
        gate=config.gate,
        branches=config.branches,
    )


def _no_block(model: torch.nn.Module, sites: tuple[BlockSite, ...]) -> str:
    if sites:
        listed = "\n".join(f"  {site.path} ({site.block_class}): {site.reason}" for site in sites)
        return (
            f"No block of {type(model).__name__} can be routed:\n{listed}\nDeclare one with register_pattern(BlockPattern(...)) if it can."
        )
    classes = sorted({type(module).__name__ for module in model.modules()})
    return (
        f"No block was found in {type(model).__name__}: no module takes tokens (b n c) and returns tokens of the same shape, with "
        f"attention and an MLP inside. Classes seen: {', '.join(classes)}. Check that the example inputs reach the transformer, or declare "
        "its block with register_pattern(BlockPattern(...))."
    )


def _batch_size(arguments: dict[str, Any], regions: TimestepRegions) -> int:
    """Count the samples: as many as there are timesteps, or, where one stands for all, rows in the first tensor that has some."""
    timestep = arguments.get(regions.argument) if regions.argument else None
    if isinstance(timestep, torch.Tensor) and timestep.ndim and len(timestep) > 1:
        return len(timestep)
    return next((len(v) for v in arguments.values() if isinstance(v, torch.Tensor) and v.ndim > 1 and v.is_floating_point()), 1)
