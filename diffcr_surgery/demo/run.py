"""The demo as a story: train, convert, fine-tune three ways, specialise, measure, draw."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import diffcr_surgery as dcs
from diffcr_surgery.demo.data import CLASSES, IMAGE_SIZE, load_splits
from diffcr_surgery.demo.diffusion import TIMESTEPS, sample
from diffcr_surgery.demo.measure import DigitReader, Step, flops_per_step, held_out_loss, latencies_ms
from diffcr_surgery.demo.model import DiT
from diffcr_surgery.demo.pictures import draw_ratios, draw_routing, draw_samples
from diffcr_surgery.demo.progress import Stages
from diffcr_surgery.demo.report import DENSE, ROUTED, UNIFORM, Outcome, build_report, results_table, verdict
from diffcr_surgery.demo.training import Schedule, train

__all__ = ["FULL", "QUICK", "Demo", "Settings", "new_denoiser", "run_demo"]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        dense_steps: length of the dense training.
        finetune_steps: length of each of the three fine-tunes.
        dense_lr: learning rate of the dense training.
        finetune_lr: learning rate of the fine-tunes.
        target_ratio: share of tokens that are to bypass, on average.
        regions: timestep regions.
        loss_timesteps: timesteps per region at which the held-out loss is measured.
        latency_rounds: how often each model is timed in each region.
        latency_batch: images per timed step; enough for matrix products to dominate.
        sample_steps: denoising steps per sample.
        sample_rows: samples per class.
        guidance: strength of classifier-free guidance.
    """

    dense_steps: int = 1800
    finetune_steps: int = 1000
    dense_lr: float = 3e-3
    finetune_lr: float = 1e-3
    target_ratio: float = 0.3
    regions: int = 4
    loss_timesteps: int = 5
    latency_rounds: int = 12
    latency_batch: int = 256
    sample_steps: int = 20
    sample_rows: int = 20
    guidance: float = 1.5


FULL = Settings()
QUICK = Settings(
    dense_steps=120,
    finetune_steps=60,
    loss_timesteps=2,
    latency_rounds=7,
    latency_batch=64,
    sample_steps=8,
    sample_rows=4,
)
DRAWN_ROWS = 6  # of the samples; the rest only count for the share that can be read


class Candidate(NamedTuple):
    """A fine-tuned denoiser, ready for inference, with its ratios as learned and as executed, both `l r`."""

    model: DiT
    learned: Tensor
    executed: Tensor


def new_denoiser() -> DiT:
    """Return an untrained denoiser: 64 one-pixel tokens, 6 layers, 64 channels."""
    return DiT(image_size=IMAGE_SIZE, patch_size=1, in_channels=1, width=64, depth=6, heads=2, classes=CLASSES)


def ratios_of(model: Any) -> tuple[Tensor, Tensor]:
    """Return the ratios of a converted model as learned and as inference executes them, both `l r`."""
    return dcs.ratio_table(model).detach().clone(), model.diffcr.executed_ratios()


