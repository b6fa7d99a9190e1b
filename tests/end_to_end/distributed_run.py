"""Trains one small denoiser, by one process or by two, and keeps what came out of it: run by test_distributed.py.

    python distributed_run.py OUT single                                           # the whole batch in one process
    python -m torch.distributed.run --nproc_per_node 2 distributed_run.py OUT      # half of it in each of two

Every scenario leaves `<name>.safetensors`: losses, the gradients of the first and the last step, gathered, and the ratio table.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import diffcr_surgery as dcs
from diffcr_surgery.errors import SurgeryError

PROCESSES, BATCH, STEPS, REGIONS = 2, 8, 3, 4  # samples of all processes together
OWN = BATCH // PROCESSES


@dataclass(frozen=True)
class Scenario:
    """One training run.

    Attributes:
        mode: `single`, `ddp` (by accelerate), `ddp-raw`, `fsdp`, or `fsdp-ignored`, which leaves the ratio table unsharded.
        timesteps: `mixed` in every process, `apart` (one region in each process, another one in the other), or of the `sampler`.
        branches: How a ratio between two bins is run.
        micro: Micro-batches a step.
    """

    mode: str
    timesteps: str
    branches: str
    micro: int = 1

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.mode, self.timesteps, self.branches, self.micro)))

    @property
    def reference(self) -> Scenario:
        """What one process makes of the same batches."""
        return Scenario("single", self.timesteps, self.branches)


SCENARIOS = (
    Scenario("ddp", "mixed", "two"),
    Scenario("ddp", "apart", "boundary"),
    Scenario("ddp", "mixed", "two", micro=2),
    Scenario("ddp-raw", "mixed", "boundary"),
    Scenario("ddp-raw", "apart", "two"),
    Scenario("ddp-raw", "mixed", "boundary", micro=2),
    Scenario("fsdp", "apart", "two"),
    Scenario("fsdp", "apart", "boundary"),
    Scenario("fsdp", "sampler", "two", micro=2),
    Scenario("fsdp-ignored", "apart", "boundary"),
)


def build() -> nn.Module:
    """The model before conversion; what starts at zero gets noise, so that every parameter has a gradient.

    Attention has no biases: that of the keys has a gradient of zero, of which a computer makes rounding errors and AdamW whole steps.
    """
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, norm_num_groups=1,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12, attention_bias=False,
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(timesteps: Tensor, seed: int, side: int = 8) -> dict[str, Any]:
    source = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(len(timesteps), 4, side, side, generator=source),
        "encoder_hidden_states": torch.randn(len(timesteps), 5, 12, generator=source),
        "timestep": timesteps,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def rows(given: dict[str, Any], wanted: slice) -> dict[str, Any]:
    return {name: value[wanted] if isinstance(value, Tensor) else value for name, value in given.items()}


def convert(branches: str) -> nn.Module:
    config = dcs.DiffCRConfig(
        target_ratio=0.5, timestep_regions=REGIONS, timestep_range=(0, 1000), initial_ratio=0.25, branches=branches
    )  # fmt: skip
    model = dcs.convert_(build(), inputs(torch.tensor([10, 300, 600, 900]), seed=1), config)
    for row, router in enumerate(model.diffcr.routers.values()):  # scores that lie apart, so that rounding changes no ranking
        nn.init.normal_(router.weight, std=2.0, generator=torch.Generator().manual_seed(row))
    return model.train()


def uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1000, (count,), generator=generator)


def timesteps(model: nn.Module, kind: str) -> Iterator[Tensor]:
    """The timesteps of each step, for all processes together."""
    samplers = [dcs.RegionSampler(model, uniform, seed=7, rank=rank) for rank in range(PROCESSES)]
    for step in range(STEPS):
        source = torch.Generator().manual_seed(100 + step)
        if kind == "sampler":
            yield torch.cat([sampler(OWN) for sampler in samplers])
        elif kind == "mixed":
            yield uniform(BATCH, source)
        else:  # a region for each process
            low = torch.tensor([250 * ((step + 2 * rank) % REGIONS) for rank in range(PROCESSES)]).repeat_interleave(OWN)
            yield low + torch.randint(250, (BATCH,), generator=source)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor as every process has it alike."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor.clone()


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    if not distributed.is_initialized():
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / PROCESSES


@dataclass
class Run:
    """A model made ready for a mode, and how a training loop then does what differs between the modes."""

    model: nn.Module  # to be called
    optimizers: list[Any]
    backward: Callable[[Tensor, bool], None]  # loss of a micro-batch, and whether it is the last of its step
    context: Callable[[bool], Any] = lambda last: nullcontext()


def ready(scenario: Scenario, model: nn.Module) -> Run:
    """Wrap or shard a converted model."""

    def optimizers(wrapped: nn.Module) -> list[torch.optim.Optimizer]:
        groups = dcs.parameter_groups(wrapped, lr=1e-3, router_lr=1e-2, weight_decay=0.01)
        return [torch.optim.AdamW(groups), dcs.RatioOptimizer(wrapped, total_steps=STEPS, lr=0.03, ramp=1.0, settle=0.0)]

    def plainly(loss: Tensor, last: bool) -> None:
        (loss / scenario.micro).backward()

    if scenario.mode == "single":
        return Run(model, optimizers(model), plainly)
    if scenario.mode == "ddp":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=scenario.micro)
        wrapped, *ours = accelerator.prepare(model, *optimizers(model))
        # It counts micro-batches itself, and its optimizers step on the last alone.
        return Run(wrapped, ours, lambda loss, last: accelerator.backward(loss), lambda last: accelerator.accumulate(wrapped))
    if scenario.mode == "ddp-raw":
        wrapped = DistributedDataParallel(model)
        return Run(wrapped, optimizers(wrapped), plainly, lambda last: nullcontext() if last else wrapped.no_sync())
    shard(model, {model.diffcr.ratio_table} if scenario.mode == "fsdp-ignored" else None)

    def synced(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return Run(model, optimizers(model), plainly, synced)


def shard(model: nn.Module, ignored: set[nn.Parameter] | None = None) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def train(scenario: Scenario, model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Train a converted model in one scenario and return what is to be compared."""
    torch.manual_seed(0)
    steps = list(timesteps(model, scenario.timesteps))
    run, kept = ready(scenario, model), {}
    single = scenario.mode == "single"
    mine = slice(None) if single else slice(rank * OWN, (rank + 1) * OWN)
    for step, times in enumerate(steps):
        given, noise = inputs(times, seed=10 + step), torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(50 + step))
        given, noise = rows(given, mine), noise[mine]
        size = len(noise) // scenario.micro
        losses = []
        for part in range(scenario.micro):
            last = part == scenario.micro - 1
            these = slice(part * size, (part + 1) * size)
            with run.context(last):
                loss = functional.mse_loss(run.model(**rows(given, these)).sample, noise[these])
                run.backward(loss, last)
                losses.append(loss.detach())
                if last and step in (0, STEPS - 1):
                    for name, parameter in model.named_parameters():
                        gradient = gathered(parameter.grad)
                        own = scenario.mode == "fsdp-ignored" and name.endswith("ratio_table")  # RatioOptimizer averages that one
                        kept[f"gradient.{step}.{name}"] = mean(gradient) if own else gradient
                if last or scenario.mode == "ddp":
                    for optimizer in run.optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
        kept[f"loss.{step}"] = mean(torch.stack(losses).mean()) if not single else torch.stack(losses).mean()
    kept["table"] = gathered(dcs.ratio_table(run.model).detach())
    kept["budget"] = dcs.ratio_loss(run.model).detach()
    # Shapes that neither plan nor training has seen: with sharded blocks, what the plan has proven has to do.
    model.eval()
    with torch.no_grad():
        kept["output"] = model(**inputs(torch.tensor([700, 720, 740]), seed=99, side=12)).sample
    kept["weights"] = torch.cat([gathered(p.detach()).flatten() for p in model.parameters()])
    return kept


