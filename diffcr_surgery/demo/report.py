"""The outcome of the demo: `report.json`, the table, and the verdict in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

__all__ = ["DENSE", "ROUTED", "UNIFORM", "Outcome", "build_report", "results_table", "verdict"]

DENSE, UNIFORM, ROUTED = "dense", "uniform", "DiffCR"


@dataclass(frozen=True)
class Outcome:
    """What was measured of one denoiser.

    Attributes:
        learned: ratio table as trained, `l r`; zeros for the dense one.
        executed: the bins that inference runs, `l r`; zeros for the dense one.
        losses: held-out loss per timestep region, clean to noisy.
        flops: per step, averaged over the regions.
        latency_ms: per step, averaged over the regions.
        samples: images in [-1, 1], `(row class) 1 h w`.
        legible: share of the samples that a classifier reads as the class asked for.
    """

    learned: Tensor
    executed: Tensor
    losses: list[float]
    flops: float
    latency_ms: float
    samples: Tensor
    legible: float

    @property
    def loss(self) -> float:
        """Held-out loss, averaged over the regions."""
        return sum(self.losses) / len(self.losses)

    @property
    def achieved_ratio(self) -> float:
        """Mean compression ratio that inference runs."""
        return self.executed.double().mean().item()


def build_report(outcomes: Mapping[str, Outcome], target_ratio: float) -> dict[str, Any]:
    """Return the figures of the run as what goes into `report.json`."""
    dense, uniform, routed = outcomes[DENSE], outcomes[UNIFORM], outcomes[ROUTED]
    return {
        "target_ratio": target_ratio,
        "achieved_ratio": routed.achieved_ratio,
        "achieved_ratio_uniform": uniform.achieved_ratio,
        "flops_dense": dense.flops,
        "flops_uniform": uniform.flops,
        "flops_routed": routed.flops,
        "ideal_speedup": dense.flops / routed.flops,
        "ideal_speedup_uniform": dense.flops / uniform.flops,
        "latency_dense_ms": dense.latency_ms,
        "latency_uniform_ms": uniform.latency_ms,
        "latency_routed_ms": routed.latency_ms,
        "speedup": dense.latency_ms / routed.latency_ms,
        "speedup_uniform": dense.latency_ms / uniform.latency_ms,
        "loss_dense": dense.loss,
        "loss_uniform": uniform.loss,
        "loss_routed": routed.loss,
        "region_losses_dense": dense.losses,
        "region_losses_uniform": uniform.losses,
        "region_losses_routed": routed.losses,
        "legible_dense": dense.legible,
        "legible_uniform": uniform.legible,
        "legible_routed": routed.legible,
        "ratio_table": routed.learned.tolist(),
        "executed_ratios": routed.executed.tolist(),
        "device": processor_name(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """Return the name of the processor, as far as the system tells it."""
    listing = Path("/proc/cpuinfo")  # `platform` leaves the name empty on most Linux systems
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def results_table(outcomes: Mapping[str, Outcome], target_ratio: float, batch: int) -> Table:
    """Return the table that closes the run; it fits a terminal of 80 columns."""
    table = Table(
        title=f"Target ratio {target_ratio:g}; each fine-tuned from one dense model for as many steps",
        caption="loss: of denoising held-out digits, the same noise for all\n"
        f"MFLOP, ms: of one call on {batch} images, averaged over the timestep regions\n"
        "ideal: the speed-up if time went with FLOPs\n"
        "legible: share of samples that a classifier of real digits reads rightly",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("achieved", "loss", "MFLOP", "ms", "speed-up", "ideal", "legible"):
        table.add_column(heading, justify="right")
    dense = outcomes[DENSE]
    for name, outcome in outcomes.items():
        table.add_row(
            name,
            f"{outcome.achieved_ratio:.3f}",
            f"{outcome.loss:.4f}",
            f"{outcome.flops / 1e6:.0f}",
            f"{outcome.latency_ms:.1f}",
            f"{dense.latency_ms / outcome.latency_ms:.2f}x",
            f"{dense.flops / outcome.flops:.2f}x",
            f"{outcome.legible:.0%}",
        )
    return table


def verdict(outcomes: Mapping[str, Outcome]) -> str:
    """Return in words what the three held-out losses say, whatever that is."""
    dense, uniform, routed = (outcomes[name].loss for name in (DENSE, UNIFORM, ROUTED))
    above = f"Held-out loss against dense: uniform {uniform - dense:+.4f}, DiffCR {routed - dense:+.4f}."
    if routed >= uniform:
        return f"{above} In this run, learning the ratios did not help: DiffCR is no better than the uniform twin."
    if uniform <= dense:
        return f"{above} DiffCR is the better of the two, but uniform routing cost nothing here."
    share = (uniform - routed) / (uniform - dense)
    return f"{above} Learning the ratios won back {share:.0%} of what uniform routing costs."
