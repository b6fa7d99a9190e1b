"""Print the figures of the README's section "Measured", as Markdown, from this machine and a finished demo.

    python -m diffcr_surgery demo --out demo-out
    python recipes/figures.py demo-out

Without a folder it leaves the demo's table out.

Run it on an idle machine. What is compared is timed in turns, and medians are reported.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

import diffcr_surgery as dcs

ROUNDS = 7


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(*calls: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each call, the calls taking turns."""
    for call in calls:
        call()
    seconds = [[timed(call) for call in calls] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def denoiser(layers: int) -> DiTTransformer2DModel:
    """A DiT of width 384 on 256 tokens, as in DiT-S/2 at 256 x 256 pixels."""
    return DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=6, attention_head_dim=64, in_channels=4, sample_size=32, patch_size=2
    ).eval()


def inputs(batch: int) -> dict[str, torch.Tensor]:
    labels, timestep = torch.zeros(batch, dtype=torch.long), torch.full((batch,), 500)
    return {"hidden_states": torch.randn(batch, 4, 32, 32), "timestep": timestep, "class_labels": labels}


@torch.no_grad()
def conversion_time(batch: int) -> float:
    """Time of planning and converting a 12-layer model, in forwards of the dense one."""
    model, example = denoiser(12), inputs(batch)
    config = dcs.DiffCRConfig(target_ratio=0.2, timestep_regions=4)
    forward, both = in_turns(lambda: model(**example), lambda: dcs.restore_(dcs.convert_(model, example, config)))
    return both / forward


@torch.no_grad()
def call_overhead(batch: int) -> float:
    """Time of a converted model at ratio 0, in forwards of the dense one."""
    model, twin, example = denoiser(12), denoiser(12), inputs(batch)
    dcs.convert_(twin, example, dcs.DiffCRConfig(timestep_regions=4))
    dense, converted = in_turns(lambda: model(**example), lambda: twin(**example), rounds=3 * ROUNDS)
    return converted / dense


@torch.no_grad()
def planning_xl() -> str:
    """Time and memory of planning a DiT-XL/2 on 256 tokens, and what the converted model costs with every ratio at 0."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731 - bytes, on Linux
    model = DiTTransformer2DModel(
        num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, sample_size=32, patch_size=2
    ).eval()
    example = inputs(1)
    before = peak()
    dense = statistics.median(timed(lambda: model(**example)) for _ in range(3))
    forward = peak() - before
    plan = dcs.plan(model, example)
    block = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
    extra = peak() - before - forward
    seconds = statistics.median(timed(lambda: dcs.plan(model, example)) for _ in range(3))
    dcs.convert_(model, plan)
    original = DiTTransformer2DModel.forward
    own, converted = in_turns(lambda: original(model, **example), lambda: model(**example))
    # The forward's own time varies by more than what a call adds to it, so that is timed where the forward is all but nothing.
    small = DiTTransformer2DModel(
        num_layers=28, num_attention_heads=1, attention_head_dim=8, in_channels=4, sample_size=4, norm_num_groups=1
    ).eval()
    few = {"hidden_states": torch.randn(1, 4, 4, 4), "timestep": example["timestep"], "class_labels": example["class_labels"]}
    dcs.convert_(small, few)
    bare, added = in_turns(lambda: original(small, **few), lambda: small(**few), rounds=20 * ROUNDS)
    return (
        f"- DiT-XL/2 (28 layers, 1152 wide, 256 tokens, batch 1): planning takes {seconds / dense:.1f} dense forwards, and at its "
        f"peak {extra / 2**20:.0f} MiB beyond a forward (a forward takes {forward / 2**20:.0f} MiB beyond the weights, a block has "
        f"{block / 2**20:.0f} MiB). Converted, every ratio at 0: {converted / own - 1:+.2%} against its own "
        f"forward, within the noise; what a call adds, {1e3 * (added - bare):.2f} ms, is {(added - bare) / own:.3%} of it."
    )


def import_seconds() -> float:
    """Median time of importing the package in a fresh interpreter, torch already there."""
    code = "import time, torch; t = time.perf_counter(); import diffcr_surgery; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(ROUNDS)]
    return statistics.median(float(run.stdout) for run in runs)


def demo_table(report: dict[str, float]) -> str:
    rows = ["| | achieved ratio | held-out loss | FLOPs | latency | speed-up | ideal |", "|---|---|---|---|---|---|---|"]
    for title, name in (("dense", "dense"), ("uniform", "uniform"), ("DiffCR, 6 layers × 4 regions", "routed")):
        achieved = {"dense": 0.0, "uniform": report["achieved_ratio_uniform"], "routed": report["achieved_ratio"]}[name]
        speed_up = report["latency_dense_ms"] / report[f"latency_{name}_ms"]
        ideal = report["flops_dense"] / report[f"flops_{name}"]
        rows.append(
            f"| {title} | {achieved:.3f} | {report[f'loss_{name}']:.4f} | {report[f'flops_{name}'] / 1e9:.2f} G | "
            f"{report[f'latency_{name}_ms']:.1f} ms | {speed_up:.2f}× | {ideal:.2f}× |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the README's figures as Markdown.")
    parser.add_argument("demo", type=Path, metavar="DIR", nargs="?", help="folder that `python -m diffcr_surgery demo --out DIR` wrote")
    folder = parser.parse_args().demo
    if folder is not None:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        print(f"On {report['device']}, {report['threads']} threads, torch {report['torch']}; batch {report['latency_batch']}, one seed:\n")
        print(demo_table(report))
    print(f"\n{planning_xl()}")
    batches = (1, 8)
    times = ", ".join(f"{conversion_time(batch):.1f} (batch {batch})" for batch in batches)
    print(f"- Planning and converting a DiT of 12 layers, 384 wide, 256 tokens: {times} dense forwards.")
    overheads = ", ".join(f"{call_overhead(batch):.3f}× (batch {batch})" for batch in batches)
    print(f"- The same model converted, every ratio at 0, against dense: {overheads}.")
    print(f"- `import diffcr_surgery` beyond torch: {import_seconds():.2f} s.")


if __name__ == "__main__":
    main()
