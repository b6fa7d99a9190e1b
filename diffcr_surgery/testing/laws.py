"""The laws of the method, as functions to call on any model; each raises :class:`LawError` with the token, argument or site that broke it.

They take a plain model, of which a copy is converted, with routers and ratios drawn from a seed; or a converted one, of which a copy is
tested with the routers and ratios it has. The model itself is left alone. What draws random numbers (dropout) does so in
:func:`check_conversion` alone; the other laws keep the model in ``eval()`` and let the ratios train.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import flatten
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.plan import plan
from diffcr_surgery.runtime.convert import convert_, ratio_loss, ratio_table, restore_, state_of
from diffcr_surgery.runtime.state import DiffCRState
from diffcr_surgery.save import load_adapter_, save_adapter
from diffcr_surgery.specialize import specialize_
from diffcr_surgery.testing.by_hand import ByHand, bracket, kept_count
from diffcr_surgery.testing.compare import LawError, same, snapshot, what_changed
from diffcr_surgery.testing.pair import Pair, call, differentiate, projections, rounding, sample_of, sample_of_output
from diffcr_surgery.testing.watch import compare_by_hand, lengths_of, require_planned_size

__all__ = [
    "check_bypass",
    "check_conversion",
    "check_gradients",
    "check_mixed_timesteps",
    "check_round_trip",
    "check_specialization",
]


_SMALL = 0.01  # share of the largest gradient below which another may be rounding alone
_LONGEST = 2000  # steps of gradient descent on the budget loss
_STEPS = (0.05, 0.01, 0.002)  # of a ratio, to see the slope of the loss, in units of the bins' distance


def check_conversion(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None) -> None:
    """Check laws 1 and 5: converted at ratio 0 is the original, bit for bit; planned, or converted and restored, nothing has happened.

    Outputs are compared in eval and in training, with and without gradients; so are the gradients of all original weights.

    Args:
        model: A model that is not converted.
        inputs: Arguments of a call, as for :func:`diffcr_surgery.plan`.
        config: Settings; ratios begin at 0 and are learned, and in place of the paper's gate, which halves updates from the start, stands
            the doubled one.

    Raises:
        LawError: If a law does not hold.
        SurgeryError: If the model cannot be planned or converted.
    """
    law = "check_conversion"
    settings = replace(config or DiffCRConfig(), initial_ratio=0.0, learn_ratios=True)
    settings = replace(settings, gate="doubled_sigmoid") if settings.gate == "sigmoid" else settings
    original, converted = copy.deepcopy(model), copy.deepcopy(model)
    for parameter in converted.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None  # planning in the midst of training
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
            same(law, f"the output {mode} without gradients", call(converted, inputs), call(original, inputs))
        (actual, found), (expected, wanted) = differentiate(converted, inputs), differentiate(original, inputs)
        same(law, f"the output {mode}", actual, expected)
        own = {name: gradient for name, gradient in found.items() if not name.startswith("diffcr.")}
        if own.keys() != wanted.keys():
            raise LawError(f"{law}: of {sorted(own.keys() ^ wanted.keys())}, only one of the two has a gradient {mode}.")
        for name, gradient in wanted.items():
            same(law, f"the gradient {mode} of {name}", own[name], gradient)


def check_bypass(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, seed: int = 0) -> None:
    """Check law 2: a bypassed token leaves its block exactly as it entered; a kept one as if the block had seen the kept tokens alone.

    The converted model, in eval, is compared with the method done by hand on the recorded original: the stream that enters each site, and
    the output; for every timestep region the call's samples lie in, at that region's ratios. Equal is meant to rounding; where the next
    router, or a module, reads the very stream that a block left, bypassed tokens have to be in it bit for bit. What moves with the tokens
    is taken from the plan: whether that is right, :func:`check_pattern` tells.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call.
        config: Settings, if it is not converted.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the site, sample and token.
        SurgeryError, ValueError: If the model cannot be converted or tested; the text says why.
    """
    law, pair = "check_bypass", Pair.of(model, inputs, config, seed)
    pair.converted.eval()
    executed, config = pair.state.executed_ratios(), pair.state.config
    highest = max(ratio for ratio in config.bins if ratio <= config.max_ratio)
    hand = ByHand(pair.original, pair.arguments, pair.plan)
    for region in sorted(set(pair.regions(pair.arguments))):
        with torch.no_grad():  # the same executable ratios in all regions, so that the batch runs together
            ratio_table(pair.converted).copy_(executed[:, [region]].expand_as(executed).clamp(max=highest))
        compare_by_hand(law, pair, hand, pair.arguments, pair.ways(0, False))


def check_mixed_timesteps(
    model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, shared: Collection[str] = (), seed: int = 0
) -> None:
    """Check law 3: a batch of several timestep regions is its samples one by one, and each is the method done by hand in its region.

    In eval, where every site runs at one executable ratio, and in training, where it blends the two around its ratio; there the
    gradients of the batch are those of its samples added up. If all timesteps given lie in one region, they are spread over the regions. It
    takes settings with several regions and a call with several samples, one timestep each, to mix anything.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call with several samples.
        config: Settings, if it is not converted.
        shared: Arguments without a batch axis whose first axis happens to be as long as the batch.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the sample and its region.
        SurgeryError, ValueError: If the model cannot be converted or tested; the text says why.
    """
    law, pair = "check_mixed_timesteps", Pair.of(model, inputs, config, seed)
    arguments = pair.spread(pair.arguments)
    regions = pair.regions(arguments) if pair.plan.regions.count > 1 else [0]  # of one region, all samples run together
    samples = [sample_of(arguments, i, len(regions), shared) for i in range(len(regions))] if len(regions) > 1 else [arguments]
    pair.converted.eval()
    hand = ByHand(pair.original, samples[0], pair.plan)
    for training in (False, True):
        mode = "in training" if training else "in eval"
        pair.state.train(training)
        together, gradients = differentiate(pair.converted, arguments)
        summed: dict[str, Tensor] = {}
        undecided = False
        for i, (sample, region) in enumerate(zip(samples, regions, strict=True)):
            alone, own = differentiate(pair.converted, sample)
            for name, gradient in own.items():
                summed[name] = summed[name] + gradient if name in summed else gradient
            what = f"sample {i} (region {region}) {mode}"
            close_call = compare_by_hand(law, pair, hand, sample, pair.ways(region, training), what)
            undecided |= close_call
            if not close_call:
                same(law, f"{what}, in its batch", sample_of_output(together, i, len(regions)), alone, tolerance=rounding(alone))
        if undecided or len(regions) == 1:
            continue
        if gradients.keys() != summed.keys():
            raise LawError(f"{law}: of {sorted(gradients.keys() ^ summed.keys())}, only batch or samples have a gradient {mode}.")
        largest = max((float(gradient.abs().max()) for gradient in summed.values()), default=0.0)
        for name, gradient in summed.items():
            unit = max(float(gradient.abs().max()), _SMALL * largest)  # what is zero but for rounding is measured by the others
            same(law, f"the gradient {mode} of {name}", gradients[name], gradient, tolerance=10 * rounding(gradient), unit=unit)


def check_gradients(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, seed: int = 0) -> None:
    """Check law 4: finite gradients reach every ratio of the regions seen and every router that decides; the budget loss meets its target.

    The gradient of the last site's ratio, behind which no router ranks anything, is compared with the slope of the loss. A ratio between
    two bins that keep the same tokens has nothing to learn from, and is passed over; of frozen ratios, routers alone are looked at. A model
    that hands on its class token alone fails here at its last block, whose bypassing tokens no one reads.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call, of the size a converted model was planned with.
        config: Settings, if it is not converted.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the site and region.
        SurgeryError, ValueError: If the model cannot be converted or tested; the text says why.
    """
    law, pair = "check_gradients", Pair.of(model, inputs, config, seed)
    require_planned_size(law, pair)
    state, table = pair.state, ratio_table(pair.converted)
    pair.converted.eval()
    state.train()
    _, gradients = differentiate(pair.converted, pair.arguments)
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise LawError(f"{law}: the gradient of {name} is not finite.")
    seen = sorted(set(pair.regions(pair.arguments)))
    ways = {region: pair.ways(region, True) for region in seen}
    for row, site in enumerate(pair.plan.routed_sites):
        counts = {region: [kept_count(way.ratio, site.tokens) for way in ways[region][row]] for region in seen}
        reached = gradients.get("diffcr.ratio_table")
        for region in [region for region in seen if len(set(counts[region])) > 1 and table.requires_grad]:
            if reached is None or not float(reached[row, region]):
                raise LawError(f"{law}: no gradient reaches the ratio of {site.path} in region {region}.")
            if row == len(pair.plan.routed_sites) - 1:
                _check_slope(law, pair, region)
        # A router is heard where its gate scales a token, and where a ratio on its way between two bins lets one go.
        heard = [r for r in seen if min(counts[r]) < site.tokens and (counts[r][0] < site.tokens or ways[r][row][-1].share > 1e-6)]
        router = gradients.get(f"diffcr.routers.{site.router}.weight")
        if heard and pair.state.routers[str(site.router)].weight.requires_grad and (router is None or not bool(router.any())):
            raise LawError(f"{law}: no gradient reaches the router of {site.path}, whose ratio in region {heard[0]} is not 0.")
    if table.requires_grad and state.config.ratio_loss_weight:
        _check_budget(law, pair)


def _check_slope(law: str, pair: Pair, region: int) -> None:
    """Compare the gradient of the last site's ratio with how the loss changes as the ratio does."""
    table, site = ratio_table(pair.converted), pair.plan.routed_sites[-1]
    lower, upper = (way.ratio for way in pair.ways(region, True)[-1])
    middle = (lower + upper) / 2
    if middle + _STEPS[0] * (upper - lower) > pair.state.config.max_ratio:
        return
    before = table.detach().clone()

    def outputs(ratio: float) -> list[Tensor]:
        with torch.no_grad():
            table[-1, region] = ratio
            return [t.double() for t in flatten(call(pair.converted, pair.arguments))[1] if t.is_floating_point()]

    size = sum(float(t.abs().sum()) for t in outputs(middle))
    found = float(differentiate(pair.converted, pair.arguments)[1]["diffcr.ratio_table"][-1, region])
    slopes = []
    for step in [share * (upper - lower) for share in _STEPS]:  # shorter and shorter ones, until the loss hardly bends between
        pairs = zip(outputs(middle - step), outputs(middle + step), strict=True)
        slopes.append(sum(float(loss) for loss in projections([high - low for low, high in pairs])) / (2 * step))
        # Each entry is rounded to single precision; its noise is of the size of 1.
        if abs(found - slopes[-1]) <= 0.05 * max(abs(found), abs(slopes[-1])) + 1e-6 * size / step:
            break
    else:
        path, said = site.path, ", ".join(f"{slope:.4g}" for slope in slopes)
        raise LawError(f"{law}: the gradient of the ratio of {path} in region {region} is {found:.4g}; the loss has a slope of {said}.")
    with torch.no_grad():
        table.copy_(before)


