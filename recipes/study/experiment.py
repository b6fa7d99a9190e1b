"""One experiment: fine-tune one arm from the dense model of its seed, measure it, and return what was found as a record."""

import functools
import hashlib
import inspect
import json
import os
import statistics
import string
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from baselines.random_tokens import RandomTokens
from baselines.token_merging import TokenMerging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import diffcr_surgery as dcs
from diffcr_surgery.bench import hooks
from diffcr_surgery.bench.measure import seconds_in_turns
from diffcr_surgery.demo.report import processor_name
from diffcr_surgery.flops import count_flops
from diffcr_surgery.ratios import Budget
from diffcr_surgery.tokens import kept_count, rank_tokens
from study.arms import ARMS, BINS, Arm, Experiment
from study.tasks import PARTS, TIMESTEPS, Batch, Task, draw, task_named
from study.training import OwnRule, PapersRule, Rule, Schedule, Teacher, held_out_losses, train

__all__ = ["SIZES", "Place", "Record", "Size", "key_of", "prepare", "run"]

VERSION = 1  # of the code behind records and weights: to be raised with every change of it that changes what comes out
SHOWN = 4  # held-out images whose routing is kept
DIGITS = string.digits + string.ascii_lowercase
SEARCHED = 24  # numbers of kept tokens tried for equal cost

Record = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large denoisers are, how long they train, and how closely they are looked at.

    Attributes:
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads of a block.
        base_steps: Steps of the dense model that all arms of a seed start from.
        steps: Steps of each arm's fine-tuning.
        batch: Images a step.
        base_lr: Highest learning rate of the dense training.
        lr: Highest learning rate of the fine-tuning, of weights and routers.
        samples: Images drawn of each arm; of photographs, no more than there are held-out crops.
        sample_steps: Denoising steps of a sample; a multiple of the parts of the timestep range.
        sample_batch: Images at a time, in drawing and in the held-out loss.
        timed_batch: Images at a time, in timing.
        rounds: How often each call is timed.
    """

    width: int
    depth: int
    heads: int
    base_steps: int
    steps: int
    batch: int
    base_lr: float
    lr: float
    samples: int
    sample_batch: int
    timed_batch: int
    rounds: int
    sample_steps: int = PARTS


SIZES = {
    "smoke": Size(16, 2, 2, base_steps=4, steps=10, batch=2, base_lr=3e-3, lr=1e-3, samples=8, sample_batch=8, timed_batch=2, rounds=1),
    "small": Size(
        64, 6, 2, base_steps=3000, steps=1200, batch=8, base_lr=2e-3, lr=1e-3, samples=600, sample_batch=32, timed_batch=16, rounds=11
    ),
    "large": Size(
        384,
        12,
        6,
        base_steps=100_000,
        steps=50_000,
        batch=128,
        base_lr=3e-4,
        lr=1e-4,
        samples=10_000,
        sample_batch=500,
        timed_batch=500,
        rounds=21,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where and how large experiments are run.

    Attributes:
        size: Name of the size.
        folder: For weights.
        device: What they run on.
    """

    size: str
    folder: Path
    device: str


def key_of(experiment: Experiment, size: str) -> str:
    """Return what stands for an experiment in the cache: it changes with every setting that the outcome depends on."""
    arm = ARMS[experiment.arm]
    decisive = {name: value for name, value in asdict(arm).items() if name not in ("title", "targets", "against")}
    return _digest(VERSION, asdict(experiment), asdict(SIZES[size]), decisive, settings_of(arm, experiment.target))


