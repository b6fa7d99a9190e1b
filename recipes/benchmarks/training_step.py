"""Time and memory of a training step: dense, two branches, one run for both (boundary), and ratios frozen.

    python recipes/benchmarks/training_step.py

A DiT-S/2-like model (12 layers, 384 wide, 256 tokens), batch 8, AdamW; every site at ratio 0.25 (frozen: 0.3). The sides take turns in one
run, and medians are reported. On a GPU, give --device cuda. Memory is the peak beyond weights, gradients and optimizer states, with
gradient checkpointing.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch.profiler import ProfilerActivity, profile

import diffcr_surgery as dcs

SIDES: dict[str, tuple[dict[str, Any], float | None]] = {
    "two": ({"branches": "two"}, 0.25),
    "boundary": ({"branches": "boundary"}, 0.25),
    "frozen at 0.3": ({"learn_ratios": False, "initial_ratio": 0.3}, None),
}


class Side:
    """A model in training."""

    def __init__(self, layers: int, batch: int, device: str, side: str | None) -> None:
        torch.manual_seed(0)
        self.model = DiTTransformer2DModel(
            num_layers=layers, num_attention_heads=6, attention_head_dim=64, in_channels=4, sample_size=32, patch_size=2
        )
        self.model.to(device).train()
        self.inputs = {
            "hidden_states": torch.randn(batch, 4, 32, 32, device=device),
            "timestep": torch.full((batch,), 500, device=device),
            "class_labels": torch.zeros(batch, dtype=torch.long, device=device),
        }
        if side is not None:
            settings, ratio = SIDES[side]
            dcs.convert_(self.model, self.inputs, dcs.DiffCRConfig(**settings))
            if ratio is not None:
                with torch.no_grad():
                    dcs.ratio_table(self.model).fill_(ratio)
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=0.0)  # the ratios stay put

    def step(self) -> float:
        """Take a step; return its seconds."""
        start = time.perf_counter()
        self.model(**self.inputs).sample.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.inputs["timestep"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self) -> int:
        """Return the bytes a step takes beyond what is held between steps."""
        self.step()
        if self.inputs["timestep"].is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()
        held = peak = 0
        for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    sides = {name: Side(given.layers, given.batch, given.device, name) for name in SIDES} | {
        "dense": Side(given.layers, given.batch, given.device, None)
    }
    for side in sides.values():
        side.step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, side in sides.items():
            seconds[name].append(side.step())
    print("| | step | against dense, median of rounds | peak memory, checkpointed | against dense |", "|---|---|---|---|---|", sep="\n")
    for side in sides.values():
        side.model.enable_gradient_checkpointing()
    peaks = {name: side.peak() for name, side in sides.items()}
    for name in ("dense", *SIDES):
        ratio = statistics.median(own / dense for own, dense in zip(seconds[name], seconds["dense"], strict=True))
        memory = f"{peaks[name] / 2**20:.0f} MiB | {peaks[name] / peaks['dense']:.3f}×"
        print(f"| {name} | {statistics.median(seconds[name]):.3f} s | {ratio:.3f}× | {memory} |")


if __name__ == "__main__":
    main()
