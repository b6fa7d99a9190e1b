"""What the recipes share: how a pipeline is read, the losses, the data on disk, flags and checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from parts.caching import PreparedData, load_captioned
from parts.calling import UnsupportedPipeline, encode_captions, read_calling
from parts.checkpoints import Checkpoints
from parts.evaluating import baseline
from parts.inpainting_measure import masked_psnr
from parts.objectives import FlowMatching, NoisePrediction, objective_of
from parts.pictures import save_image
from parts.settings import add_diffcr_flags, diffcr_config, new_parser, read_arguments
from parts.tiny import captioned_photographs, tiny_pixart
from PIL import Image
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.testing.denoisers import Architecture
from diffcr_surgery.testing.denoisers import Denoiser as DrawnDenoiser
from tests.pipelines import save_pipeline

CALL = {"height": 32, "width": 32, "guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process, and refuses others after that."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pixart(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(folder: Path) -> Any:
    found = DiffusionPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


class TestCalling:
    def test_what_training_needs_is_read_off_one_run(self, pipe: Any) -> None:
        calling = read_calling(pipe, steps=5, **CALL)
        assert calling.conditions == ("encoder_hidden_states", "encoder_attention_mask")
        assert calling.constants["return_dict"] is False and calling.constants["added_cond_kwargs"] == {
            "resolution": None,
            "aspect_ratio": None,
        }
        assert (calling.timestep_scale, calling.layout, calling.shift, calling.scale) == (1.0, None, 0.0, pipe.vae.config.scaling_factor)
        pipe.scheduler.set_timesteps(5)
        assert calling.timesteps == tuple(map(float, pipe.scheduler.timesteps)) and calling.visits(4, 1000.0) == (1.0, 1.0, 1.0, 2.0)

    @pytest.mark.parametrize(
        ("name", "conditions", "scale", "layout"),
        [
            ("StableDiffusion3Pipeline", {"encoder_hidden_states", "pooled_projections"}, 1.0, None),
            ("FluxPipeline", {"encoder_hidden_states", "pooled_projections", "guidance"}, 1e-3, "b c (h p) (w q) -> b (h w) (c p q)"),
        ],
    )
    def test_other_pipelines(self, name: str, conditions: set[str], scale: float, layout: str | None, tmp_path: Path) -> None:
        pipe = DiffusionPipeline.from_pretrained(save_pipeline(name, tmp_path))
        pipe.set_progress_bar_config(disable=True)
        calling = read_calling(pipe, steps=4, height=32, width=32, guidance_scale=1.0)
        assert set(calling.conditions) == conditions and calling.timestep_scale == pytest.approx(scale) and calling.layout == layout
        assert (calling.shift, calling.scale) == (pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor)

    def test_the_pipeline_is_left_as_it_was(self, pipe: Any) -> None:
        hooks = len(pipe.transformer._forward_hooks), len(pipe.transformer._forward_pre_hooks)
        read_calling(pipe, steps=1, **CALL)
        assert "step" not in vars(pipe.scheduler) and "decode" not in vars(pipe.vae)
        assert hooks == (len(pipe.transformer._forward_hooks), len(pipe.transformer._forward_pre_hooks))

    def test_a_scheduler_that_scales_what_the_transformer_sees_is_refused(self, pipe: Any) -> None:
        pipe.scheduler = EulerDiscreteScheduler()
        with pytest.raises(
            UnsupportedPipeline, match=r"the latents of its scheduler .* and its transformer's `hidden_states` .* are not the same"
        ):
            read_calling(pipe, steps=2, **CALL)

    def test_captions_are_encoded_without_running_the_transformer(self, pipe: Any) -> None:
        called = []
        pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: called.append(1))
        found = encode_captions(pipe, ["a cat"], **CALL)
        assert found["encoder_hidden_states"].shape == (1, 300, 16) and not called


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_model_that_predicts_the_target_recovers_the_clean_image(prediction: str) -> None:
    objective = objective_of(DPMSolverMultistepScheduler(prediction_type=prediction))
    assert isinstance(objective, NoisePrediction)
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = objective.draw(3, torch.Generator().manual_seed(1))
    assert not timesteps.is_floating_point()
    noisy, target = objective.noisy_and_target(clean, noise, timesteps.float())
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    for one in range(3):
        found = scheduler.step(target[one], int(timesteps[one]), noisy[one]).pred_original_sample
        torch.testing.assert_close(found, clean[one], rtol=1e-3, atol=1e-3)


def test_flow_matching_recovers_the_clean_image_in_one_euler_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = objective_of(scheduler)
    assert objective == FlowMatching(1000.0, 3.0)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(2)
    noisy, target = objective.noisy_and_target(clean, noise, scheduler.timesteps[1:])
    scheduler.set_begin_index(1)
    torch.testing.assert_close(scheduler.step(target, scheduler.timesteps[1], noisy).prev_sample, clean)


def test_the_shift_moves_the_median_of_the_timesteps() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = FlowMatching(1000.0, 3.0).draw(20_000, generator)
    assert float(drawn.median()) == pytest.approx(750.0, abs=5.0) and 0.0 < float(drawn.min()) and float(drawn.max()) < 1000.0


class TestPreparedData:
    @pytest.fixture
    def data(self, pipe: Any, tmp_path: Path) -> PreparedData:
        rows = load_captioned(str(captioned_photographs(tmp_path / "images", 6)), "text")
        return PreparedData(rows, "text", read_calling(pipe, steps=1, **CALL), tmp_path / "cache", "model", 32)

    def test_it_is_what_vae_and_pipeline_give(self, data: PreparedData, pipe: Any) -> None:
        data.make(pipe, Accelerator(cpu=True), **CALL)
        stream, conditions = data.batch([4, 1], [False, True], torch.Generator().manual_seed(0))
        assert stream.shape == (2, 4, 16, 16) and not stream.requires_grad
        expected = encode_captions(pipe, [data.captions[4], ""], **CALL)
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            torch.testing.assert_close(conditions[name], expected[name])

    def test_what_is_there_is_not_made_again(self, data: PreparedData, pipe: Any) -> None:
        accelerator = Accelerator(cpu=True)
        data.make(pipe, accelerator, **CALL)
        files = {path: path.stat().st_mtime_ns for path in data.folder.rglob("*.safetensors")}
        assert len(files) == 6 + 5  # four captions and the empty one
        gone = next(path for path in files if path.parent.name == "latents")
        gone.unlink()
        data.make(pipe, accelerator, **CALL)
        again = {path: path.stat().st_mtime_ns for path in data.folder.rglob("*.safetensors")}
        assert files.keys() == again.keys() and [path for path in files if files[path] != again[path]] == [gone]

    def test_a_folder_without_captions_is_refused_by_name(self, tmp_path: Path) -> None:
        folder = captioned_photographs(tmp_path / "images", 2)
        with pytest.raises(SystemExit, match=r"has the columns \['image', 'text'\], not \['caption'\]"):
            load_captioned(str(folder), "caption")


def parsed(*words: str) -> argparse.Namespace:
    parser = new_parser("A recipe.")
    parser.add_argument("--names", nargs="+", default=[])
    add_diffcr_flags(parser, target_ratio=0.2, regions=4)
    return read_arguments(parser, words)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("target-ratio: 0.4\nregions: 2\nuniform: false\nnames: [a, b c]\ncost: flops\n", encoding="utf-8")
    given = parsed("--config", str(file), "--regions", "8")
    assert (given.target_ratio, given.regions, given.uniform, given.names, given.cost) == (0.4, 8, False, ["a", "b c"], "flops")
    config = diffcr_config(given, timestep_range=(0, 1000))
    assert (config.target_ratio, config.timestep_regions, config.branches, config.cost) == (0.4, 8, "boundary", "flops")


def test_a_wrong_setting_in_the_file_is_an_error_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("target-ration: 0.3\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        parsed("--config", str(file))
    assert "unrecognized arguments: --target-ration 0.3" in capsys.readouterr().err


def test_uniform_is_mixture_of_depths() -> None:
    config = diffcr_config(parsed("--uniform", "--target-ratio", "0.3"), timestep_range=(0, 1000))
    assert (config.initial_ratio, config.learn_ratios, config.timestep_regions) == (0.3, False, 1)


def test_checkpoints_keep_the_newest_and_only_what_is_trained(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model[1].parameters(), lr=0.1))
    checkpoints = Checkpoints(accelerator, tmp_path, keep=2)
    assert checkpoints.resume() == 0
    for step in (2, 4, 6):
        prepared(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        checkpoints.save(step)
    kept = model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight.zero_()
    assert checkpoints.resume() == 6 and torch.equal(model[1].weight, kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]
    assert (tmp_path / "step-6" / "trained.safetensors").stat().st_size < 300 and not list(tmp_path.rglob("model*.safetensors"))


class Block(nn.Module):
    """Is told how many tokens it has, or -1 for as many as come."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, count: int) -> Tensor:
        x = x.reshape(len(x), count, 8)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Denoiser(nn.Module):
    """Two blocks on the image, with registers before it or the number of its tokens beside it."""

    def __init__(self, registers: int) -> None:
        super().__init__()
        self.blocks, self.registers = nn.ModuleList(Block() for _ in range(2)), nn.Parameter(torch.randn(1, registers, 8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        registers = self.registers.shape[1]
        stream = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1) if registers else x
        for block in self.blocks:
            stream = block(stream, -1 if registers else x.shape[1])
        return stream[:, registers:]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("name", ["random", "token_merging"])
def test_what_baselines_cannot_shorten_is_refused_by_name(name: str, registers: int) -> None:
    model = Denoiser(registers).eval().requires_grad_(False)
    plan = dcs.plan(model, {"x": torch.randn(2, 16, 8), "timestep": torch.tensor([3.0, 4.0])})
    assert len(plan.routed_sites) == 2
    assert bool(plan.routed_sites[0].staying) == bool(registers) and ("count" in plan.routed_sites[0].aligned) == (not registers)
    with pytest.raises(ValueError, match=rf"--baseline {name}: blocks\.0 "):
        baseline(name, model, plan, 0.3, seed=0)
    assert baseline("dense", model, plan, 0.3, seed=0).model is model


def test_a_stream_with_tokens_first_is_none_that_baselines_know() -> None:
    model = DrawnDenoiser(Architecture(layout="n b c"), 0)
    plan = dcs.plan(model, {"latent": torch.randn(2, 5, 4)})
    with pytest.raises(ValueError, match=r"--baseline random: blocks\.0 .*`b n c`"):
        baseline("random", model, plan, 0.3, seed=0)


def test_psnr_counts_only_what_the_mask_shows() -> None:
    reference = torch.rand(2, 3, 8, 8)  # of images in [-1, 1], whose peak is 2
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4], mask[1, :, :, 2:3] = 1, 1
    images = torch.rand(2, 3, 8, 8)  # outside the mask anything may be
    images = torch.where(mask.bool(), reference + torch.tensor([0.2, 0.02])[:, None, None, None], images)
    assert masked_psnr(images, reference, mask).tolist() == pytest.approx([20, 40], abs=1e-2)
    with pytest.raises(ValueError, match="A mask is empty"):
        masked_psnr(images, reference, torch.zeros(2, 1, 8, 8))


def test_saved_images_are_those_of_a_pipeline(tmp_path: Path) -> None:
    """Halves between two grey levels too, which other savers round up."""
    image = (torch.arange(3 * 5 * 17).reshape(3, 5, 17) + 0.5) / 255
    (wanted,) = VaeImageProcessor().postprocess(image[None], output_type="pil", do_denormalize=[False])
    save_image(image, tmp_path / "image.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), np.asarray(wanted))
