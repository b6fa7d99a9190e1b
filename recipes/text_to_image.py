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
import shutil
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
from parts.pictures import draw_images, draw_ratios, save_image
from parts.settings import add_diffcr_flags, diffcr_config, new_parser, read_arguments
from parts.tiny import captioned_photographs, tiny_pixart
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

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
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the forward")
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


class TextToImage:
    """One run: the data made ready, the model converted, trained, shown and kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.accelerator = Accelerator(
            gradient_accumulation_steps=given.accumulate,
            mixed_precision=given.mixed_precision,
            log_with="tensorboard",
            project_dir=given.out / "logs",
        )
        self.accelerator.init_trackers("text_to_image")
        if given.data is None:  # the smoke run has none
            given.model, given.data = given.out / "model", given.out / "data"
            if self.accelerator.is_main_process:
                tiny_pixart(given.model)
                captioned_photographs(given.data)
            self.accelerator.wait_for_everyone()
        # What is not trained is kept in the precision of the forward.
        self.low = {"bf16": torch.bfloat16, "no": torch.float32}[given.mixed_precision]
        self.pipe = DiffusionPipeline.from_pretrained(given.model, torch_dtype=self.low).to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.objective = objective_of(self.pipe.scheduler)
        self.pictures: dict[str, Tensor] = {}

    @contextmanager
    def text_encoders(self) -> Iterator[None]:
        """Have the text encoders on the device for a while; between samples they would only take memory there."""
        encoders = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part is not None]
        for encoder in encoders:
            encoder.to(self.accelerator.device)
        try:
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def call(self, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline besides prompt and steps."""
        wanted = {
            "height": self.given.size,
            "width": self.given.size,
            "guidance_scale": guidance,
            "use_resolution_binning": False,  # PixArt would go to the nearest of the sizes it was trained on
            "clean_caption": False,  # DeepFloyd's clean-up of scraped captions, which needs more packages
        }
        return supported_arguments(self.pipe, wanted)

    def prepare_data(self) -> None:
        """Read how the pipeline calls its transformer, and bring images and captions into that form."""
        given = self.given
        # Without classifier-free guidance, as training is. The guidance that FLUX was distilled to take is an input like any other.
        call = self.call(given.guidance if self.pipe.transformer.config.get("guidance_embeds") else 1.0)
        rows = load_captioned(str(given.data), given.caption_column)
        with self.text_encoders():
            self.calling = read_calling(self.pipe, steps=given.sample_steps, **call)
            cache = given.cache or given.out / "cache"
            key = f"{given.model} {self.low} {sorted(call.items())}"
            self.data = PreparedData(rows, given.caption_column, self.calling, cache, key, given.size)
            self.data.make(self.pipe, self.accelerator, **call)
            if self.accelerator.is_main_process:
                self.pictures["dense"] = self.sample()

    def prepare_model(self) -> None:
        """Choose what is trained, convert, and make the optimizers. What is trained is kept in single precision."""
        given = self.given
        set_seed(given.seed)  # only here: how much chance the data took depends on what was cached
        self.transformer = self.pipe.transformer.requires_grad_(given.full)
        if not given.full:
            lora = LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=given.lora_targets)
            self.lora = get_peft_model(self.transformer, lora)  # its layers are put into the transformer, in place
        if given.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        highest = self.objective.highest * self.calling.timestep_scale
        config = diffcr_config(given, timestep_range=(0.0, highest), region_weights=self.calling.visits(given.regions, highest))
        plan = dcs.plan(self.transformer, self.calling.inputs, config)
        self.accelerator.print(plan)
        dcs.convert_(self.transformer, plan).train()
        cast_training_params(self.transformer)

        groups = dcs.parameter_groups(self.transformer, lr=given.lr, router_lr=given.router_lr, weight_decay=given.weight_decay)
        self.clipped = [weight for group in groups for weight in group["params"]]
        self.optimizers: list[Any] = [torch.optim.AdamW(groups)]
        if not given.uniform:
            self.optimizers.append(dcs.RatioOptimizer(self.transformer, total_steps=given.steps))
        warm_up = given.warm_up * self.accelerator.num_processes  # each of them counts
        schedule = get_scheduler("constant_with_warmup", self.optimizers[0], num_warmup_steps=warm_up)
        self.model, self.schedule, *self.optimizers = self.accelerator.prepare(self.transformer, schedule, *self.optimizers)

    def loss(self, rows: list[int], timesteps: Tensor, own: torch.Generator) -> Tensor:
        """The diffusion loss of some images; timesteps `b` in the transformer's unit."""
        dropped = torch.rand(len(rows), generator=own) < self.given.caption_dropout
        clean, conditions = self.data.batch(rows, dropped.tolist(), own)
        noise = torch.randn(clean.shape, generator=own)
        noisy, target = self.objective.noisy_and_target(clean, noise, timesteps / self.calling.timestep_scale)
        inputs = {STREAM: noisy.to(self.low), TIMESTEP: timesteps, **conditions}
        device = self.accelerator.device
        predicted = self.model(**{name: value.to(device) for name, value in inputs.items()}, **self.calling.constants)[0]
        # A learned variance is left as it is: the further channels of PixArt's output.
        return functional.mse_loss(predicted[:, : target.shape[1]].float(), target.to(device))

    def rows(self, step: int) -> tuple[list[list[int]], torch.Generator]:
        """Return the images of each micro-batch of a step, and the source of this process's randomness in it.

        Both are functions of the step, so a run that was interrupted goes on as if it had not been.
        """
        given, rank, processes, count = self.given, self.accelerator.process_index, self.accelerator.num_processes, len(self.data)
        size = given.batch * given.accumulate * processes
        order = functools.cache(lambda epoch: torch.randperm(count, generator=torch.Generator().manual_seed(given.seed + epoch)).tolist())
        rows = [order(place // count)[place % count] for place in range((step - 1) * size + rank, step * size, processes)]
        own = torch.Generator().manual_seed(10**12 + (given.seed * 1_000_003 + step) * processes + rank)  # far from the seeds of regions
        return [rows[i : i + given.batch] for i in range(0, len(rows), given.batch)], own

    def train(self) -> None:
        """Train from the newest checkpoint to the end."""
        given, accelerator, checkpoints = self.given, self.accelerator, Checkpoints(self.accelerator, self.given.out / "checkpoints")
        draw = lambda count, generator: self.objective.draw(count, generator) * self.calling.timestep_scale  # noqa: E731
        done = checkpoints.resume()
        with Progress(disable=not accelerator.is_main_process) as progress:
            task = progress.add_task("fine-tuning", total=given.steps, completed=done)
            for step in range(done + 1, given.steps + 1):
                timesteps = dcs.RegionSampler(self.transformer, draw, seed=given.seed + step, rank=accelerator.process_index)
                parts, own = self.rows(step)
                for rows in parts:
                    with accelerator.accumulate(self.model):
                        loss = self.loss(rows, timesteps(len(rows)), own)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(self.clipped, 1.0)
                        for each in (*self.optimizers, self.schedule):
                            each.step()
                        for each in self.optimizers:
                            each.zero_grad()
                ratio = mean_ratio(self.transformer, dcs.ratio_table(self.transformer))
                accelerator.log({"loss": loss.item(), "ratio": ratio}, step)
                progress.update(task, advance=1, description=f"fine-tuning, loss {loss.item():.3f}, ratio {ratio:.3f}")
                if step % given.checkpoint_every == 0 or step == given.steps:
                    checkpoints.save(step)
                if accelerator.is_main_process and (step % given.sample_every == 0 or step == given.steps):
                    with self.text_encoders():
                        self.show(step)

    def sample(self) -> Tensor:
        """Draw an image for each prompt through the pipeline, always from the same noise: `b 3 h w` in [0, 1]."""
        given, transformer = self.given, self.pipe.transformer.eval()
        # In training its outputs are in single precision, which the rest of the pipeline does not expect.
        cast = transformer.register_forward_hook(lambda module, args, output: (output[0].to(self.low), *output[1:]))
        noise = [torch.Generator().manual_seed(given.seed + i) for i in range(len(given.prompts))]
        call = {"num_inference_steps": given.sample_steps, "generator": noise, "output_type": "pt", **self.call(given.guidance)}
        images: Tensor = self.pipe(prompt=given.prompts, **call).images
        cast.remove()
        transformer.train()
        return images.float().cpu()

    def show(self, step: int) -> None:
        """Keep samples and ratios of a step: dense and routed side by side, the routed ones by themselves, and both on the board."""
        folder = self.given.out / "samples" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.pictures["routed"] = self.sample()
        for index, image in enumerate(self.pictures["routed"]):
            save_image(image, folder / f"{index}.png")
        for name, figure in {"samples": draw_images(self.pictures), "ratios": draw_ratios(self.transformer)}.items():
            figure.savefig(folder / f"{name}.png", dpi=120)
            self.accelerator.get_tracker("tensorboard").writer.add_figure(name, figure, step)

    def finish(self) -> None:
        """Write the adapter: routers and ratios, what was trained, and the model card that says how to load them."""
        final, executed = self.given.out / "adapter", mean_ratio(self.transformer, self.transformer.diffcr.executed_ratios())
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # the transformer's own forward again
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)  # of an earlier run
        self.accelerator.wait_for_everyone()
        with dcs.atomic_folder(final) as folder:
            if self.accelerator.is_main_process:
                self.write(folder)
        if self.accelerator.is_main_process:
            print(f"{final}: mean ratio {executed:.3f} for {self.given.target_ratio:g}; README.md there says how to load it")
        self.accelerator.end_training()

    def write(self, folder: Path) -> None:
        """Write the files of the adapter."""
        given = self.given
        dcs.save_adapter(self.transformer, folder)
        if not given.full:
            self.lora.save_pretrained(folder)
        write_model_card(
            folder,
            self.transformer,
            title=f"DiffCR for {Path(given.model).name}",
            about=f"Fine-tuned on {Path(given.data).name} at {given.size} x {given.size} pixels ({self.objective.name}).",
            base=str(given.model),
            trained=f"{'all weights' if given.full else f'LoRA, rank {given.rank}'}; {given.steps} steps",
            code=loading_code(str(given.model), self.low, not given.full, self.call(given.guidance)),
        )
        if given.full:
            dcs.restore_(self.transformer).save_pretrained(folder / "transformer")


def main() -> None:
    run = TextToImage(arguments())
    run.prepare_data()
    run.prepare_model()
    run.train()
    run.finish()


if __name__ == "__main__":
    main()
