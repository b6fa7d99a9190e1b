"""Export one timestep region of a specialised model, and package it with AOTInductor: a file that runs without Python.

    python recipes/export_package.py --out package

An exported program is one graph, and a DiffCR model has one for each timestep region, so each region becomes a package of its own; what
calls them picks one by the timestep. A model is exported at the shapes it is called with. AOTInductor needs a C++ compiler.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch._inductor import aoti_compile_and_package, aoti_load_package

import diffcr_surgery as dcs

REGIONS = 2  # over timesteps 0 to 1000: below 500, and from 500 on


def specialised(layers: int, width: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small DiT, as training might leave it: the noisy region compresses more. Put your own model in its place."""
    model = DiTTransformer2DModel(num_layers=layers, num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, sample_size=32)
    inputs = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "timestep": torch.full((2,), 900),
        "class_labels": torch.tensor([3, 7]),
    }
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_regions=REGIONS, timestep_range=(0, 1000)))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(torch.tensor([0.2, 0.6]).expand(layers, REGIONS))
        for router in model.diffcr.routers.values():
            router.weight.normal_()
    return dcs.specialize_(model), inputs


def export(model: torch.nn.Module, inputs: dict[str, torch.Tensor], timestep: int) -> torch.export.ExportedProgram:
    """Export the region that a timestep lies in."""
    inputs = {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}
    model(**inputs)  # records the model at these shapes, on real tensors
    with dcs.at_timestep(model, timestep):  # a number: an exported program can read no tensor to find its region
        return torch.export.export(model, (), inputs)


def seconds(run: Callable[..., object], inputs: dict[str, torch.Tensor]) -> float:
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        run(**inputs)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the packages")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, inputs = specialised(given.layers, given.width)
    for region, timestep in enumerate((250, 750)):
        path = aoti_compile_and_package(export(model, inputs, timestep), package_path=str(given.out / f"region_{region}.pt2"))
        call = {**inputs, "timestep": torch.tensor([timestep, timestep + 100])}  # any timesteps of the region
        expected, package = model(**call).sample, aoti_load_package(path)
        gap = float((package(**call).sample - expected).abs().max() / expected.abs().max())
        if gap > 1e-3:
            raise SystemExit(f"{path} gives something else than the model: {gap:.1e} of its largest value")
        eager, packaged = seconds(model, call), seconds(package, call)
        print(f"region {region}: {path}, eager {1e3 * eager:.1f} ms, packaged {1e3 * packaged:.1f} ms, largest difference {gap:.1e}")


if __name__ == "__main__":
    main()
