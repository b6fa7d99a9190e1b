"""Fine-tune a text-to-image transformer of diffusers on captioned images, and have it learn how many tokens each block may leave out.

    python recipes/text_to_image.py --model PixArt-alpha/PixArt-Sigma-XL-2-512-MS --data photos --out out
    accelerate launch recipes/text_to_image.py --model black-forest-labs/FLUX.1-dev --mixed-precision bf16 --data photos --out out
    python recipes/text_to_image.py --smoke --out out    # a tiny random model on crops of photographs: shows the way, proves nothing

`photos` is a folder of images with a metadata.jsonl beside them: {"file_name": "fox.jpg", "text": "a red fox"}, one line an image. Any
pipeline works whose transformer is called once a step with latents and conditions: PixArt-Sigma, Stable Diffusion 3 and FLUX are tested.
What else a pipeline does to latents, timesteps and predictions is read off one run of it, and refused by name if training cannot follow.

OUT holds `adapter` (routers and ratios, LoRA or all weights, and a model card that says how to load them), `samples`, `checkpoints`, `logs`
(tensorboard --logdir OUT/logs) and `cache`. Started again with the same OUT, it goes on from the newest checkpoint.
"""

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from parts.caching import PreparedData, load_captioned
from parts.calling import STREAM, TIMESTEP, read_calling, supported_arguments
from parts.checkpoints import Checkpoints
from parts.model_card import loading_code, mean_ratio, write_model_card
from parts.objectives import objective_of
from parts.pictures import draw_images, draw_ratios
from parts.settings import add_diffcr_flags, diffcr_config, new_parser, read_arguments
from parts.tiny import captioned_photographs, tiny_pixart
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional
from torchvision.utils import save_image

import diffcr_surgery as dcs

SMOKE = {"size": 32, "steps": 12, "batch": 4, "rank": 4, "warm_up": 1, "checkpoint_every": 4, "sample_every": 6, "sample_steps": 4}


def arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="PixArt-alpha/PixArt-Sigma-XL-2-512-MS", help="folder or name of a text-to-image pipeline")
    parser.add_argument("--data", default=None, help="folder of captioned images, or name of a data set")
    parser.add_argument("--caption-column", default="text", help="where the captions are")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything this run writes")
    parser.add_argument("--cache", type=Path, default=None, help="folder for latents and captions; OUT/cache if left out")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images, in pixels")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="images per process and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--rank", type=int, default=32, help="rank of LoRA")
    parser.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers that get LoRA")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of the weights or of LoRA")
    parser.add_argument("--weight-decay", type=float, default=1e-2, help="of the weights or of LoRA")
    parser.add_argument("--warm-up", type=int, default=100, help="steps until the learning rate is reached")
    parser.add_argument("--caption-dropout", type=float, default=0.1, help="share of images trained without caption, for guidance")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="precision of the forward")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward, to save memory")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between two checkpoints")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between two grids of samples")
    parser.add_argument("--sample-steps", type=int, default=20, help="denoising steps of a sample")
    parser.add_argument("--guidance", type=float, default=4.5, help="classifier-free guidance of the samples, or FLUX's guidance")
    parser.add_argument("--prompts", nargs="+", default=["a red fox in the snow", "a lighthouse at dusk"], help="what the samples show")
    parser.add_argument("--seed", type=int, default=0, help="of data order, noise and samples")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps at a tiny size; without --data, of a tiny random model on crops of photographs"
    )
    add_diffcr_flags(parser, target_ratio=0.2, regions=4)
    if read_arguments(parser).smoke:
        parser.set_defaults(**SMOKE)
    given = read_arguments(parser)
    if given.data is None and not given.smoke:
        parser.error("--data is missing: a folder of captioned images, or the name of a data set")
    return given