def _check_budget(law: str, pair: Pair) -> None:
    """Let plain gradient descent follow the budget loss alone until it is there; where ratios have reached a bound, that takes longer."""
    state, table = pair.state, ratio_table(pair.converted)
    tokens = state.config.cost == "tokens"  # by plain arithmetic; what other costs save is measured
    target = state.config.target_ratio if tokens and state.config.target_share is None else state.target_saving
    rate = 0.1 / max(float(torch.autograd.grad(state.saving(), table)[0].square().sum()) * state.config.ratio_loss_weight, 1e-12)
    for _ in range(_LONGEST):
        saving = _mean_ratio(state, state.ratios()) if tokens else float(state.saving().detach())
        if abs(saving - target) < 0.01:
            return
        (gradient,) = torch.autograd.grad(ratio_loss(pair.converted), table)
        if not bool(gradient.isfinite().all()):
            raise LawError(f"{law}: the gradient of the budget loss is not finite.")
        with torch.no_grad():
            table.sub_(rate * gradient)
    raise LawError(f"{law}: following the budget loss leads to a saving of {saving:.3f}; its target is {target:.3f}.")


def _mean_ratio(state: DiffCRState, ratios: Tensor) -> float:
    """Return the mean of ratios ``l r``, each region counted as often as inference visits it."""
    weights = torch.tensor(state.config.region_weights or (1.0,) * ratios.shape[1], dtype=torch.float64)
    return float((ratios.detach().double().cpu().mean(0) * weights).sum() / weights.sum())


