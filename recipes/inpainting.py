"""Train an inpainting model that works on the hole alone, make it a DiffCR model, and measure what that costs and saves.

    python recipes/inpainting.py --out out                                 # photographs inside scikit-image; 11 minutes on 2 CPU cores
    accelerate launch recipes/inpainting.py --config large.yaml --data PHOTOS --mixed-precision bf16 --out out
    python recipes/inpainting.py --smoke --out out                         # tiny, in under a minute: shows the way, proves nothing

In the manner of Lazy Diffusion (arXiv 2404.12382): a ViT encoder reads the image and its hole once; a DiT decoder denoises the tokens of
the hole, and no others. What it adds goes on top of a smooth fill of the hole, so that a small model has only detail to make. A dense model
is trained first. From it two fine-tunes of equal length on equal data, timesteps and noise are made: a dense one, and one in which the
encoder's blocks run on half of the tokens and the decoder learns a compression ratio for each block and timestep region; both rise from 0,
so that the model gets used to it. Dense and routed then fill the same holes in crops that no training saw.

PHOTOS is a folder of images, with or without folders inside; every tenth is held out. A model for 512 pixels, as large.yaml says it:

    {vae: stabilityai/sd-vae-ft-mse, size: 512, patch: 2, width: 768, heads: 12, encoder-depth: 12, decoder-depth: 28, batch: 32,
     pretrain-steps: 200000, finetune-steps: 50000, lr: 1.0e-4, finetune-lr: 1.0e-4, checkpoint-every: 5000, workers: 8}

OUT holds `comparison.png`, `ratios.png`, `cost.png`, `report.json`, the weights `pretrained.safetensors`, `dense.safetensors` and
`routed.safetensors`, the adapters `routed/encoder` and `routed/decoder`, `checkpoints` and `logs` (tensorboard --logdir OUT/logs). Started
again with the same OUT, it goes on from the newest checkpoint.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from parts.checkpoints import Checkpoints
from parts.inpainting_measure import draw_cost, held_out_loss, hole_costs, inpaint, masked_psnr
from parts.inpainting_model import Example, Inpainter, PixelSpace, VaeSpace, prepare, smooth_fill, take
from parts.objectives import NoisePrediction
from parts.photographs import Crops, bundled_photographs, folder_of_photographs
from parts.pictures import draw_images, draw_ratios
from parts.settings import add_diffcr_flags, diffcr_config, new_parser, read_arguments
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

import diffcr_surgery as dcs

Space = PixelSpace | VaeSpace
TIMESTEPS = 1000
HOLES = (0.2, 0.3, 0.4, 0.5)  # share of the tokens a hole may touch; few sizes, since a graph is recorded for each
# v-prediction (arXiv 2202.00512): on pure noise it asks for the image, where epsilon would ask for nothing the context helps with.
NOISE = {"num_train_timesteps": TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
OBJECTIVE = NoisePrediction(DDPMScheduler(**NOISE))


def arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything this run writes")
    parser.add_argument("--data", type=Path, metavar="PHOTOS", help="folder of photographs; those inside scikit-image if left out")
    parser.add_argument("--from", dest="start", type=Path, metavar="FILE", help="pretrained.safetensors of another run, to start from")
    parser.add_argument("--vae", help="folder or name of an AutoencoderKL, to denoise its latents; pixels if left out")
    parser.add_argument("--size", type=int, default=32, help="height and width of a crop, in pixels")
    parser.add_argument("--patch", type=int, default=4, help="height and width of a token, in pixels or latents")
    parser.add_argument("--width", type=int, default=128, help="channels of a token")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of a block")
    parser.add_argument("--encoder-depth", type=int, default=4, help="blocks of the encoder")
    parser.add_argument("--decoder-depth", type=int, default=6, help="blocks of the decoder")
    parser.add_argument("--encoder-ratio", type=float, default=0.5, help="share of tokens that bypass each block of the encoder")
    parser.add_argument("--pretrain-steps", type=int, default=1000, help="steps of the dense training")
    parser.add_argument("--finetune-steps", type=int, default=2300, help="steps of each fine-tune")
    parser.add_argument("--batch", type=int, default=16, help="crops per process and step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the dense training")
    parser.add_argument("--finetune-lr", type=float, default=1e-3, help="highest learning rate of the fine-tunes")
    parser.add_argument("--weight-decay", type=float, default=3e-2, help="of the weights")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the forward")
    parser.add_argument("--workers", type=int, default=0, help="processes that read photographs")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between two checkpoints")
    parser.add_argument("--test-crops", type=int, default=192, help="held-out crops to fill, equally many for each size of hole")
    parser.add_argument("--sample-steps", type=int, default=30, help="denoising steps of a sample")
    parser.add_argument("--rounds", type=int, default=7, help="how often each step is timed")
    parser.add_argument("--seed", type=int, default=0, help="of crops, holes, timesteps and noise")
    parser.add_argument("--smoke", action="store_true", help="tiny model, few steps: under a minute on a CPU")
    add_diffcr_flags(parser, target_ratio=0.3, regions=10)
    given = read_arguments(parser)
    if given.smoke:
        vars(given).update(size=32, patch=4, width=16, heads=2, encoder_depth=2, decoder_depth=2, batch=2)
        vars(given).update(pretrain_steps=4, finetune_steps=10, checkpoint_every=5, test_crops=8, sample_steps=4, rounds=1)
    return given


def convert(model: Inpainter, example: Example, given: argparse.Namespace) -> str:
    """Route the blocks of both parts, in place; the encoder's know no timestep. Return what was planned."""
    ratio = dcs.DiffCRConfig(target_ratio=given.encoder_ratio, gate=given.gate, branches=given.branches)
    encoder = dcs.plan(model.encoder, (example.seen,), ratio)
    inputs = {
        "tokens": example.clean,
        "context": take(model.encoder(example.seen), example.places),
        "places": example.places,
        "timestep": torch.zeros(len(example.seen), dtype=torch.long, device=example.seen.device),
    }
    decoder = dcs.plan(model.decoder, inputs, diffcr_config(given, timestep_range=(0, TIMESTEPS)))
    dcs.convert_(model.encoder, encoder)
    dcs.convert_(model.decoder, decoder)
    return f"{encoder}\n{decoder}"


