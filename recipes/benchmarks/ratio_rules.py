"""Compare ways to learn the ratio table, on the demo's digits: held-out loss at the same target, over several seeds.

    python recipes/benchmarks/ratio_rules.py --seeds 0 1 2 --jobs 2 --out rules

Per seed one dense denoiser is trained, and every arm fine-tunes a copy of it for as long, on the same batches, timesteps and noise, each
batch from one timestep region. The paper's way adds the budget term to the loss and lets Adam, with the weights' learning rate, move the
table too. Writes `rows.json` and prints the table of `RESULTS.md`. Takes about a minute and a half an arm and seed on one CPU core.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

import diffcr_surgery as dcs
from diffcr_surgery.demo.data import load_splits
from diffcr_surgery.demo.diffusion import TIMESTEPS
from diffcr_surgery.demo.measure import held_out_loss
from diffcr_surgery.demo.run import FULL, new_denoiser
from diffcr_surgery.demo.training import Schedule, train

REGIONS, TARGET, MEASURED = FULL.regions, FULL.target_ratio, 20  # timesteps a region at which the held-out loss is measured


class Arm(NamedTuple):
    """A title, the settings of the conversion (`None` stays dense), and what moves the table."""

    title: str
    settings: dict[str, Any] | None
    rule: str = "none"


LEARNED = {"target_ratio": TARGET, "timestep_regions": REGIONS, "timestep_range": (0, TIMESTEPS), "branches": "boundary"}
LAYERS = {"target_ratio": TARGET, "branches": "boundary"}
ARMS = {
    "dense": Arm("dense", None),
    "uniform": Arm("uniform (Mixture-of-Depths)", {"target_ratio": TARGET, "initial_ratio": TARGET, "learn_ratios": False}),
    "layers": Arm("layer-wise, `RatioOptimizer`", LAYERS, "own"),
    "both": Arm("layer × region, `RatioOptimizer`", LEARNED, "own"),
    "layers-two": Arm("layer-wise, `RatioOptimizer`, two branches", LAYERS | {"branches": "two"}, "own"),
    "both-two": Arm("layer × region, `RatioOptimizer`, two branches", LEARNED | {"branches": "two"}, "own"),
    "paper": Arm("layer × region, paper's way, λ = 0.3, two branches", LEARNED | {"branches": "two"}, "paper"),
    "paper-10": Arm("layer × region, paper's way, λ = 10", LEARNED | {"ratio_loss_weight": 10.0}, "paper"),
}


class PapersRule:
    """The budget term in the loss, and Adam for the table."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.adam = torch.optim.Adam([dcs.ratio_table(model)], lr=FULL.finetune_lr)

    def step(self) -> None:
        dcs.ratio_loss(self.model).backward()
        self.adam.step()

    def zero_grad(self) -> None:
        self.adam.zero_grad()


def dense_denoiser(seed: int, out: Path) -> torch.nn.Module:
    """Train the denoiser all arms of a seed start from, or load it if another arm has."""
    path = out / f"dense-{seed}.pt"
    torch.manual_seed(seed)
    model = new_denoiser()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, load_splits(seed)[0], Schedule(FULL.dense_steps, FULL.dense_lr), seed=seed, on_step=lambda _: None)
        torch.save(model.state_dict(), path)
    return model


def run(job: tuple[str, int, Path]) -> dict[str, Any]:
    name, seed, out = job
    torch.set_num_threads(1)
    arm, (training, held_out) = ARMS[name], load_splits(seed)
    model = copy.deepcopy(dense_denoiser(seed, out))
    if arm.settings is not None:
        example = {"x": training.images[:2], "timestep": torch.tensor([0, TIMESTEPS - 1]), "y": training.labels[:2]}
        dcs.convert_(model, example, dcs.DiffCRConfig(**arm.settings))
    rules: dict[str, Any] = {"own": lambda m: dcs.RatioOptimizer(m, total_steps=FULL.finetune_steps), "paper": PapersRule}
    rule = rules[arm.rule](model) if arm.rule in rules else None
    schedule = Schedule(FULL.finetune_steps, FULL.finetune_lr, regions=REGIONS)
    train(model, training, schedule, seed=seed + 1, on_step=lambda _: None, ratio_optimizer=rule)
    row: dict[str, Any] = {"arm": name, "seed": seed, "achieved": 0.0}
    if arm.settings is not None:
        executed = model.diffcr.executed_ratios()
        row |= {"table": dcs.ratio_table(model).tolist(), "executed": executed.tolist(), "achieved": executed.mean().item()}
        dcs.specialize_(model)
    losses = held_out_loss(model, held_out, REGIONS, MEASURED, seed + 2)
    row |= {"losses": losses, "loss": statistics.fmean(losses)}
    print(f"{name} {seed}: loss {row['loss']:.4f} at ratio {row['achieved']:.3f}", flush=True)
    return row


def table(rows: list[dict[str, Any]], seeds: list[int]) -> str:
    lines = [f"| | {' | '.join(f'seed {s}' for s in seeds)} | mean | achieved ratio |", "|---" * (len(seeds) + 3) + "|"]
    for name, arm in ARMS.items():
        own = sorted((r for r in rows if r["arm"] == name), key=lambda r: seeds.index(r["seed"]))
        losses = [r["loss"] for r in own]
        achieved = [r["achieved"] for r in own]
        spread = f"{min(achieved):.3f}" if max(achieved) - min(achieved) < 5e-4 else f"{min(achieved):.3f} to {max(achieved):.3f}"
        cells = [*(f"{loss:.4f}" for loss in losses), f"{statistics.fmean(losses):.4f}", spread]
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dense denoisers and rows.json")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        first = pool.map(run, [("dense", seed, given.out) for seed in given.seeds], chunksize=1)
        rest = pool.map(run, [(name, seed, given.out) for name in ARMS if name != "dense" for seed in given.seeds], chunksize=1)
    (given.out / "rows.json").write_text(json.dumps(first + rest, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(first + rest, given.seeds))


if __name__ == "__main__":
    main()
