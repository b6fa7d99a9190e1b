"""Pipelines of diffusers go on around a converted transformer as they did before: loaded from disk, and called in all their ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

import diffcr_surgery as dcs
from tests.pipelines import CALLS, PIPELINES, save_pipeline

REGIONS = 3
each = pytest.mark.parametrize("name", PIPELINES)
worded = pytest.mark.parametrize("name", [name for name in PIPELINES if "prompt" in CALLS[name]])
WITHOUT_LORA = ("DiTPipeline", "PixArtSigmaPipeline")  # neither pipeline nor transformer loads LoRA by itself


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: save_pipeline(name, root / name) for name in PIPELINES}


def load(folder: Path, **settings: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, name: str, **more: Any) -> Tensor:
    """What the pipeline makes of its typical call, always from the same noise."""
    (images,) = pipe(**{**CALLS[name], **more}, generator=torch.Generator().manual_seed(1), output_type="pt", return_dict=False)
    return images


def captured(pipe: Any, name: str) -> dict[str, Any]:
    with dcs.capture_inputs(pipe.transformer) as seen:
        draw(pipe, name, num_inference_steps=1)
    return seen.inputs


def convert(pipe: Any, name: str) -> Any:
    # The one step of DDIM is timestep 0, and no example at 0 says where the range ends.
    timestep_range = (0.0, 1000.0) if name == "DiTPipeline" else "auto"
    plan = dcs.plan(pipe.transformer, captured(pipe, name), dcs.DiffCRConfig(timestep_regions=REGIONS, timestep_range=timestep_range))
    dcs.convert_(pipe.transformer, plan).eval()
    return pipe


def route(pipe: Any) -> Any:
    """Give a converted pipeline ratios that differ by block and region, the cleanest region dense, and routers that decide."""
    table = dcs.ratio_table(pipe.transformer)
    with torch.no_grad():
        table.copy_(torch.outer(torch.tensor([1.0, 0.6, 1.2, 0.8])[: len(table)], torch.tensor([0.0, 0.3, 0.5])))
        for router in pipe.transformer.diffcr.routers.parameters():
            router.copy_(torch.randn(router.shape, generator=torch.Generator().manual_seed(2)))
    return pipe


def both(folder: Path, name: str) -> tuple[Any, Any]:
    """A dense pipeline and a converted one, from the same files."""
    return load(folder), convert(load(folder), name)


@each
def test_blocks_are_found_and_ratio_0_gives_the_same_images(name: str, folders: dict[str, Path]) -> None:
    dense, converted = both(folders[name], name)
    plan = converted.transformer.diffcr.plan
    assert len(plan.routed_sites) == len(plan.sites) >= 3
    assert torch.equal(draw(converted, name), draw(dense, name))


def variants(name: str) -> dict[str, dict[str, Any]]:
    """The ways a pipeline is called, besides the typical one."""
    call = CALLS[name]
    found: dict[str, dict[str, Any]] = {"guided": {"guidance_scale": 5.0}, "unguided": {"guidance_scale": 1.0}}
    if name == "DiTPipeline":
        return {**found, "two images": {"class_labels": [3, 7]}}
    found["two prompts"] = {"prompt": ["a red fox", "a cat"]}
    found["two images"] = {"num_videos_per_prompt" if name == "LTXPipeline" else "num_images_per_prompt": 2}
    found["another size"] = {"height": 48, "width": 32}
    if name == "FluxFillPipeline":
        found["another size"] |= {"image": torch.zeros(1, 3, 48, 32), "mask_image": torch.ones(1, 1, 48, 32)}
        mask = call["mask_image"].clone()
        mask[..., :16] = 0
        found["another hole"] = {"mask_image": mask}
    else:
        found["negative prompt"] = {"negative_prompt": "a bad photograph", "guidance_scale": 5.0}
    if name == "FluxPipeline":  # its own guidance is an input; this is classifier-free guidance
        found["negative prompt"] = {"negative_prompt": "a bad photograph", "true_cfg_scale": 3.0}
    if name == "LTXPipeline":  # sizes are multiples of 32
        found["another size"] = {"height": 64, "width": 32}
        found["more frames"] = {"num_frames": 17}
    return found


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in PIPELINES for way in variants(name)])
def test_every_way_of_calling(name: str, way: str, folders: dict[str, Path]) -> None:
    more = variants(name)[way]
    dense, converted = both(folders[name], name)
    expected = draw(dense, name, **more)
    assert torch.equal(draw(converted, name, **more), expected)
    routed = draw(route(converted), name, **more)
    assert routed.shape == expected.shape and routed.isfinite().all() and not torch.allclose(routed, expected, atol=1e-3)
    dcs.specialize_(converted.transformer)
    torch.testing.assert_close(draw(converted, name, **more), routed, rtol=1e-5, atol=1e-5)


@each
def test_saved_and_loaded_it_gives_the_same_images(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    converted = route(convert(load(folders[name]), name))
    expected = draw(converted, name)
    dcs.save_adapter(converted.transformer, tmp_path / "adapter")
    converted.save_pretrained(tmp_path / "pipeline")
    # The files name diffusers' own classes, so whoever has them needs nothing of ours.
    dense = load(folders[name])
    kind = type(dense.transformer).__name__
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["transformer"] == ["diffusers", kind]
    assert json.loads((tmp_path / "pipeline" / "transformer" / "config.json").read_text())["_class_name"] == kind
    with safe_open(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert {key for key in weights.keys() if not key.startswith("diffcr.")} == set(dense.transformer.state_dict())
    again = load(tmp_path / "pipeline")
    assert type(again.transformer) is type(dense.transformer)
    assert torch.equal(draw(again, name), draw(dense, name))
    dcs.load_adapter_(again.transformer, tmp_path / "adapter", captured(again, name))
    assert torch.equal(draw(again, name), expected)
    dcs.specialize_(again.transformer)
    torch.testing.assert_close(draw(again, name), expected, rtol=1e-5, atol=1e-5)


def lora() -> LoraConfig:
    """Weights drawn such that they change the images."""
    torch.manual_seed(3)
    return LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in WITHOUT_LORA])
def test_lora_is_loaded_and_unloaded_in_between(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    trained = convert(load(folders[name]), name)
    trained.transformer.add_adapter(lora())
    trained.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained.transformer))

    converted = route(convert(load(folders[name]), name))
    without = draw(converted, name)
    converted.load_lora_weights(tmp_path)
    with_lora = draw(converted, name)
    assert not torch.allclose(with_lora, without, atol=1e-3)
    converted.unload_lora_weights()
    assert torch.equal(draw(converted, name), without)

    before = load(folders[name])
    before.load_lora_weights(tmp_path)
    assert torch.equal(draw(route(convert(before, name)), name), with_lora)

    dcs.specialize_(converted.transformer)
    fast = draw(converted, name)
    converted.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(converted, name), with_lora, rtol=1e-5, atol=1e-5)
    converted.unload_lora_weights()
    assert torch.equal(draw(converted, name), fast)


@pytest.mark.parametrize("name", WITHOUT_LORA)
def test_lora_wrapped_around_the_transformer_and_taken_off(name: str, folders: dict[str, Path]) -> None:
    converted = route(convert(load(folders[name]), name))
    without = draw(converted, name)
    converted.transformer = get_peft_model(converted.transformer, lora()).eval()
    with_lora = draw(converted, name)
    assert with_lora.isfinite().all() and not torch.allclose(with_lora, without, atol=1e-3)
    converted.transformer = converted.transformer.unload()
    # peft has frozen the routers with all else, and torch may multiply by a frozen weight in another order, even without gradients.
    converted.transformer.diffcr.requires_grad_(True)
    assert torch.equal(draw(converted, name), without)


@worded
def test_callbacks_see_every_step_and_change_its_latents(name: str, folders: dict[str, Path]) -> None:
    steps: list[int] = []

    def shrink(*call: Any) -> dict[str, Tensor]:
        *_, step, _, given = call
        steps.append(step)
        (given["latents"] if isinstance(given, dict) else given).mul_(0.9)
        return {}

    more = {"callback" if name == "PixArtSigmaPipeline" else "callback_on_step_end": shrink}
    dense, converted = both(folders[name], name)
    changed = draw(dense, name, **more)
    assert not torch.equal(changed, draw(dense, name))
    assert torch.equal(draw(converted, name, **more), changed)
    routed = draw(route(converted), name, **more)
    dcs.specialize_(converted.transformer)
    torch.testing.assert_close(draw(converted, name, **more), routed, rtol=1e-5, atol=1e-5)
    assert steps == [0, 1, 2] * 4


@pytest.mark.parametrize("when", ["loaded in it", "moved to it"])
@each
def test_half_precision(name: str, when: str, folders: dict[str, Path]) -> None:
    if when == "loaded in it":
        pipe = convert(load(folders[name], torch_dtype=torch.bfloat16), name)
    else:
        pipe = convert(load(folders[name]), name).to(torch.bfloat16)
    assert dcs.ratio_table(pipe.transformer).dtype == torch.float32
    more = {key: value.to(torch.bfloat16) for key, value in CALLS[name].items() if isinstance(value, Tensor)}
    dense = draw(pipe, name, **more)
    routed = draw(route(pipe), name, **more)
    assert routed.isfinite().all() and not torch.allclose(routed, dense, atol=1e-2)
    dcs.specialize_(pipe.transformer)
    torch.testing.assert_close(draw(pipe, name, **more), routed, rtol=1e-2, atol=1e-2)


@each
def test_vae_slicing(name: str, folders: dict[str, Path]) -> None:
    pipe = route(convert(load(folders[name]), name))
    more = {"class_labels": [3, 7]} if name == "DiTPipeline" else {"prompt": ["a red fox", "a cat"]}
    whole = draw(pipe, name, **more)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(draw(pipe, name, **more), whole, rtol=1e-5, atol=1e-5)


@each
def test_gradient_checkpointing(name: str, folders: dict[str, Path]) -> None:
    pipe = load(folders[name])
    inputs = captured(pipe, name)
    model = route(convert(pipe, name)).transformer.train()
    gradients = []
    for checkpointed in (False, True):
        (model.enable_gradient_checkpointing if checkpointed else model.disable_gradient_checkpointing)()
        model.zero_grad()
        torch.manual_seed(4)  # DiT drops class labels in training
        model(**{**inputs, "return_dict": False})[0].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and {"diffcr.ratio_table", "diffcr.routers.0.weight"} < plain.keys()
    torch.testing.assert_close(recomputed, plain)


@each
def test_a_pipeline_is_copied_moved_and_given_back(name: str, folders: dict[str, Path]) -> None:
    dense = load(folders[name])
    expected = draw(dense, name)
    converted = route(convert(dense, name))
    routed = draw(converted, name)
    twin = type(converted)(**{**converted.components, "transformer": copy.deepcopy(converted.transformer)})
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(draw(twin.to("cpu"), name), routed)
    dcs.restore_(converted.transformer)
    assert torch.equal(draw(converted, name), expected) and torch.equal(draw(twin, name), routed)
