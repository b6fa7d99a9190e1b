"""Trains one small denoiser undisturbed, and others that are killed again and again: run by test_crash.py.

    python crash_run.py OUT KILLS SEED

Each life is a process of its own, forked before torch has done anything, and killed by SIGKILL at a moment drawn from SEED. The next one
goes on from the newest checkpoint there is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first step of an optimizer would import it, in every life anew
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs

WIDTH, TOKENS, REGIONS, STEPS, EVERY, BATCH = 16, 12, 4, 40, 3, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        return x + self.mlp(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t[:, None, None] / 1000
        for block in self.blocks:
            x = block(x)
        return x


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)), "t": torch.tensor([100.0, 900.0])}


def uniform(count: int, generator: torch.Generator) -> Tensor:
    return 1000 * torch.rand(count, generator=generator)


class Order:
    """The order of the data, as a loader with a state would keep it."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, samples: int) -> Tensor:
        return torch.randint(samples, (BATCH,), generator=self.generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["state"])


def newest(folder: Path) -> tuple[int, Path | None]:
    """The number of the last step there is a checkpoint of, and the checkpoint."""
    found = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    last = max(found, default=0)
    return last, found.get(last)


def train(out: Path) -> None:
    """Train to the end, from the newest checkpoint on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    adapter = out / "adapter"
    if (adapter / "diffcr.safetensors").exists():  # whatever was being written when the last life ended
        dcs.load_adapter_(Denoiser(), adapter, example())
    accelerator = Accelerator(cpu=True)
    data = torch.randn(64, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))
    config = dcs.DiffCRConfig(target_ratio=0.4, timestep_regions=REGIONS, timestep_range=(0, 1000))
    model = dcs.convert_(Denoiser().train(), example(), config)
    optimizer = torch.optim.AdamW(dcs.parameter_groups(model, lr=1e-2, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    ratios, sampler, order = dcs.RatioOptimizer(model, total_steps=STEPS), dcs.RegionSampler(model, uniform), Order()
    accelerator.register_for_checkpointing(ratios, sampler, order)
    last, checkpoint = newest(out)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
    for step in range(last + 1, STEPS + 1):
        clean, times = data[order(len(data))], sampler(BATCH)
        noise = torch.randn(clean.shape)
        loss = functional.mse_loss(model(torch.lerp(clean, noise, times[:, None, None] / 1000), times), noise)
        accelerator.backward(loss)
        optimizer.step()
        ratios.step()
        schedule.step()
        optimizer.zero_grad()
        ratios.zero_grad()
        if step % EVERY == 0:
            with dcs.atomic_folder(out / f"step-{step}") as folder:
                accelerator.save_state(str(folder))
            dcs.save_adapter(model, adapter)
    dcs.save_adapter(model, adapter)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, out / "final.safetensors")


def born(out: Path) -> int:
    """Start a life and return its number."""
    out.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            train(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def main(out: Path, kills: int, seed: int) -> None:
    """Train once undisturbed, then again and again, until so many lives have been taken and the last training has ended."""
    source = random.Random(seed)
    start = time.monotonic()
    _, undisturbed = os.waitpid(born(out / "undisturbed"), 0)
    whole = time.monotonic() - start
    report: dict[str, Any] = {"undisturbed": undisturbed, "deaths": [], "ends": [], "leftovers": []}
    left, folder = kills, out / "killed-0"
    deaths: list[int] = []
    while True:
        life = born(folder)
        if left:
            time.sleep(source.uniform(0.0, 0.6 * whole))
            os.kill(life, signal.SIGKILL)  # one that has ended has not been waited for yet, and takes this without a sound
        _, status = os.waitpid(life, 0)
        if os.WIFSIGNALED(status):
            deaths.append(newest(folder)[0])
            left -= 1
            continue
        report["deaths"].append(deaths)
        report["ends"].append(status)
        report["leftovers"] += [path.name for path in folder.rglob(".*")]
        if status or not left:
            break
        folder, deaths = out / f"killed-{len(report['ends'])}", []
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