def refusals(model: nn.Module) -> dict[str, str]:
    """What a sharded model refuses, by name."""
    shard(model)
    plain = build()
    shard(plain)
    example = inputs(torch.tensor([10, 300, 600, 900]), seed=1)
    tries = {
        "mixed": lambda: model(**example),
        "restore": lambda: dcs.restore_(model),
        "specialize": lambda: dcs.specialize_(model),
        "convert": lambda: dcs.convert_(plain, example),
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = "nothing"
        except SurgeryError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def inner_sharded() -> bool:
    """Tell whether a block of which the root calls a part, as DiT does, computes the same with that part sharded by itself."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=1, num_embeds_ada_norm=10
    )  # fmt: skip
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 520]), "class_labels": torch.tensor([1, 2])}
    config = dcs.DiffCRConfig(target_ratio=0.5, timestep_regions=REGIONS, timestep_range=(0, 1000), initial_ratio=0.25)
    model = dcs.convert_(model.eval(), given, config)
    expected = model(**given).sample
    fully_shard(model.transformer_blocks[0].norm1.emb, mesh=init_device_mesh("cpu", (PROCESSES,)))
    shard(model)
    return torch.allclose(model(**given).sample, expected, atol=1e-6)


def average(model: nn.Module) -> bool:
    """Tell whether diffusers' moving average goes with sharded weights, routers and ratio table."""
    from diffusers.training_utils import EMAModel

    shard(model)
    ema = EMAModel(model.parameters(), decay=0.5)
    before = [gathered(p.detach()) for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ema.step(model.parameters())
    ema.step(model.parameters())
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    shadow = [gathered(p.detach()) for p in model.parameters()]
    ema.restore(model.parameters())
    after = [gathered(p.detach()) for p in model.parameters()]
    moved = all(bool(((s - b) > 0).all() and ((s - a) < 1e-6).all()) for b, s, a in zip(before, shadow, after, strict=True))
    back = all(torch.allclose(a, b + 0.1) for a, b in zip(after, before, strict=True))
    return moved and back


def costs_agree(model: nn.Module, rank: int) -> bool:
    """Tell whether processes that measured other costs, as latencies are, have the same after the first step, and the same table."""
    shard(model)
    with torch.no_grad():
        model.diffcr.site_costs.mul_(torch.linspace(1.0, 0.5 + 0.5 * rank, model.diffcr.site_costs.shape[1]))
    optimizer = dcs.RatioOptimizer(model, total_steps=1)
    model(**inputs(torch.tensor([10, 20, 30, 40]), seed=1)).sample.square().mean().backward()
    optimizer.step()
    mine = torch.cat([model.diffcr.site_costs.flatten(), gathered(dcs.ratio_table(model).detach()).flatten()])
    both = [torch.empty_like(mine) for _ in range(PROCESSES)]
    distributed.all_gather(both, mine)
    met = abs(float(model.diffcr.saving()) - model.diffcr.target_saving) < 1e-4
    return met and all(torch.equal(each, mine) for each in both)


def full_disk(model: nn.Module, out: Path, rank: int) -> list[dict[str, str]]:
    """What each process is told if the first cannot write."""
    shard(model)
    (out / "file").touch()

    def checkpoint() -> None:
        with dcs.atomic_folder(out / "unwritten") as folder:
            if rank == 0:
                (folder.parent / "unwritten").mkdir()  # by someone else, meanwhile
                (folder.parent / "unwritten" / "other").touch()

    told = {}
    for name, attempt in (("adapter", lambda: dcs.save_adapter(model, out / "file" / "adapter")), ("checkpoint", checkpoint)):
        try:
            attempt()
            told[name] = "nothing"
        except (SurgeryError, OSError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    both: list[Any] = [None] * PROCESSES
    distributed.all_gather_object(both, told)
    return both


def main(out: Path, single: bool) -> None:
    torch.set_num_threads(1)
    rank = 0 if single else int(os.environ["RANK"])
    if not single:
        distributed.init_process_group("gloo")
    base = {branches: convert(branches) for branches in ("two", "boundary")}
    scenarios = dict.fromkeys(s.reference for s in SCENARIOS) if single else SCENARIOS
    for scenario in scenarios:
        model = copy.deepcopy(base[scenario.branches])
        kept = train(scenario, model, rank)
        if scenario in (Scenario("fsdp", "apart", "two"), Scenario("single", "apart", "two")):
            dcs.save_adapter(model, out / f"adapter-{scenario.mode}")
        if rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in kept.items()}, out / f"{scenario.name}.safetensors")
    if not single:
        sampler = dcs.RegionSampler(base["two"], uniform, seed=3, rank=rank)
        drawn = torch.stack([sampler(OWN) for _ in range(6)])
        both = [torch.empty_like(drawn) for _ in range(PROCESSES)]
        distributed.all_gather(both, drawn)
        with dcs.atomic_folder(out / "checkpoint") as folder:
            (folder / f"of-{rank}").write_text("all of it")
        inner, full = inner_sharded(), full_disk(copy.deepcopy(base["two"]), out, rank)
        averaged = average(copy.deepcopy(base["two"]))
        agree = costs_agree(copy.deepcopy(base["two"]), rank)
        said = refusals(copy.deepcopy(base["two"]))
        if rank == 0:
            report = {"drawn": [each.tolist() for each in both], "average": averaged, "costs_agree": agree}
            report |= {"inner": inner, "full": full, "refusals": said}
            (out / "report.json").write_text(json.dumps(report))
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # all is written; gloo's threads have been seen to abort an interpreter that shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]), single="single" in sys.argv[2:])