class Demo:
    """One run of the demo."""

    def __init__(self, out: Path, settings: Settings, seed: int, console: Console) -> None:
        """Load the data.

        Args:
            out: the folder to write to.
            settings: sizes.
            seed: of everything that is random.
            console: where to show progress.
        """
        self.out = out
        self.settings = settings
        self.seed = seed
        self.console = console
        self.stages = Stages(console)
        self.training, self.held_out = load_splits(seed)

    def train_dense(self) -> DiT:
        """Train the dense denoiser that all three fine-tunes start from."""
        torch.manual_seed(self.seed)
        model = new_denoiser()
        schedule = Schedule(self.settings.dense_steps, self.settings.dense_lr)
        with self.stages.stage("dense training", schedule.steps) as advance:
            train(model, self.training, schedule, seed=self.seed, on_step=advance)
        return model

    def finetune(self, name: str, model: DiT, ratio_optimizer: dcs.RatioOptimizer | None = None) -> None:
        """Fine-tune in place; every call sees the same batches, timesteps and noise."""
        schedule = Schedule(self.settings.finetune_steps, self.settings.finetune_lr, regions=self.settings.regions)
        with self.stages.stage(f"fine-tuning {name}", schedule.steps) as advance:
            train(model, self.training, schedule, seed=self.seed + 1, on_step=advance, ratio_optimizer=ratio_optimizer)

    def dense(self, base: DiT) -> Candidate:
        """Train the dense denoiser on for as long as the others are fine-tuned: the fair yardstick."""
        model = copy.deepcopy(base)
        self.finetune(DENSE, model)
        save_file(model.state_dict(), self.out / "dense.safetensors")
        nothing = torch.zeros(len(model.blocks), 1)
        return Candidate(model, nothing, nothing)

    def uniform(self, base: DiT) -> Candidate:
        """Fine-tune with one fixed ratio everywhere: Mixture-of-Depths, at DiffCR's budget."""
        ratio = self.settings.target_ratio
        config = dcs.DiffCRConfig(target_ratio=ratio, initial_ratio=ratio, learn_ratios=False)
        model = self.convert(base, config)
        self.finetune(UNIFORM, model)
        self.save(model, "uniform", "uniform.safetensors")
        return self.specialized(model)

    def routed(self, base: DiT) -> Candidate:
        """Fine-tune with learned ratios per layer and timestep region: DiffCR. Keep and draw what it learned."""
        regions = self.settings.regions
        config = dcs.DiffCRConfig(
            target_ratio=self.settings.target_ratio, timestep_regions=regions, timestep_range=(0, TIMESTEPS), branches="boundary"
        )
        model = self.convert(base, config)
        self.finetune(ROUTED, model, dcs.RatioOptimizer(model, total_steps=self.settings.finetune_steps))
        self.save(model, "adapter", "denoiser.safetensors")
        learned, executed = ratios_of(model)
        draw_ratios(self.out / "ratios.png", learned, executed)
        image, label = self.held_out.images[:1], self.held_out.labels[:1]
        draw_routing(self.out / "routing.png", model, image, label, regions, self.seed)
        return self.specialized(model)

    def save(self, model: DiT, adapter: str, weights: str) -> None:
        """Keep an adapter, which is routers and ratios alone, and the weights it belongs to, which were fine-tuned in full."""
        dcs.save_adapter(model, self.out / adapter)
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("diffcr.")}, self.out / weights)

    def convert(self, base: DiT, config: dcs.DiffCRConfig) -> DiT:
        """Return a converted copy of the dense denoiser."""
        model = copy.deepcopy(base)
        example = {
            "x": self.training.images[:2],
            "timestep": torch.tensor([0, TIMESTEPS - 1]),
            "y": self.training.labels[:2],
        }
        plan = dcs.plan(model, example, config)
        if config.learn_ratios:  # the uniform twin's plan is the same but for the ratios
            self.console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
        dcs.convert_(model, plan)
        return model

    def specialized(self, model: DiT) -> Candidate:
        """Specialise a converted model for inference."""
        learned, executed = ratios_of(model)
        dcs.specialize_(model)
        return Candidate(model, learned, executed)

    def measure(self, candidates: dict[str, Candidate]) -> dict[str, Outcome]:
        """Measure the denoisers, each on the same inputs."""
        s = self.settings
        steps = [Step.of_region(region, s.regions, s.latency_batch) for region in range(s.regions)]
        models = {name: candidate.model for name, candidate in candidates.items()}
        flops = {name: flops_per_step(model, steps) for name, model in models.items()}
        with self.stages.stage("measuring latency", s.latency_rounds) as advance:
            latencies = latencies_ms(models, steps, s.latency_rounds, advance)
        with self.stages.stage("measuring held-out loss", len(models) * s.regions * s.loss_timesteps) as advance:
            losses = {
                name: held_out_loss(model, self.held_out, s.regions, s.loss_timesteps, self.seed + 2, advance)
                for name, model in models.items()
            }
        reader, labels = DigitReader(self.training), torch.arange(CLASSES).repeat(s.sample_rows)
        with self.stages.stage("sampling", len(models) * s.sample_steps) as advance:
            samples = {
                name: sample(model, labels, steps=s.sample_steps, guidance=s.guidance, seed=self.seed + 3, on_step=advance)
                for name, model in models.items()
            }
        return {
            name: Outcome(
                learned=candidate.learned,
                executed=candidate.executed,
                losses=losses[name],
                flops=flops[name],
                latency_ms=latencies[name],
                samples=samples[name],
                legible=reader.share_read(samples[name], labels),
            )
            for name, candidate in candidates.items()
        }


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run the demo on the CPU.

    Args:
        out: the folder to write to; it is made if need be.
        quick: a run of under a minute that shows the line works; its digits are not legible.
        seed: of everything that is random.

    Returns:
        What was written to `report.json`.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    settings = QUICK if quick else FULL
    demo = Demo(out, settings, seed, console)
    with demo.stages.progress:
        base = demo.train_dense()
        outcomes = demo.measure({DENSE: demo.dense(base), UNIFORM: demo.uniform(base), ROUTED: demo.routed(base)})
    titles = {
        f"{name}: {outcome.latency_ms:.1f} ms a step, loss {outcome.loss:.4f}": outcome.samples
        for name, outcome in ((name, outcomes[name]) for name in (DENSE, ROUTED, UNIFORM))
    }
    draw_samples(out / "samples.png", titles, min(DRAWN_ROWS, settings.sample_rows))
    report = build_report(outcomes, settings.target_ratio) | {
        "quick": quick,
        "seed": seed,
        "latency_batch": settings.latency_batch,
        "seconds": round(time.perf_counter() - started, 2),
        "seconds_per_stage": demo.stages.seconds,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(results_table(outcomes, settings.target_ratio, settings.latency_batch))
    console.print(verdict(outcomes))
    console.print(f"{report['seconds']:.0f} s on {report['device']}, {report['threads']} threads. Written to {out}:")
    console.print(", ".join(sorted(path.name for path in out.iterdir())))
    return report