def settings_of(arm: Arm, target: float) -> Record:
    """Return everything the library was told or left to decide in an arm, its defaults among it."""
    if arm.kind != "routed":
        return {}
    parameters = inspect.signature(dcs.RatioOptimizer).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty} | dict(arm.options)
    return {"config": json.loads(arm.config(target).to_json()), "optimizer": options if arm.rule in ("own", "relative") else None}


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class Models:
    """The dense models of a task and a seed: trained once, then loaded.

    Args:
        task: What they denoise.
        seed: Of their weights and training.
        place: How large they are, and where they are kept.
    """

    def __init__(self, task: Task, seed: int, place: Place) -> None:
        self.task, self.seed, self.place, self.size = task, seed, place, SIZES[place.size]

    def finetuning(self) -> Schedule:
        """Return the schedule of all arms."""
        return Schedule(self.size.steps, self.size.batch, self.size.lr)

    def base(self) -> nn.Module:
        """Return the model that all arms start from."""
        s = self.size
        torch.manual_seed(self.seed)
        new = self.task.new_denoiser(s.width, s.depth, s.heads).to(self.place.device)
        return self._kept("base", new, Schedule(s.base_steps, s.batch, s.base_lr), 10 * self.seed)

    def dense(self) -> nn.Module:
        """Return that model fine-tuned as it is, for as long as the arms and on the same data."""
        return self._kept("dense", self.base(), self.finetuning(), 10 * self.seed + 1)

    def _version(self) -> str:
        """Return what dense weights depend on besides task and seed, as a digest."""
        s = self.size
        return _digest(VERSION, s.width, s.depth, s.heads, s.base_steps, s.base_lr, s.steps, s.lr, s.batch)

    def _kept(self, name: str, model: nn.Module, schedule: Schedule, seed: int) -> nn.Module:
        path = self.place.folder / f"{self.task.name}-{self.seed}-{self._version()}-{name}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path, device=self.place.device))
        else:
            train(self.task, model, schedule, seed=seed)
            scratch = path.with_suffix(f".{os.getpid()}")
            save_file(model.state_dict(), scratch)
            scratch.replace(path)  # there whole or not at all
        return model.eval()


def prepare(task: str, seed: int, place: Place) -> None:
    """Train the dense models of a task and a seed, if they are not there."""
    torch.set_num_threads(1)
    Models(task_named(task), seed, place).dense()


def run(experiment: Experiment, place: Place) -> Record:
    """Run an experiment and return what it found, as JSON takes it: all that stands behind the tables and pictures of the report."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    task, size, seed = task_named(experiment.task), SIZES[place.size], experiment.seed
    models = Models(task, seed, place)
    base, dense = models.base(), models.dense()
    found: Record = {"key": key_of(experiment, place.size), **asdict(experiment), "size": place.size, "base": _fingerprint(base)}
    model, more = _made(experiment, models)
    found |= more
    losses = held_out_losses(task, model, seed=10 * seed + 2, batch=size.sample_batch)
    found |= {"losses": losses, "loss": statistics.fmean(losses)} | _costs(model, dense, task, size)
    wanted = task.wanted(size.samples).to(torch.device(place.device))
    samples = draw(task, model, wanted, steps=size.sample_steps, seed=10 * seed + 3, batch=size.sample_batch)
    found |= {"samples": len(wanted), **asdict(task.judge(samples, wanted))}
    seconds = time.perf_counter() - started
    return found | {"seconds": seconds, "device": _device(place), "torch": torch.__version__}


def _made(experiment: Experiment, models: Models) -> tuple[nn.Module, Record]:
    """Return the model of an arm, ready for inference, and what is known of how it came to be."""
    arm, task, target = ARMS[experiment.arm], models.task, experiment.target
    if arm.kind == "dense":
        return models.dense(), {"ratio": 0.0}
    model = models.base() if arm.trained else models.dense()
    example = call_of(task.held_out[:1].to(torch.device(models.place.device)), TIMESTEPS // 2)
    plan = dcs.plan(model, example, dcs.DiffCRConfig(cost="flops", bins=BINS))
    budget = Budget.of(plan.config, torch.tensor(plan.site_costs))
    share = 1 - _whole(budget) * budget.uniform(target)  # of FLOPs, what all arms of a target are to come down to
    found: Record = {}
    if arm.kind == "routed":
        dcs.convert_(model, example, arm.config(target))
        found["settings"] = settings_of(arm, target)
    elif arm.kind == "shallow":
        found["ratio"] = _leave_out(model, example, budget, target)
    else:
        found["ratio"] = _shorten(model, plan, example, share, experiment)
    if arm.trained:
        found["train_seconds"] = _finetune(model, arm, models)
    if arm.kind == "routed":
        found |= _specialised(model, arm, task, example, budget, share)
    elif arm.kind == "shallow":
        dcs.specialize_(model)
    return model, found


def _finetune(model: nn.Module, arm: Arm, models: Models) -> float:
    """Fine-tune an arm in place and return the seconds it took."""
    schedule = models.finetuning()
    rules: dict[str, Callable[[], Rule | None]] = {
        "fixed": lambda: None,
        "own": lambda: OwnRule(model, schedule.steps, False, arm.options),
        "relative": lambda: OwnRule(model, schedule.steps, True, arm.options),
        "paper": lambda: PapersRule(model, lr=schedule.lr),
    }
    rule = rules[arm.rule]() if arm.kind == "routed" else None
    teacher = Teacher(models.dense(), arm.distill_weight) if arm.distill_weight else None
    started = time.perf_counter()
    train(models.task, model, schedule, seed=10 * models.seed + 1, rule=rule, teacher=teacher)
    return time.perf_counter() - started


def _specialised(model: nn.Module, arm: Arm, task: Task, example: dict[str, Any], budget: Budget, share: float) -> Record:
    """Specialise a fine-tuned arm in place, and tell what it learned.

    Args:
        model: It.
        arm: What it is.
        task: Gives the images whose routing is kept.
        example: Arguments of a call, to count on.
        budget: What ratios save in FLOPs.
        share: Of FLOPs, what it is to come down to; where training did not end there, the dial takes the table there.
    """
    state: Any = model.diffcr
    executed = state.executed_ratios()
    regions = executed.shape[1]
    saving = float(replace(budget, region_weights=torch.full((regions,), 1 / regions)).saving(executed))
    found = {"table": dcs.ratio_table(model).tolist(), "routing": routing_maps(model, task), "trained_share": 1 - _whole(budget) * saving}
    if arm.rule == "paper" or state.config.cost != "flops":
        dcs.specialize_(model, share, cost="flops", example_inputs=example)
    else:
        dcs.specialize_(model)
    return found | {"executed": dcs.ratio_table(model).tolist(), "ratio": state.achieved.ratio}


def _whole(budget: Budget) -> float:
    """Return the share of the dense model's cost that its blocks take."""
    return float(budget.costs[:, 0].sum())