def call_arguments(pipe: DiffusionPipeline, given: argparse.Namespace, guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline besides prompt and steps; those it does not know are left out."""
    wanted = {
        "height": given.size,
        "width": given.size,
        "guidance_scale": guidance,
        "use_resolution_binning": False,  # PixArt would go to the nearest of the sizes it was trained on
        "clean_caption": False,  # DeepFloyd's clean-up of scraped captions, which needs more packages
    }
    return supported_arguments(pipe, wanted)


@contextmanager
def moved(encoders: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Have the text encoders on the device for a while; between samples they only take memory there."""
    for encoder in encoders:
        encoder.to(device)
    yield
    for encoder in encoders:
        encoder.to("cpu")


def sample(pipe: DiffusionPipeline, given: argparse.Namespace) -> Tensor:
    """Draw an image for each prompt through the pipeline, always from the same noise: `b 3 h w` in [0, 1]."""
    pipe.transformer.eval()
    noise = [torch.Generator().manual_seed(given.seed + i) for i in range(len(given.prompts))]
    call = call_arguments(pipe, given, given.guidance)
    images = pipe(prompt=given.prompts, num_inference_steps=given.sample_steps, generator=noise, output_type="pt", **call).images
    pipe.transformer.train()
    return images.float().cpu()


def rows_of(step: int, count: int, given: argparse.Namespace, accelerator: Accelerator) -> tuple[list[list[int]], torch.Generator]:
    """Return the images of each micro-batch of a step, and the source of this process's randomness in it.

    Both are functions of the step, so a run that was interrupted goes on as if it had not been.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    size = given.batch * given.accumulate * processes
    orders = functools.cache(lambda epoch: torch.randperm(count, generator=torch.Generator().manual_seed(given.seed + epoch)).tolist())
    rows = [orders(place // count)[place % count] for place in range(step * size + rank, (step + 1) * size, processes)]
    own = torch.Generator().manual_seed((given.seed * 1_000_003 + step) * processes + rank)
    return [rows[i : i + given.batch] for i in range(0, len(rows), given.batch)], own


def show(folder: Path, pictures: dict[str, Tensor], model: nn.Module, board: Any, step: int) -> None:
    """Keep samples and ratios of a step: dense and routed side by side, the routed ones by themselves, and both on the board."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pictures["routed"]):
        save_image(image, folder / f"{index}.png")
    for name, figure in {"samples": draw_images(pictures), "ratios": draw_ratios(model)}.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
        board.add_figure(name, figure, step)


def finish(folder: Path, pipe: DiffusionPipeline, lora: Any, given: argparse.Namespace, objective: Any) -> None:
    """Write the adapter: routers and ratios, what was trained, and the model card that says how to load them."""
    model = pipe.transformer
    dcs.save_adapter(model, folder)
    if lora is not None:
        lora.save_pretrained(folder)
    write_model_card(
        folder,
        model,
        title=f"DiffCR for {Path(str(given.model)).name}",
        about=f"Fine-tuned on {Path(given.data).name} at {given.size} x {given.size} pixels ({objective.name}).",
        base=str(given.model),
        trained=f"{'all weights' if lora is None else f'LoRA, rank {given.rank}'}; {given.steps} steps",
        code=loading_code(str(given.model), lora is not None, call_arguments(pipe, given, given.guidance)),
    )
    if lora is None:
        dcs.restore_(model).save_pretrained(folder / "transformer")


def main() -> None:
    given = arguments()
    accelerator = Accelerator(
        gradient_accumulation_steps=given.accumulate,
        mixed_precision=given.mixed_precision,
        log_with="tensorboard",
        project_dir=given.out / "logs",
    )
    accelerator.init_trackers("text_to_image")
    set_seed(given.seed)
    if given.data is None:  # the smoke run alone has none
        with accelerator.main_process_first():
            given.model, given.data = (tiny_pixart(given.out / "model"), str(captioned_photographs(given.out / "data")))

    # The pipeline, how it calls its transformer, and the data made ready. What is not trained is kept in the precision of the forward.
    low = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[given.mixed_precision]
    pipe = DiffusionPipeline.from_pretrained(given.model, torch_dtype=low).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    # Without classifier-free guidance, as training is; what FLUX was distilled to is an input like any other.
    call = call_arguments(pipe, given, given.guidance if pipe.transformer.config.get("guidance_embeds") else 1.0)
    calling, objective = read_calling(pipe, steps=given.sample_steps, **call), objective_of(pipe.scheduler)
    rows = load_captioned(given.data, given.caption_column)
    data = PreparedData(rows, given.caption_column, calling, given.cache or given.out / "cache", str(given.model), given.size)
    data.make(pipe, accelerator, **call)
    pictures = {"dense": sample(pipe, given)} if accelerator.is_main_process else {}
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]

    # What is trained, then the conversion. What is trained is kept in single precision.
    transformer = pipe.transformer.requires_grad_(given.full)
    lora = None
    if not given.full:
        lora = get_peft_model(transformer, LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=given.lora_targets))
    if given.checkpointing:
        transformer.enable_gradient_checkpointing()
    highest, unit = objective.highest * calling.timestep_scale, calling.timestep_scale
    config = diffcr_config(given, timestep_range=(0.0, highest), region_weights=calling.visits(given.regions, highest))
    plan = dcs.plan(transformer, calling.inputs, config)
    accelerator.print(plan)
    dcs.convert_(transformer, plan).train()
    cast_training_params(transformer)

    groups = dcs.parameter_groups(transformer, lr=given.lr, router_lr=given.router_lr, weight_decay=given.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=given.warm_up * accelerator.num_processes)
    steppers = [optimizer, schedule] if given.uniform else [optimizer, schedule, dcs.RatioOptimizer(transformer, total_steps=given.steps)]
    model, *steppers = accelerator.prepare(transformer, *steppers)
    clipped = [weight for group in groups for weight in group["params"]]
    checkpoints = Checkpoints(accelerator, given.out / "checkpoints")
    done = checkpoints.resume()

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return objective.draw(count, generator) * unit

    def loss_of(images: list[int], timesteps: Tensor, own: torch.Generator) -> Tensor:
        """The diffusion loss of a micro-batch; timesteps `b` in the transformer's unit."""
        clean, conditions = data.batch(images, (torch.rand(len(images), generator=own) < given.caption_dropout).tolist(), own)
        noise = torch.randn(clean.shape, generator=own)
        noisy, target = objective.noisy_and_target(clean, noise, timesteps / unit)
        there = {STREAM: noisy.to(low), TIMESTEP: timesteps, **conditions}
        predicted = model(**{name: value.to(accelerator.device) for name, value in there.items()}, **calling.constants)[0]
        return functional.mse_loss(
            predicted[:, : target.shape[1]].float(), target.to(accelerator.device)
        )  # a learned variance is left alone

    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("fine-tuning", total=given.steps, completed=done)
        for step in range(done + 1, given.steps + 1):
            parts, own = rows_of(step - 1, len(data), given, accelerator)
            timesteps = dcs.RegionSampler(transformer, draw, seed=given.seed + step, rank=accelerator.process_index)
            for images in parts:
                with accelerator.accumulate(model):
                    loss = loss_of(images, timesteps(len(images)), own)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(clipped, 1.0)
                    for each in steppers:
                        each.step()
                    for each in steppers:
                        if isinstance(each, torch.optim.Optimizer):
                            each.zero_grad()
            accelerator.log({"loss": loss.item(), "ratio": mean_ratio(transformer, dcs.ratio_table(transformer))}, step)
            progress.update(task, advance=1, description=f"fine-tuning, loss {loss.item():.3f}")
            if step % given.checkpoint_every == 0:
                checkpoints.save(step)
            if accelerator.is_main_process and (step % given.sample_every == 0 or step == given.steps):
                with moved(encoders, accelerator.device):
                    pictures["routed"] = sample(pipe, given)
                show(given.out / "samples" / f"step-{step}", pictures, transformer, accelerator.get_tracker("tensorboard").writer, step)
    accelerator.end_training()
    if accelerator.is_main_process:
        executed = mean_ratio(transformer, transformer.diffcr.executed_ratios())
        finish(given.out / "adapter", pipe, lora, given, objective)
        print(f"{given.out / 'adapter'}: mean ratio {executed:.3f} for {given.target_ratio:g}; README.md there says how to load it")


if __name__ == "__main__":
    main()
