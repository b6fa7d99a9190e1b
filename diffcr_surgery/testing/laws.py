"""The laws of the method, as functions to call on any model; each raises :class:`LawError` with the token, argument or site that broke it.

They take a plain model, of which a copy is converted, with routers and ratios drawn from a seed; or a converted one, of which a copy is
tested with the routers and ratios it has. The model itself is left alone. What draws random numbers (dropout) does so in
:func:`check_conversion` alone; the other laws keep the model in ``eval()`` and let the ratios train.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import flatten, map_leaves
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.detect import named_leaves
from diffcr_surgery.plan import BlockSite, SurgeryPlan, plan
from diffcr_surgery.runtime.convert import convert_, ratio_loss, ratio_table, restore_, state_of
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.save import load_adapter_, save_adapter
from diffcr_surgery.specialize import specialize_
from diffcr_surgery.testing.by_hand import ByHand, Run, Way, bracket, kept_count
from diffcr_surgery.testing.compare import LawError, same, snapshot, what_changed
from diffcr_surgery.trace.key import example_call

__all__ = [
    "check_bypass",
    "check_conversion",
    "check_gradients",
    "check_mixed_timesteps",
    "check_round_trip",
    "check_specialization",
]

# Equal up to rounding, in units of the largest entry: by hand, sums over kept tokens are taken in another order.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_CLOSE = 1e-6  # scores nearer than this, yet not equal, may change places by rounding


def check_conversion(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None) -> None:
    """Check laws 1 and 5: converted at ratio 0 is the original, bit for bit; planned, or converted and restored, nothing has happened.

    Outputs are compared in eval and in training, with and without gradients; so are the gradients of all original weights.

    Args:
        model: A model that is not converted.
        inputs: Arguments of a call, as for :func:`diffcr_surgery.plan`.
        config: Settings; ratios begin at 0, and in place of the paper's gate, which halves updates from the start, stands the doubled one.

    Raises:
        LawError: If a law does not hold.
    """
    law = "check_conversion"
    settings = replace(config or DiffCRConfig(), initial_ratio=0.0, learn_ratios=True)
    settings = replace(settings, gate="doubled_sigmoid") if settings.gate == "sigmoid" else settings
    original, converted = copy.deepcopy(model), copy.deepcopy(model)
    before = snapshot(converted)
    planned = plan(converted, inputs, settings)
    _unchanged(law, "planning", before, converted)
    restore_(convert_(converted, planned))
    _unchanged(law, "converting and restoring", before, converted)
    convert_(converted, planned)
    if [key for key in converted.state_dict() if not key.startswith("diffcr.")] != list(original.state_dict()):
        raise LawError(f"{law}: the state-dict keys of {type(original).__name__} are not those it had, and diffcr.* behind them.")
    for training in (False, True):
        mode = "in training" if training else "in eval"
        for one in (original, converted):
            one.train(training)
        with torch.no_grad():
            same(law, f"the output {mode} without gradients", _call(converted, inputs), _call(original, inputs))
        (actual, found), (expected, wanted) = _differentiate(converted, inputs), _differentiate(original, inputs)
        same(law, f"the output {mode}", actual, expected)
        own = {name: gradient for name, gradient in found.items() if not name.startswith("diffcr.")}
        if own.keys() != wanted.keys():
            raise LawError(f"{law}: of {sorted(own.keys() ^ wanted.keys())}, only one of the two has a gradient {mode}.")
        for name, gradient in wanted.items():
            same(law, f"the gradient {mode} of {name}", own[name], gradient)


def check_bypass(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, seed: int = 0) -> None:
    """Check law 2: a bypassed token leaves its block exactly as it entered; a kept one as if the block had seen the kept tokens alone.

    The converted model, in eval, is compared with the method done by hand on the recorded original: the stream that enters each site, and
    the output; for every timestep region the call's samples lie in, at that region's ratios.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call.
        config: Settings, if it is not converted.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the site, sample and token.
    """
    law, pair = "check_bypass", _Pair.of(model, inputs, config, seed)
    pair.converted.eval()
    executed, config = pair.state.executed_ratios(), pair.state.config
    highest = max(ratio for ratio in config.bins if ratio <= config.max_ratio)
    for region in sorted(set(pair.regions(pair.arguments))):
        with torch.no_grad():  # the same executable ratios in all regions, so that the batch runs together
            ratio_table(pair.converted).copy_(executed[:, [region]].expand_as(executed).clamp(max=highest))
        ways = [[Way(1.0, ratio)] for ratio in pair.state.executed_ratios()[:, 0].tolist()]
        _compare_by_hand(law, pair, pair.arguments, ways)


def check_mixed_timesteps(
    model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, shared: Collection[str] = (), seed: int = 0
) -> None:
    """Check law 3: a batch of several timestep regions is its samples one by one, and each is the method done by hand in its region.

    In eval, where every site runs at one executable ratio, and in training, where it blends the two around its ratio; there the
    gradients of the batch are those of its samples added up. If all timesteps given lie in one region, they are spread over the regions.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call with several samples.
        config: Settings, if it is not converted.
        shared: Arguments without a batch axis whose first axis happens to be as long as the batch.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the sample and its region.
    """
    law, pair = "check_mixed_timesteps", _Pair.of(model, inputs, config, seed)
    arguments = pair.spread(pair.arguments)
    regions = pair.regions(arguments)
    samples = [_sample(arguments, i, len(regions), shared) for i in range(len(regions))] if len(regions) > 1 else [arguments]
    pair.converted.eval()
    for training in (False, True):
        mode = "in training" if training else "in eval"
        pair.state.train(training)
        together, gradients = _differentiate(pair.converted, arguments)
        summed: dict[str, Tensor] = {}
        close_call = False
        for i, (sample, region) in enumerate(zip(samples, regions, strict=True)):
            alone, own = _differentiate(pair.converted, sample)
            summed = {name: summed.get(name, 0.0) + gradient for name, gradient in own.items()} | {
                name: gradient for name, gradient in summed.items() if name not in own
            }
            what = f"sample {i} (region {region}) {mode}"
            close_call |= _compare_by_hand(law, pair, sample, pair.ways(region, training), what)
            if not close_call:
                same(law, f"{what}, in its batch", _sample_of_output(together, i, len(regions)), alone, tolerance=_rounding(alone))
        if close_call or len(regions) == 1:
            continue
        if gradients.keys() != summed.keys():
            raise LawError(f"{law}: of {sorted(gradients.keys() ^ summed.keys())}, only batch or samples have a gradient {mode}.")
        largest = max((float(gradient.abs().max()) for gradient in summed.values()), default=1.0)
        for name, gradient in summed.items():  # what is zero but for rounding is measured by the others
            same(law, f"the gradient {mode} of {name}", gradients[name], gradient, tolerance=10 * _rounding(gradient) * max(1.0, largest))


def check_gradients(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, seed: int = 0) -> None:
    """Check law 4: finite gradients reach every ratio of the regions seen and every router that decides; the budget loss meets its target.

    A ratio between two bins that keep the same tokens has nothing to learn from, and is passed over. So is no router whose tokens no one
    reads after it: a model that hands on its class token alone fails here at its last block.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call.
        config: Settings, if it is not converted.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the site and region.
    """
    law, pair = "check_gradients", _Pair.of(model, inputs, config, seed)
    state, table = pair.state, ratio_table(pair.converted)
    pair.converted.eval()
    state.train()
    _, gradients = _differentiate(pair.converted, pair.arguments)
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise LawError(f"{law}: the gradient of {name} is not finite.")
    seen = sorted(set(pair.regions(pair.arguments)))
    if state.config.learn_ratios:
        for row, site in enumerate(pair.plan.routed_sites):
            ways = {region: pair.ways(region, True)[row] for region in seen}
            decides = [r for r in seen if len({kept_count(way.ratio, site.tokens) for way in ways[r]}) > 1]
            for region in decides:
                if not float(gradients["diffcr.ratio_table"][row, region]):
                    raise LawError(f"{law}: no gradient reaches the ratio of {site.path} in region {region}.")
            weighed = [r for r in decides if ways[r][1].share > 1e-6 or kept_count(ways[r][0].ratio, site.tokens) < site.tokens]
            if weighed and not bool(gradients[f"diffcr.routers.{site.router}.weight"].any()):
                raise LawError(f"{law}: no gradient reaches the router of {site.path}, whose ratio in region {weighed[0]} is not 0.")
        _check_budget(law, state, pair.converted, table)


def _check_budget(law: str, state: DiffCRState, converted: nn.Module, table: Tensor) -> None:
    """Let plain gradient descent follow the budget loss alone."""
    rate = 0.1 / max(float(torch.autograd.grad(state.saving(), table)[0].square().sum()) * state.config.ratio_loss_weight, 1e-12)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(ratio_loss(converted), table)
        if not bool(gradient.isfinite().all()):
            raise LawError(f"{law}: the gradient of the budget loss is not finite.")
        with torch.no_grad():
            table -= rate * gradient
    gap = abs(float(state.saving().detach()) - state.target_saving)
    if gap > 0.01:
        raise LawError(f"{law}: following the budget loss leaves the saving {gap:.3f} from its target {state.target_saving:.3f}.")


def check_round_trip(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, seed: int = 0) -> None:
    """Check law 6, first half: saved and loaded, or copied, a converted model is equal bit for bit, in eval and in training.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call.
        config: Settings, if it is not converted.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: If anything differs.
    """
    law, pair = "check_round_trip", _Pair.of(model, inputs, config, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(pair.converted, folder)
        loaded = load_adapter_(copy.deepcopy(pair.original), folder, inputs)
    saved = replace(pair.state.config, timestep_argument=state_of(loaded).config.timestep_argument)  # what "auto" was settled to is saved
    if state_of(loaded).plan.regions != pair.plan.regions or state_of(loaded).config != replace(
        saved, timestep_range=state_of(loaded).config.timestep_range
    ):
        raise LawError(f"{law}: loaded, the settings are {state_of(loaded).config}; saved were {pair.state.config}.")
    for name, other in (("loaded", loaded), ("copied", copy.deepcopy(pair.converted))):
        same(law, f"{name}, the state", dict(other.state_dict()), dict(pair.converted.state_dict()))
        for training in (False, True):
            mode = "in training" if training else "in eval"
            for one in (other, pair.converted):
                one.eval()
                state_of(one).train(training)
            (actual, found), (expected, wanted) = _differentiate(other, pair.arguments), _differentiate(pair.converted, pair.arguments)
            same(law, f"{name}, the output {mode}", actual, expected)
            same(law, f"{name}, the gradients {mode}", found, wanted)


def check_specialization(
    model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, budgets: Sequence[float] = (0.5, 0.8), seed: int = 0
) -> None:
    """Check law 6, second half: specialised equals eval at the same ratios; every block sees k = ⌈(1 − ρ)·n⌉ tokens, never none.

    A budget is met as nearly as the executable ratios allow, and a larger one takes no token from any block.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call.
        config: Settings, if it is not converted.
        budgets: Shares of the dense cost to specialise at besides, rising; those out of reach are passed over.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the site, region and counts, or the entry of the output.
    """
    law, pair = "check_specialization", _Pair.of(model, inputs, config, seed)
    pair.converted.eval()
    executed = pair.state.executed_ratios()
    fixed = specialize_(copy.deepcopy(pair.converted))
    same(law, "the ratios", ratio_table(fixed).detach(), executed.to(ratio_table(fixed)))
    for arguments in (pair.arguments, *pair.of_one_region(pair.arguments)):
        expected: Any = None
        for one, name in ((pair.converted, "converted"), (fixed, "specialised")):
            for gradients in (False, True):  # without them a specialised model puts tokens back in place
                with torch.set_grad_enabled(gradients), _lengths(one, pair.plan) as lengths:
                    _call(one, arguments)  # the first call is recorded, which runs the blocks on all tokens
                    lengths.clear()
                    output = _call(one, arguments)
                _check_lengths(law, pair, arguments, executed, lengths)
                expected = output if expected is None else expected
                same(law, f"the {name} output", output, expected, tolerance=_rounding(output))
    kept: Tensor | None = None
    for budget in budgets:
        dialled = _at_budget(pair, budget)
        if dialled is None:
            continue
        ratios, achieved = dialled
        step = 1 / max(1, len(ratios) * len(ratios.T))
        if (
            abs(achieved - budget)
            > step * max(b - a for a, b in zip(pair.state.config.bins, pair.state.config.bins[1:], strict=False)) + 1e-5
        ):
            raise LawError(f"{law}: a budget of {budget} came out as {achieved:.4f}, further away than one step of one ratio.")
        if kept is not None and bool((ratios > kept + 1e-6).any()):
            row, region = (ratios > kept + 1e-6).nonzero()[0].tolist()
            raise LawError(f"{law}: the larger budget {budget} takes tokens from {pair.plan.routed_sites[row].path} in region {region}.")
        kept = ratios


def _at_budget(pair: _Pair, budget: float) -> tuple[Tensor, float] | None:
    """Return ratios and achieved share of a copy specialised at a budget; ``None`` where the bounds of the ratios do not reach it."""
    whole = float(pair.state.budget.costs[:, 0].sum())
    if budget < 1 - whole * pair.state.budget.uniform(pair.state.config.max_ratio):
        return None
    dialled = specialize_(copy.deepcopy(pair.converted), budget)
    achieved = state_of(dialled).achieved
    return ratio_table(dialled).detach(), math.nan if achieved is None else achieved.share


def _check_lengths(law: str, pair: _Pair, arguments: dict[str, Any], executed: Tensor, lengths: Mapping[int, set[int]]) -> None:
    regions = set(pair.regions(arguments))
    now = example_call(pair.original.forward, arguments)
    planned = example_call(pair.original.forward, pair.arguments)
    if {t.shape[1:] for t in now.tensors} != {t.shape[1:] for t in planned.tensors}:
        return  # other sizes than planned: how many tokens may bypass is not known here
    paths = [site.path for site in pair.plan.routed_sites]
    single = {row for row, path in enumerate(paths) if paths.count(path) == 1}  # of a block called twice, calls are not told apart
    for row, site in enumerate(pair.plan.routed_sites):
        ratios = {region: float(executed[row, region]) for region in regions}
        wanted = {site.staying + kept_count(ratio, site.tokens) for ratio in ratios.values() if ratio < 1.0}
        found = lengths.get(row, set())
        gone = any(ratio >= 1.0 for ratio in ratios.values())  # a block all may bypass is left out, or keeps one where its text is read
        if found - ({site.staying + 1} if gone else set()) != wanted - ({site.staying + 1} if gone else set()) and row in single:
            raise LawError(
                f"{law}: {site.path} was given {sorted(found)} tokens; at the ratios {ratios} of {site.tokens} it has to be "
                f"{sorted(wanted)}."
            )


@contextmanager
def _lengths(model: nn.Module, planned: SurgeryPlan) -> Iterator[dict[int, set[int]]]:
    """Collect how many tokens each site's block is given."""
    found: dict[int, set[int]] = {}

    def hook(path: str, rows: list[int]) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for row in rows:
                stream, axes = next(iter(planned.routed_sites[row].aligned.items()))
                found.setdefault(row, set()).add(named_leaves(module, args, kwargs, Tensor)[stream][1].shape[axes.split().index("n")])

        return see

    rows: dict[str, list[int]] = {}
    for row, site in enumerate(planned.routed_sites):
        rows.setdefault(site.path, []).append(row)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(path, of), with_kwargs=True) for path, of in rows.items() if len(of) == 1
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Pair:
    """A converted model and the original it came from, both copies.

    Attributes:
        original: Not converted, in eval.
        converted: With routers that tell tokens apart.
        arguments: Arguments of the call, by name.
    """

    original: nn.Module
    converted: nn.Module
    arguments: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, config: DiffCRConfig | None, seed: int) -> _Pair:
        converted = copy.deepcopy(model)
        _wake(converted, seed)
        original = copy.deepcopy(converted)
        if hasattr(model, "diffcr"):
            restore_(original)
        else:
            convert_(converted, inputs, config)
            _train_by_hand(converted, seed)
        return cls(original.eval(), converted, example_call(original.forward, inputs).arguments)

    @property
    def state(self) -> DiffCRState:
        return state_of(self.converted)

    @property
    def plan(self) -> SurgeryPlan:
        return self.state.plan

    def regions(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the region of each sample in exact arithmetic: the range in equal parts, each with its lower end."""
        settled, batch = self.plan.regions, _batch_size(self.plan, arguments)
        value = arguments.get(settled.argument) if settled.argument else None
        if settled.count == 1 or value is None:
            return [0] * batch
        times = value.detach().double().flatten().tolist() if isinstance(value, Tensor) else [float(value)]
        low, high = Fraction(settled.low), Fraction(settled.high)
        found = [min(settled.count - 1, math.floor((Fraction(t) - low) * settled.count / (high - low))) for t in times]
        return found * batch if len(found) == 1 else found

    def ways(self, region: int, training: bool) -> list[list[Way]]:
        """Return how each site is run in a region: in training at the two bins around its ratio, else at one."""
        config = self.state.config
        if training and config.learn_ratios:
            return [bracket(ratio, config.reachable_bins) for ratio in self.state.ratios()[:, region].tolist()]
        return [[Way(1.0, ratio)] for ratio in self.state.executed_ratios()[:, region].tolist()]

    def at(self, arguments: Mapping[str, Any], regions: Sequence[int]) -> dict[str, Any]:
        """Return the arguments with timesteps in the middles of the given regions."""
        settled = self.plan.regions
        value = arguments[str(settled.argument)]
        middles = [settled.low + (settled.high - settled.low) * (region + 0.5) / settled.count for region in regions]
        return {**arguments, str(settled.argument): torch.tensor(middles, dtype=torch.float64, device=value.device).to(value.dtype)}

    def spread(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with timesteps of several regions, if they have one each and all lie in one."""
        regions, count = self.regions(arguments), self.plan.regions.count
        value = arguments.get(self.plan.regions.argument or "")
        if count == 1 or len(set(regions)) > 1 or not (isinstance(value, Tensor) and value.shape == (len(regions),)):
            return arguments
        return self.at(arguments, [i % count for i in range(len(regions))])

    def of_one_region(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the arguments at timesteps of each region in turn."""
        value, batch = arguments.get(self.plan.regions.argument or ""), len(self.regions(arguments))
        if self.plan.regions.count == 1 or not (isinstance(value, Tensor) and value.shape == (batch,)):
            return []
        return [self.at(arguments, [region] * batch) for region in range(self.plan.regions.count)]


def _wake(model: nn.Module, seed: int) -> None:
    """Give noise to weights that are all zero: a block behind a closed gate does nothing that a law could see."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not bool(parameter.any()) and "diffcr" not in name.split("."):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))


def _train_by_hand(converted: nn.Module, seed: int) -> None:
    """Give routers an opinion, and every entry of the table a ratio of its own."""
    source, state = torch.Generator().manual_seed(seed + 1), state_of(converted)
    with torch.no_grad():
        for router in state.routers.values():
            weight: Any = router.weight
            weight.copy_(torch.randn(weight.shape, generator=source) * 2 / weight.numel() ** 0.5)
        if state.config.learn_ratios:
            table = ratio_table(converted)
            table.copy_(torch.rand(table.shape, generator=source) * state.config.max_ratio)


def _batch_size(planned: SurgeryPlan, arguments: Mapping[str, Any]) -> int:
    """Return the number of samples: of timesteps where there are several, else of rows in the first floating-point input."""
    if any("b" not in next(iter(site.aligned.values())).split() for site in planned.routed_sites):
        return 1  # a packed stream is one sample
    timestep = arguments.get(planned.regions.argument or "")
    if isinstance(timestep, Tensor) and timestep.ndim and len(timestep) > 1:
        return len(timestep)
    return next((len(v) for v in flatten(arguments)[1] if v.ndim > 1 and v.is_floating_point()), 1)


def _sample(arguments: Mapping[str, Any], index: int, batch: int, shared: Collection[str]) -> dict[str, Any]:
    def cut(path: str, leaf: Any) -> Any:
        own = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch and path.split(".")[0] not in shared
        return leaf[index : index + 1] if own else leaf

    return {name: map_leaves(value, cut, name) for name, value in arguments.items()}


def _sample_of_output(output: Any, index: int, batch: int) -> Any:
    return map_leaves(
        output, lambda _, t: t[index : index + 1] if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch and batch > 1 else t
    )


def _rounding(tree: Any) -> float:
    return max((_ROUNDING.get(t.dtype, 0.0) for t in flatten(tree)[1]), default=0.0)


def _unchanged(law: str, what: str, before: Mapping[str, Any], model: nn.Module) -> None:
    changed = what_changed(before, snapshot(model))
    if changed:
        raise LawError(f"{law}: {what} has changed {', '.join(changed)}.")


def _call(model: nn.Module, inputs: Any) -> Any:
    """Call a model from a fixed random state, on containers of its own: a forward may pop from them."""
    own = map_leaves(inputs, lambda _, leaf: leaf)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(**own) if isinstance(own, dict) else model(*own)


def _differentiate(model: nn.Module, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a model's output, and the gradient of a fixed random projection of it in every parameter that gets one."""
    model.zero_grad()
    with torch.enable_grad():
        output = _call(model, inputs)
        source = torch.Generator().manual_seed(7)
        parts = [t for t in flatten(output)[1] if t.requires_grad]
        # One row of noise for all samples, so that a sample's loss alone is its share of the batch's.
        losses = [(t * torch.randn(t.shape[1:] if t.ndim > 1 else (), generator=source).to(t.device, t.dtype)).sum() for t in parts]
    if losses:
        torch.stack([loss.float() for loss in losses]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return map_leaves(output, lambda _, leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf), gradients


@dataclass
class _Seen:
    """What hooks saw of a converted model: row of each router -> the stream ``b n c`` it was given and its scores ``b n``."""

    streams: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    read: dict[int, Tensor] = field(default_factory=dict)


def _plain(x: Tensor, site: BlockSite) -> Tensor:
    """Bring a stream, or scores of it, into ``b n`` order."""
    words = next(iter(site.aligned.values())).split()
    return x[None] if "b" not in words else x.movedim((words.index("b"), words.index("n")), (0, 1))


@contextmanager
def _watched(pair: _Pair, readers: Mapping[int, tuple[str, str]]) -> Iterator[_Seen]:
    """Watch the routers, and the modules that read the streams behind sites."""
    seen, sites = _Seen(), pair.plan.routed_sites

    def at_router(row: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
            seen.streams[row] = _plain(args[0].detach().clone(), sites[row])
            seen.scores[row] = _plain(scores.detach().clone(), sites[row])

        return hook

    def at_reader(row: int, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            paths, tensors, _ = flatten((args, kwargs))
            if path in paths:
                seen.read[row] = _plain(tensors[paths.index(path)].detach().clone(), sites[row])

        return hook

    handles = [router.register_forward_hook(at_router(int(row))) for row, router in pair.state.routers.items()]
    for row, (module, path) in readers.items():
        handles.append(pair.converted.get_submodule(module).register_forward_pre_hook(at_reader(row, path), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _compare_by_hand(law: str, pair: _Pair, arguments: dict[str, Any], ways: Sequence[Sequence[Way]], what: str = "the output") -> bool:
    """Compare a call with the method done by hand; returns whether rounding could have decided between tokens, and nothing was compared."""
    with torch.no_grad():
        with _watched(pair, {}) as first:
            _call(pair.converted, arguments)
        if any(_close_call(scores) for scores in first.scores.values()):
            return True
        weights: dict[int, Tensor] = {int(row): router.weight for row, router in pair.state.routers.items()}  # type: ignore[misc]
        hand = ByHand(pair.original, arguments, pair.plan).run(ways, weights, first.scores)
        with _watched(pair, hand.readers) as seen:
            output = _call(pair.converted, arguments)
    sites = pair.plan.routed_sites
    for row in sorted(seen.streams):
        where = f"{what}: the stream that enters {sites[row].path}"
        same(law, where, seen.streams[row], hand.entered[row], tolerance=_rounding(seen.streams[row]), describe=_told(hand, sites, row))
        same(law, f"{what}: the scores at {sites[row].path}", seen.scores[row], hand.scores[row], tolerance=_rounding(seen.streams[row]))
    for row, site in enumerate(sites):
        after = seen.read.get(
            row, next((seen.streams[n] for n, before in hand.continues.items() if before == row and n in seen.streams), None)
        )
        if row not in seen.streams or after is None or len({way.ratio for way in ways[row]}) > 1:
            continue
        moved = (after != seen.streams[row]).any(-1) & hand.bypassed[row]
        if bool(moved.any()):
            sample, token = moved.nonzero()[0].tolist()
            raise LawError(f"{law}: {what}: token {token} of sample {sample} bypassed {site.path}, and did not leave it as it entered.")
    same(law, what, output, hand.output, tolerance=_rounding(output), describe=_told(hand, sites, len(sites)))
    return False


def _told(hand: Run, sites: Sequence[BlockSite], row: int) -> Any:
    """Return what says which token of which site went wrong."""

    def describe(_: str, index: tuple[int, ...]) -> str:
        if row == 0 or row - 1 not in hand.bypassed:
            return ""
        mask = hand.bypassed[row - 1]
        if len(index) < 2 or row == len(sites) or index[0] >= mask.shape[0] or index[1] >= mask.shape[1]:
            return f"The last routed block before it is {sites[row - 1].path}."
        fate = "bypassed" if bool(mask[index[0], index[1]]) else "was kept by"
        return f"Token {index[1]} of sample {index[0]} {fate} {sites[row - 1].path}, the routed block before."

    return describe


def _close_call(scores: Tensor) -> bool:
    gaps = scores.sort(dim=1).values.diff(dim=1)
    return bool(((gaps > 0) & (gaps < _CLOSE)).any())