@torch.no_grad()
def routing_maps(model: nn.Module, task: Task) -> list[list[str]]:
    """Return through how many blocks each token of some held-out images goes, a digit (of base 36) a token: for each region, of each image.

    Args:
        model: A converted model, not yet specialised.
        task: Gives the images, and the noise schedule.
    """
    state: Any = model.diffcr
    sites, regions = state.plan.routed_sites, state.plan.regions.count
    images = task.held_out[:SHOWN].to(state.ratio_table.device)
    noise = torch.randn(images.clean.shape, generator=torch.Generator().manual_seed(0)).to(images.clean)
    maps = []
    for region in range(regions):
        timestep = int((region + 0.5) * TIMESTEPS / regions)
        timesteps = torch.full((len(images),), timestep, device=noise.device)
        noisy, _ = task.objective.noisy_and_target(images.clean, noise, timesteps)
        scores: dict[str, Tensor] = {}
        handles = [
            router.register_forward_hook(lambda router, args, output, row=row, scores=scores: scores.update({row: output}))
            for row, router in state.routers.items()
        ]
        model(x=noisy, timestep=timesteps, **images.known)
        for handle in handles:
            handle.remove()
        passed = torch.zeros(len(images), sites[0].tokens, dtype=torch.long)
        for row, ratio in enumerate(state.executed_ratios()[:, region].tolist()):
            kept = kept_count(ratio, sites[row].tokens)
            order = rank_tokens(scores[str(row)]).cpu() if kept < sites[row].tokens else torch.arange(kept).expand(len(images), -1)
            passed.scatter_add_(1, order[:, :kept], torch.ones_like(order[:, :kept]))
        maps.append(["".join(DIGITS[count] for count in image) for image in passed.tolist()])
    return maps