def train(
    name: str, model: Inpainter, crops: Crops, timesteps: Sequence[Tensor], space: Space, lr: float, given: argparse.Namespace
) -> Inpainter:
    """Train a model in place, or go on from its newest checkpoint; models on equal crops and timesteps see equal noise.

    Args:
        name: Of its logs and checkpoints.
        model: The model, converted or not.
        crops: Those of all steps and processes, in order.
        timesteps: For each step, those of this process.
        space: What is denoised.
        lr: Highest learning rate.
        given: The flags.
    """
    accelerator = Accelerator(mixed_precision=given.mixed_precision, log_with="tensorboard", project_dir=given.out / "logs")
    accelerator.init_trackers(name)
    steps, size, rank, processes = len(timesteps), given.batch, accelerator.process_index, accelerator.num_processes
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": lr, "weight_decay": given.weight_decay}]
    ratios = []
    if hasattr(model.decoder, "diffcr"):
        settings = {"lr": lr, "router_lr": given.router_lr, "weight_decay": given.weight_decay}
        groups = [group for part in (model.encoder, model.decoder) for group in dcs.parameter_groups(part, **settings)]
        # At a rate of 0 nothing is learned: all of the encoder's blocks go to the target together, and have time to get used to it.
        ratios = [dcs.RatioOptimizer(model.encoder, total_steps=steps, lr=0.0)]
        ratios += [] if given.uniform else [dcs.RatioOptimizer(model.decoder, total_steps=steps)]
    optimizer, weights = torch.optim.AdamW(groups), [w for name, w in model.named_parameters() if "diffcr." not in name and w.requires_grad]
    schedule = get_cosine_schedule_with_warmup(optimizer, steps * processes // 20, steps * processes)
    model, schedule, *optimizers = accelerator.prepare(model, schedule, optimizer, *ratios)
    checkpoints = Checkpoints(accelerator, given.out / "checkpoints" / name)
    done = checkpoints.resume()

    mine = [range((step * processes + rank) * size, (step * processes + rank + 1) * size) for step in range(done, steps)]
    loader = DataLoader(crops, batch_sampler=mine, num_workers=given.workers)
    model.train()
    for step, batch in zip(track(range(done, steps), name, disable=not accelerator.is_main_process), loader, strict=True):
        example = prepare(send_to_device(batch, accelerator.device), space, given.patch)
        source = torch.Generator().manual_seed((given.seed * 1_000_003 + step) * processes + rank)
        noise, timestep = torch.randn(example.clean.shape, generator=source).to(example.clean), timesteps[step].to(accelerator.device)
        noisy, target = OBJECTIVE.noisy_and_target(example.clean, noise, timestep)
        loss = functional.mse_loss(model(example.seen, noisy, example.places, timestep).float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()
        schedule.step()
        accelerator.log({"loss": loss.item(), "lr": schedule.get_last_lr()[0]}, step)
        if (step + 1) % given.checkpoint_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1)
    for tracker in accelerator.trackers:
        tracker.finish()
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


def keep(model: Inpainter, given: argparse.Namespace) -> dict[str, Any]:
    """Save what the conversion added and draw the ratios; then make the model one for inference, and return what it was trained to."""
    dcs.save_adapter(model.encoder, given.out / "routed" / "encoder")
    dcs.save_adapter(model.decoder, given.out / "routed" / "decoder")
    draw_ratios(model.decoder).savefig(given.out / "ratios.png", dpi=120)
    learned = dcs.ratio_table(model.decoder).tolist()
    encoder, decoder = (dcs.specialize_(part).diffcr.achieved for part in (model.encoder, model.decoder))
    print(f"encoder: {encoder}; decoder: {decoder}")
    return {"encoder_ratio": encoder.ratio, "decoder_ratio": decoder.ratio, "decoder_ratios_learned": learned}


def compare(models: dict[str, Inpainter], crops: Crops, space: Space, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the models on the held-out crops, and draw holes they filled and what that costs."""
    regions = given.regions
    batches = [send_to_device(batch, device) for batch in DataLoader(crops, batch_size=len(crops) // len(HOLES))]
    examples = [prepare(batch, space, given.patch) for batch in batches]
    scheduler = DDIMScheduler(**NOISE, timestep_spacing="trailing", clip_sample=False)
    filled = {
        name: [inpaint(model, batch, space, given.patch, scheduler, given.sample_steps, seed=i) for i, batch in enumerate(batches)]
        for name, model in models.items()
    }
    candidates = filled | {"smooth fill": [smooth_fill(batch["image"], batch["mask"]) for batch in batches]}
    psnr = {
        name: torch.cat([masked_psnr(image, batch["image"], batch["mask"]) for image, batch in zip(images, batches, strict=True)])
        for name, images in candidates.items()
    }
    apart = psnr["routed"] - psnr["dense"]
    columns = {"original": [batch["image"] for batch in batches], "masked": [batch["image"] * (1 - batch["mask"]) for batch in batches]}
    shown = {name: torch.cat([images[:2] for images in found]) / 2 + 0.5 for name, found in (columns | filled).items()}
    draw_images(shown).savefig(given.out / "comparison.png", dpi=120)
    costs = hole_costs(models, examples, OBJECTIVE, regions, given.rounds)
    draw_cost(costs, list(models), len(apart) // len(HOLES)).savefig(given.out / "cost.png", dpi=120)
    losses = {name: held_out_loss(model, examples, OBJECTIVE, regions, seed=given.seed) for name, model in models.items()}
    return {
        "masked_psnr": {name: float(found.mean()) for name, found in psnr.items()},
        "masked_psnr_difference": float(apart.mean()),
        "masked_psnr_standard_error": float(apart.std() / len(apart) ** 0.5),
        "loss": {name: sum(found) / regions for name, found in losses.items()},
        "loss_by_region": losses,
        "cost_by_hole": costs,
    }


def main() -> None:
    given = arguments()
    started = time.perf_counter()
    set_seed(given.seed)
    accelerator = Accelerator(mixed_precision=given.mixed_precision)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    given.out.mkdir(parents=True, exist_ok=True)

    # Data. All holes of a step touch equally many tokens; how many is drawn for each step.
    space = PixelSpace() if given.vae is None else VaeSpace(AutoencoderKL.from_pretrained(given.vae).to(device))
    photographs, unseen = bundled_photographs(given.size) if given.data is None else folder_of_photographs(given.data)
    side = given.size // space.factor // given.patch
    sizes = [max(1, round(share * side**2)) for share in HOLES]
    cut = {"size": given.size, "patch": given.patch * space.factor}

    def crops(steps: int, seed: int) -> Crops:
        drawn = torch.randint(len(sizes), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Crops(photographs, **cut, holes=[sizes[i] for i in drawn], group=given.batch * processes, seed=seed)

    tests = Crops(unseen, **cut, holes=sizes, group=given.test_crops // len(sizes), seed=given.seed)

    # A dense model, from scratch.
    base = Inpainter(
        channels=space.channels,
        size=given.size // space.factor,
        patch=given.patch,
        width=given.width,
        encoder_depth=given.encoder_depth,
        decoder_depth=given.decoder_depth,
        heads=given.heads,
    )
    if given.start is None:
        source = torch.Generator().manual_seed(given.seed * processes + rank)
        timesteps = list(torch.randint(TIMESTEPS, (given.pretrain_steps, given.batch), generator=source))
        base = train("pretrained", base, crops(given.pretrain_steps, given.seed + 1), timesteps, space, given.lr, given)
        if accelerator.is_main_process:
            save_file(base.state_dict(), given.out / "pretrained.safetensors")
    else:
        base.load_state_dict(load_file(given.start))

    # Two fine-tunes from it, on the same crops, timesteps and noise.
    models = {"dense": base.to(device), "routed": copy.deepcopy(base)}
    largest = send_to_device(default_collate([tests[len(tests) - 2], tests[len(tests) - 1]]), device)
    planned = convert(models["routed"], prepare(largest, space, given.patch), given)
    accelerator.print(planned)
    draw = dcs.RegionSampler(
        models["routed"].decoder, lambda count, source: torch.randint(TIMESTEPS, (count,), generator=source), seed=given.seed, rank=rank
    )
    timesteps = [draw(given.batch) for _ in range(given.finetune_steps)]
    for name, model in models.items():
        models[name] = train(name, model, crops(given.finetune_steps, given.seed + 2), timesteps, space, given.finetune_lr, given)
        if accelerator.is_main_process:
            weights = {key: value.contiguous() for key, value in models[name].state_dict().items() if ".diffcr." not in key}
            save_file(weights, given.out / f"{name}.safetensors")
    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        found = {"training_seconds": seconds, **keep(models["routed"], given), **compare(models, tests, space, given, device)}
        found |= {"seconds": time.perf_counter() - started, "settings": {name: str(value) for name, value in vars(given).items()}}
        (given.out / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        psnr, apart, error = (found[key] for key in ("masked_psnr", "masked_psnr_difference", "masked_psnr_standard_error"))
        print(f"masked PSNR: {psnr['dense']:.2f} dB dense, {psnr['routed']:.2f} dB routed, {apart:+.2f} ± {error:.2f} dB apart")
        print(f"held-out loss: {found['loss']['dense']:.4f} dense, {found['loss']['routed']:.4f} routed")
    accelerator.end_training()


if __name__ == "__main__":
    main()