def check_round_trip(model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, seed: int = 0) -> None:
    """Check law 6, first half: saved and loaded, or copied, a converted model is equal bit for bit, in eval and in training.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call.
        config: Settings, if it is not converted.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: If anything differs.
        SurgeryError, ValueError: If the model cannot be converted or tested; the text says why.
    """
    law, pair = "check_round_trip", Pair.of(model, inputs, config, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(pair.converted, folder)
        loaded = load_adapter_(copy.deepcopy(pair.original), folder, pair.arguments)
    given, found = pair.state.config, state_of(loaded)
    # What "auto" was settled to is what is saved, and has to be what the plan settled it to.
    settings = replace(found.config, timestep_argument=given.timestep_argument, timestep_range=given.timestep_range)
    if settings != given or found.plan.regions != pair.plan.regions:
        raise LawError(f"{law}: loaded, the settings are {found.config}; saved were {given}.")
    others = {"loaded": loaded, "copied": copy.deepcopy(pair.converted)}
    for name, other in others.items():
        same(law, f"{name}, the state", dict(other.state_dict()), dict(pair.converted.state_dict()))
    for training in (False, True):
        mode = "in training" if training else "in eval"
        for one in (pair.converted, *others.values()):
            one.eval()
            state_of(one).train(training)
        expected, wanted = differentiate(pair.converted, pair.arguments)
        for name, other in others.items():
            actual, gradients = differentiate(other, pair.arguments)
            same(law, f"{name}, the output {mode}", actual, expected)
            same(law, f"{name}, the gradients {mode}", gradients, wanted)


def check_specialization(
    model: nn.Module, inputs: Any, config: DiffCRConfig | None = None, *, budgets: Sequence[float] = (0.5, 0.8), seed: int = 0
) -> None:
    """Check law 6, second half: specialised equals eval at the same ratios; every block sees k = ⌈(1 − ρ)·n⌉ tokens, never none.

    Every ratio is executed at one of the two bins around it, so that their mean is kept as nearly as that allows. A budget is met as nearly
    as the executable ratios allow, and a larger one takes no token from any block.

    Args:
        model: A model, converted or not.
        inputs: Arguments of a call, of the size a converted model was planned with.
        config: Settings, if it is not converted.
        budgets: Shares of the dense cost to specialise at besides, rising; those out of reach are passed over.
        seed: Of the routers and ratios, if it is not converted.

    Raises:
        LawError: Naming the site, region and counts, or the entry of the output.
        SurgeryError, ValueError: If the model cannot be converted or tested; the text says why.
    """
    law, pair = "check_specialization", Pair.of(model, inputs, config, seed)
    require_planned_size(law, pair)
    pair.converted.eval()
    _check_rounding(law, pair)
    fixed = specialize_(copy.deepcopy(pair.converted))
    same(law, "the ratios", ratio_table(fixed).detach(), pair.state.executed_ratios().to(ratio_table(fixed)))
    calls = [pair.arguments, *pair.of_one_region(pair.arguments)]
    expected: list[Any] = []
    for one, name in ((pair.converted, "converted"), (fixed, "specialised")):
        for gradients in (False, True):  # without them a specialised model puts tokens back in place
            with torch.set_grad_enabled(gradients):
                for number, arguments in enumerate(calls):
                    if number < 2:  # a first call of several regions, and of one, is recorded: that runs the blocks on all tokens
                        call(one, arguments)
                    with lengths_of(one, pair.plan) as lengths:
                        output = call(one, arguments)
                    _check_lengths(law, pair, arguments, lengths)
                    if number == len(expected):
                        expected.append(output)
                    same(law, f"the {name} output", output, expected[number], tolerance=rounding(output))
    kept: Tensor | None = None
    measured = pair.state.budget
    for budget in budgets:
        dialled = _at_budget(pair, budget)
        if dialled is None:
            continue
        ratios, achieved = dialled
        step = float((-measured.costs.diff(dim=1)).max() * measured.region_weights.max())
        if abs(achieved - budget) > step / 2 + 1e-5:
            raise LawError(f"{law}: a budget of {budget} came out as {achieved:.4f}, further away than half a step of one ratio.")
        if pair.state.config.cost == "tokens" and abs(1 - _mean_ratio(pair.state, ratios) - achieved) > 1e-5:
            raise LawError(
                f"{law}: at a budget of {budget} the ratios keep {1 - _mean_ratio(pair.state, ratios):.4f}; said is {achieved:.4f}."
            )
        if kept is not None and bool((ratios > kept + 1e-6).any()):
            row, region = (ratios > kept + 1e-6).nonzero()[0].tolist()
            raise LawError(f"{law}: the larger budget {budget} takes tokens from {pair.plan.routed_sites[row].path} in region {region}.")
        kept = ratios


def _check_rounding(law: str, pair: Pair) -> None:
    state, bins = pair.state, pair.state.config.reachable_bins
    table, executed = state.ratios(), state.executed_ratios()
    for index in itertools.product(*map(range, table.shape)):
        ways = [way.ratio for way in bracket(float(table[index]), bins) if way.share > 1e-5]
        if not any(abs(float(executed[index]) - ratio) < 1e-6 for ratio in ways):
            path = pair.plan.routed_sites[index[0]].path
            raise LawError(
                f"{law}: {path} is executed at {executed[index]:.3f} in region {index[1]}; its ratio {table[index]:.3f} lies at {ways}."
            )
    weights = state.config.region_weights or (1.0,) * table.shape[1]
    step = max(b - a for a, b in itertools.pairwise(bins)) * max(weights) / sum(weights) / len(table)
    gap = abs(_mean_ratio(state, executed) - _mean_ratio(state, table))
    if state.config.cost == "tokens" and gap > step / 2 + 1e-5:
        raise LawError(f"{law}: rounding moves the mean ratio by {gap:.4f}, more than half a step of one ratio.")


def _at_budget(pair: Pair, budget: float) -> tuple[Tensor, float] | None:
    """Return ratios and achieved share of a copy specialised at a budget; ``None`` where the bounds of the ratios do not reach it."""
    whole = float(pair.state.budget.costs[:, 0].sum())
    if budget < 1 - whole * pair.state.budget.uniform(pair.state.config.max_ratio):
        return None
    dialled = specialize_(copy.deepcopy(pair.converted), budget)
    achieved = state_of(dialled).achieved
    if achieved is None:
        raise LawError(f"check_specialization: a model specialised at a budget of {budget} does not say what it achieved.")
    return ratio_table(dialled).detach(), achieved.share


def _check_lengths(law: str, pair: Pair, arguments: dict[str, Any], lengths: Mapping[int, set[int]]) -> None:
    paths, executed = [site.path for site in pair.plan.routed_sites], pair.executed()
    for row, site in enumerate(pair.plan.routed_sites):
        if paths.count(site.path) > 1:
            continue  # its calls are not told apart
        ratios = {region: executed[row][region] for region in set(pair.regions(arguments))}
        wanted = {site.staying + kept_count(ratio, site.tokens) for ratio in ratios.values() if ratio < 1.0}
        found = lengths.get(row, set())
        # A block that all tokens may bypass is left out, or keeps one where its text is read.
        open_ = {site.staying + 1} if any(ratio >= 1.0 for ratio in ratios.values()) else set()
        if found - open_ != wanted - open_:
            raise LawError(
                f"{law}: {site.path} was given {sorted(found)} tokens; at the ratios {ratios} of {site.tokens} it has to be "
                f"{sorted(wanted)}."
            )


def _unchanged(law: str, what: str, before: Mapping[str, Any], model: nn.Module) -> None:
    changed = what_changed(before, snapshot(model))
    if changed:
        raise LawError(f"{law}: {what} has changed {', '.join(changed)}.")