def _leave_out(model: Any, example: dict[str, Any], budget: Budget, target: float) -> float:
    """Leave out the last blocks, in place; return the compression ratio.

    For the part of a block that is then still to be saved, tokens bypass the last one that stays, by a router of its own.
    """
    depth = len(model.blocks)
    gone, rest = divmod(depth * budget.uniform(target), 1.0)  # in blocks, which all cost the same
    left = depth - int(gone)
    model.blocks = model.blocks[:left]
    one = replace(budget, costs=budget.costs[:1])
    ratio = min((ratio for ratio in BINS if ratio <= budget.max_ratio), key=lambda ratio: abs(one.uniform(ratio) - rest))
    dcs.convert_(model, example, dcs.DiffCRConfig(blocks=rf"blocks\.{left - 1}", initial_ratio=ratio, learn_ratios=False, bins=BINS))
    return (depth - left + ratio) / depth


def _shorten(model: nn.Module, plan: dcs.SurgeryPlan, example: dict[str, Any], share: float, experiment: Experiment) -> float:
    """Have random tokens bypass the blocks, or merge tokens around them, in place; return the compression ratio.

    As many are left as make the model cost the given share of FLOPs: finding out which to merge has its price, too.
    """
    arm, device, tokens = ARMS[experiment.arm], next(model.parameters()).device, plan.routed_sites[0].tokens

    def attach(kept: int) -> list[RemovableHandle]:
        ratio, way = 1 - kept / tokens, {"random": RandomTokens, "merging": TokenMerging}[arm.kind]
        given: dict[str, Any] = {"seed": experiment.seed} if arm.kind == "random" else dict(arm.settings)
        return hooks.attach(model, plan, way(plan, ratio, device=device, **given))

    def flops(kept: int) -> int:
        handles = attach(kept)
        counted = _flops(model, example)
        for handle in handles:
            handle.remove()
        return counted

    wanted, most = share * _flops(model, example), kept_count(experiment.target, tokens)
    kept = min(range(max(1, most - SEARCHED), most + 1), key=lambda kept: abs(flops(kept) - wanted))
    attach(kept)
    return 1 - kept / tokens


def _flops(model: nn.Module, call: dict[str, Any]) -> int:
    """Count the floating-point operations of a call; a converted model's first one records its graph, which is not to be counted."""
    with torch.inference_mode():
        model(**call)
        return count_flops(lambda: model(**call))


def _costs(model: nn.Module, dense: nn.Module, task: Task, size: Size) -> Record:
    """Count and time a call of the model, next to the dense one's, in turns; means over regions that a sampler visits equally often.

    A latency's share is the median over the rounds, in each of which the two run within seconds of each other.
    """
    regions = model.diffcr.plan.regions.count if hasattr(model, "diffcr") else 1
    batch = task.wanted(size.timed_batch).to(next(model.parameters()).device)
    calls = [call_of(batch, int((region + 0.5) * TIMESTEPS / regions)) for region in range(regions)]
    with torch.inference_mode():
        timed = [functools.partial(dense, **calls[0]), *(functools.partial(model, **call) for call in calls)]
        reference, *others = seconds_in_turns(timed, size.rounds, batch.clean.is_cuda)
    own = [statistics.fmean(turn) for turn in zip(*others, strict=True)]
    flops = statistics.fmean(_flops(model, call) for call in calls) / len(batch)
    return {
        "flops": flops,
        "flops_share": flops * len(batch) / _flops(dense, calls[0]),
        "latency_ms": 1e3 * statistics.median(own),
        "latency_share": statistics.median(a / b for a, b in zip(own, reference, strict=True)),
    }


def call_of(batch: Batch, timestep: int) -> dict[str, Any]:
    """Return the arguments of a call that denoises a batch, all of it at one timestep."""
    return {"x": batch.clean, "timestep": torch.full((len(batch),), timestep, device=batch.clean.device), **batch.known}


def _fingerprint(model: nn.Module) -> str:
    """Return what tells the weights of a model from others."""
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.state_dict().values())).hexdigest()[:12]


def _device(place: Place) -> str:
    if torch.device(place.device).type == "cuda":
        return torch.cuda.get_device_name(place.device)
    return processor_name()
