"""Your own model in your own training loop, and the five lines that make it a DiffCR model.

    python recipes/convert_your_model.py --out out
    python recipes/convert_your_model.py --smoke --out out    # a minute or two on one core: shows the way, proves nothing

A DiT written on timm's layers learns scikit-learn's digits in a plain loop of PyTorch. It is then trained on twice from there, on the same
images: as it is, and with DiffCR. What you would add to your own code are the five lines marked `# DiffCR`, and an import. The one that
takes the place of another stands below it; put that back, take out the rest, and what is left is a dense script.

OUT holds `adapter` (routers and ratios), `model.safetensors` (the weights they were trained with) and `results.json`.
"""

import argparse
import copy
import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

import diffcr_surgery as dcs
from diffcr_surgery.flops import count_flops

TIMESTEPS, BATCH, LR = 1000, 32, 1e-3
HELD_OUT = 297  # of the 1,797 digits


class Block(nn.Module):
    """Attention and MLP, both modulated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, num_heads=heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, hidden_features=4 * width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A class-conditional diffusion transformer over single pixels: images `b 1 8 8`, 64 tokens."""

    def __init__(self, width: int = 64, depth: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.patches = PatchEmbed(8, 1, 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.register_buffer("rates", torch.exp(-math.log(10_000) * torch.arange(32) / 32), persistent=False)
        self.times = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 1)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        angles = timestep[:, None] * self.rates
        condition = self.times(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.classes(label)
        x = self.patches(x) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return rearrange(self.pixels(self.norm(x)), "b (h w) c -> b c h w", h=8)


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits in an order of chance, `b 1 8 8` in [-1, 1], and their classes `b`."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(data.target)[order]


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(TIMESTEPS, (count,), generator=generator)


def timesteps_by_chance(seed: int) -> Callable[[int], Tensor]:
    return functools.partial(draw_timesteps, generator=torch.Generator().manual_seed(seed))


def add_noise(images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    angle = (math.pi / 2 * (timesteps + 0.5) / TIMESTEPS)[:, None, None, None]  # the cosine schedule
    return angle.cos() * images + angle.sin() * noise


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    optimizers: Sequence[torch.optim.Optimizer],
    draw: Callable[[int], Tensor],
) -> None:
    """The training loop: nothing in it knows of DiffCR."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 1, 8, 8, generator=generator)
        timesteps = draw(BATCH)
        loss = F.mse_loss(model(add_noise(images[rows], noise, timesteps), timesteps, labels[rows]), noise)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 250 == 0:
            print(f"  step {step}: loss {loss:.4f}", flush=True)
    model.eval()


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the mean loss over twenty timesteps, with the same noise for every model."""
    generator, losses = torch.Generator().manual_seed(1), []
    for timestep in range(TIMESTEPS // 40, TIMESTEPS, TIMESTEPS // 20):
        noise, timesteps = torch.randn(images.shape, generator=generator), torch.full((len(images),), timestep)
        losses.append(F.mse_loss(model(add_noise(images, noise, timesteps), timesteps, labels), noise).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def flops_per_call(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the floating-point operations of a call, averaged over four timesteps, one of each quarter."""
    calls = [(images, torch.full((len(images),), timestep), labels) for timestep in range(TIMESTEPS // 8, TIMESTEPS, TIMESTEPS // 4)]
    return statistics.fmean(count_flops(lambda call=call: model(*call)) for call in calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument("--steps", type=int, default=1500, help="of each of the three trainings (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="120 steps")
    given = parser.parse_args()
    steps, out = 120 if given.smoke else given.steps, given.out
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    x, y = digits()
    data, test = (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])

    print("Training the model")
    model = DiT()
    train(model, *data, steps, [AdamW(model.parameters(), lr=LR)], timesteps_by_chance(seed=0))

    print("Training it on, as it is")
    dense = copy.deepcopy(model)
    train(dense, *data, steps, [AdamW(dense.parameters(), lr=LR)], timesteps_by_chance(seed=1))

    print("Training it on, with DiffCR")
    draw = timesteps_by_chance(seed=1)
    dcs.convert_(model, (x[:4], draw(4), y[:4]), dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=4, branches="boundary"))  # DiffCR 1/5
    draw = dcs.RegionSampler(model, draw_timesteps, seed=1)  # DiffCR 2/5
    # before: optimizers = [AdamW(model.parameters(), lr=LR)]
    optimizers = [AdamW(dcs.parameter_groups(model, lr=LR)), dcs.RatioOptimizer(model, total_steps=steps)]  # DiffCR 3/5
    train(model, *data, steps, optimizers, draw)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("diffcr.")}
    save_file(weights, out / "model.safetensors")
    dcs.save_adapter(model, out / "adapter")  # DiffCR 4/5
    print(f"Left of the model: {dcs.specialize_(model).diffcr.achieved}")  # DiffCR 5/5

    results = {}
    for name, denoiser in (("dense", dense), ("routed", model)):
        results[name] = {"held_out_loss": held_out_loss(denoiser, *test), "flops_per_call": flops_per_call(denoiser, *test)}
        print(f"{name}: held-out loss {results[name]['held_out_loss']:.4f}, {results[name]['flops_per_call'] / 1e9:.2f} GFLOPs a call")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
