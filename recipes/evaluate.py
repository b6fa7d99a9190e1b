r"""Compare adapters and baselines of one model: FID, KID, CLIP score, FLOPs, latency and memory, in one table.

    python recipes/evaluate.py --model PixArt-alpha/PixArt-Sigma-XL-2-512-MS --data coco --adapter DiffCR=run/adapter \
        --features inception:inception_v3.pth --out out
    python recipes/evaluate.py --demo demo-out --baseline dense token_merging random --out out
    python recipes/evaluate.py --smoke --out out    # under a minute on one core: shows the way, proves nothing

An adapter is a folder that training left: routers and ratios (diffcr.json, diffcr.safetensors) with LoRA (pytorch_lora_weights.safetensors
or peft's adapter_model.safetensors) or all weights (a folder transformer) beside them. Without diffcr.json it is a dense arm that was
trained on, the fair yardstick. Baselines take no training; they are made of --model as it is. `--data` gives real images and conditions: a
folder of images with a metadata.jsonl, {"file_name": "fox.jpg", "text": "a red fox"}, or, for class-conditional pipelines, with a folder
for each class (its number, or one of the pipeline's labels). `--demo` is the folder of a finished `python -m diffcr_surgery demo`: the
denoisers it trained are compared with each other.

All arms draw the same samples: the same conditions, the same noise. How many FID needs: it falls with the number of images, its published
values use 30,000 and more, and below 10,000 it only ranks arms of one table; go by KID there, which has no such bias. Costs are of one call
of the denoiser with --batch samples, averaged over the sampler's steps; arms are timed in turns.

OUT holds evaluation.md (the table), evaluation.json (everything measured) and samples.png (the same samples of every arm).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from parts.evaluating import BASELINES, Arm, Cost, Demo, Pipeline, Subject, baseline, costs
from parts.metrics import ClipScore, Distances, SmallClassifier, distances, feature_network, features_of, train_classifier
from parts.pictures import draw_images
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.demo.run import QUICK
from diffcr_surgery.demo.run import Demo as Training

SMOKE = {"samples": 40, "steps": 4, "batch": 40, "rounds": 2, "baseline": list(BASELINES)}
SHOWN = 6  # samples of each arm in the picture


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        arm: Its name.
        ratio: Mean compression ratio of its routed blocks.
        distances: To the real images.
        cost: Of a call.
        clip_score: Mean over the samples, if it was asked for.
        recognised: Share of the samples the classifier takes for their class, if there is one.
    """

    arm: str
    ratio: float
    distances: Distances
    cost: Cost
    clip_score: float | None
    recognised: float | None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or name of a pipeline of diffusers")
    what.add_argument("--demo", type=Path, metavar="DIR", help="folder of a finished demo")
    what.add_argument("--smoke", action="store_true", help="train a tiny demo and compare it with all baselines")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of real images and their conditions, for --model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="an arm that was trained; may be given again")
    parser.add_argument("--baseline", nargs="*", choices=BASELINES, default=["dense"], help="arms without training (default: dense)")
    parser.add_argument("--ratio", type=float, default=0.3, help="compression ratio of the baselines (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="share of the dense cost the adapters are to keep, in place of what was trained")
    parser.add_argument("--samples", type=int, default=1000, help="images of each arm, at least 4 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="strength of guidance (default: the pipeline's own; of the demo 1.5)")
    parser.add_argument("--size", type=int, help="height and width of the images in pixels (default: the pipeline's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each call is timed (default: %(default)s)")
    parser.add_argument(
        "--features",
        help="what FID and KID look with: inception:PATH (torchvision's weights), clip:DIR, timm:NAME[:PATH], or digits, a small "
        "classifier trained on the real images and their classes (default: of the demo, digits)",
    )
    parser.add_argument("--clip-score", type=Path, metavar="DIR", help="folder of a CLIP of transformers; adds the score of captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(default: %(default)s)")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    given = parser.parse_args()
    if given.model and not given.data:
        parser.error("--data is missing: a folder of real images and their conditions")
    if given.demo and (given.adapter or given.data):
        parser.error("--demo brings its own adapters and data; --adapter and --data belong to --model")
    if given.model and not (given.adapter or given.baseline):
        parser.error("nothing to compare: give --adapter or --baseline")
    if wrong := [entry for entry in given.adapter if "=" not in entry]:
        parser.error(f"--adapter {wrong[0]}: expected NAME=DIR, such as DiffCR=out/adapter")
    if given.model and not given.features:
        parser.error("--features is missing: what FID and KID look with, such as inception:PATH")
    given.features = given.features or "digits"
    if given.samples < 4:
        parser.error(f"--samples {given.samples}: expected at least 4, and thousands to mean anything")
    return given


def train_demo(folder: Path) -> None:
    """Train the demo for a few seconds, and leave of it what an evaluation needs."""
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(folder, replace(QUICK, dense_steps=40, finetune_steps=20), 0, Console(quiet=True))
    base = training.train_dense()
    for train in (training.dense, training.uniform, training.routed):
        train(base)
    (folder / "report.json").write_text(json.dumps({"seed": training.seed}), encoding="utf-8")


def demo_subject(given: argparse.Namespace) -> tuple[Subject, dict[str, Path]]:
    """Return the demo, and the folders of what it trained."""
    split_seed = json.loads((given.demo / "report.json").read_text(encoding="utf-8"))["seed"]
    guidance = 1.5 if given.guidance is None else given.guidance
    subject = Demo(given.demo, split_seed, given.samples, given.steps, guidance, given.seed)
    return subject, {"uniform": given.demo / "uniform", "DiffCR": given.demo / "adapter"}


def pipeline_subject(given: argparse.Namespace) -> tuple[Subject, dict[str, Path]]:
    """Return the pipeline with its data, and the folders of the adapters."""
    pipe = DiffusionPipeline.from_pretrained(given.model, torch_dtype=getattr(torch, given.dtype)).to(given.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": given.steps, "guidance_scale": given.guidance, "height": given.size, "width": given.size}
    call = {name: value for name, value in call.items() if value is not None}
    folders = dict(entry.partition("=")[::2] for entry in given.adapter)
    subject = Pipeline(pipe, given.data, given.samples, call, given.seed)
    return subject, {name: Path(folder) for name, folder in folders.items()}


def look(
    subject: Subject, arm: Arm, network: nn.Module, clip: ClipScore | None, given: argparse.Namespace
) -> tuple[Tensor, dict[str, Any]]:
    """Draw an arm's samples.

    Returns:
        Their features `n f`; the first of them as images, and what else is known of all: `shown`, `clip_score`, `recognised`.
    """
    features, scores, read, shown = [], [], [], []
    for start in track(range(0, given.samples, given.batch), f"sampling {arm.name}", console=Console(stderr=True), transient=True):
        which = range(start, min(start + given.batch, given.samples))
        images = (255 * subject.sample(arm.model, which)).round() / 255  # as a file keeps them
        captions, labels = subject.wanted(which)
        features.append(features_of(network, [images]))
        if clip is not None:
            scores.append(clip(images, captions))
        if isinstance(network, SmallClassifier):
            read.append(network.recognised(images, labels.to(images.device)))
        shown.append(images[: max(0, SHOWN - start)].cpu())
    mean = {
        name: float(torch.cat(parts).float().mean()) if parts else None for name, parts in (("clip_score", scores), ("recognised", read))
    }
    return torch.cat(features), {"shown": torch.cat(shown), **mean}


def table(rows: list[Row]) -> str:
    """Return the table in Markdown."""
    dense = next((row.cost.latency_ms for row in rows if row.arm == "dense"), None)
    columns = {
        "arm": lambda row: row.arm,
        "ratio": lambda row: f"{row.ratio:.3f}",
        "FID": lambda row: f"{row.distances.fid:.3f}",
        "KID × 1000": lambda row: f"{1000 * row.distances.kid:.2f} ± {1000 * row.distances.kid_std:.2f}",
        "CLIP score": lambda row: None if row.clip_score is None else f"{row.clip_score:.2f}",
        "recognised": lambda row: None if row.recognised is None else f"{row.recognised:.1%}",
        "GFLOPs": lambda row: f"{row.cost.flops / 1e9:.4g}",
        "latency ms": lambda row: f"{row.cost.latency_ms:.2f}",
        "speed-up": lambda row: None if dense is None else f"{dense / row.cost.latency_ms:.3f}×",
        "peak MiB": lambda row: f"{row.cost.peak_mib:.1f}",
    }
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if None not in column}
    lines = [cells, ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.no_grad()
def evaluate(given: argparse.Namespace) -> None:
    subject, folders = pipeline_subject(given) if given.model else demo_subject(given)
    device = next(subject.dense.parameters()).device
    with dcs.capture_inputs(subject.dense) as seen:
        subject.sample(subject.dense, range(min(given.batch, given.samples)))
    plan = dcs.plan(subject.dense, seen.inputs)
    arms = [baseline(name, subject.dense, plan, given.ratio, given.seed) for name in given.baseline]
    arms += [subject.arm(name, folder, seen.inputs, given.budget) for name, folder in folders.items()]

    if given.features == "digits":
        network: nn.Module = train_classifier(torch.cat(list(subject.real(given.batch))), subject.labels).to(device)
    else:
        network = feature_network(given.features).to(device)
    real = features_of(network, (images.to(device) for images in subject.real(given.batch)))
    clip = None if given.clip_score is None else ClipScore(given.clip_score, device)

    print("measuring costs", file=sys.stderr, flush=True)
    rows, shown = [], {}
    for arm, cost in zip(arms, costs(arms, seen.calls, given.rounds), strict=True):
        features, found = look(subject, arm, network, clip, given)
        shown[arm.name] = found.pop("shown")
        rows.append(Row(arm.name, arm.ratio, distances(real, features, seed=given.seed), cost, **found))

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = (
        f"{given.model or 'digits'}: {given.samples} samples of {given.steps} steps against {len(real)} real images, by the features of "
        f"{given.features}, KID on subsets of {rows[0].distances.kid_subset}. Costs of a call with {min(given.batch, given.samples)} "
        f"samples on {where}, {given.dtype}."
    )
    text = f"{table(rows)}\n\n{about}\n"
    print(text)
    (given.out / "evaluation.md").write_text(text, encoding="utf-8")
    report = {"settings": vars(given), "device": where, "real": len(real), "arms": [asdict(row) for row in rows]}
    (given.out / "evaluation.json").write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    draw_images(shown).savefig(given.out / "samples.png", dpi=120)


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.smoke:
        given.demo = given.out / "demo"
        train_demo(given.demo)
    try:
        evaluate(given)
    except (ValueError, dcs.SurgeryError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error


if __name__ == "__main__":
    main()
