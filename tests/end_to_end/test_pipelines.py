"""Pipelines of diffusers go on around a converted transformer as they did before: loaded from disk, and called in all their ways."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

import diffcr_surgery as dcs
from tests.pipelines import CALLS, PIPELINES, save_pipeline

REGIONS = 3
each = pytest.mark.parametrize("name", PIPELINES)
worded = pytest.mark.parametrize("name", [name for name in PIPELINES if "prompt" in CALLS[name]])


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


def config(name: str, **settings: Any) -> dcs.DiffCRConfig:
    highest = 1.0 if name.startswith("Flux") else 1000.0
    return dcs.DiffCRConfig(timestep_regions=REGIONS, timestep_range=(0.0, highest), **settings)


def convert(pipe: Any, name: str) -> Any:
    dcs.convert_(pipe.transformer, captured(pipe, name), config(name)).eval()
    return pipe


def route(pipe: Any) -> Any:
    """Give a converted pipeline ratios that differ by block and region, and routers that decide."""
    table = dcs.ratio_table(pipe.transformer)
    with torch.no_grad():
        table.copy_(torch.tensor([0.5, 0.3, 0.2, 0.6])[: len(table), None] + torch.tensor([-0.1, 0.0, 0.1]))
        for router in pipe.transformer.diffcr.routers.parameters():
            router.copy_(torch.randn(router.shape, generator=torch.Generator().manual_seed(2)))
    return pipe


@contextlib.contextmanager
def fresh(folder: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """A dense pipeline and a converted one, from the same files."""
    yield load(folder), convert(load(folder), name)


@each
def test_blocks_are_found_and_ratio_0_gives_the_same_images(name: str, folders: dict[str, Path]) -> None:
    with fresh(folders[name], name) as (dense, converted):
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
    with fresh(folders[name], name) as (dense, converted):
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
    kind = type(load(folders[name]).transformer).__name__
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["transformer"] == ["diffusers", kind]
    assert json.loads((tmp_path / "pipeline" / "transformer" / "config.json").read_text())["_class_name"] == kind
    again = load(tmp_path / "pipeline")
    assert torch.equal(draw(again, name), draw(load(folders[name]), name))
    dcs.load_adapter_(again.transformer, tmp_path / "adapter", captured(again, name))
    assert torch.equal(draw(again, name), expected)


def lora_of(folder: Path, name: str) -> tuple[dict[str, Tensor], LoraConfig]:
    """A random LoRA of a pipeline's transformer."""
    transformer = load(folder).transformer
    settings = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    transformer.add_adapter(settings)
    return get_peft_model_state_dict(transformer), settings


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("DiTPipeline", "PixArtSigmaPipeline")])  # these load no LoRA
def test_lora_is_loaded_and_unloaded_in_between(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    weights, _ = lora_of(folders[name], name)
    converted = route(convert(load(folders[name]), name))
    without = draw(converted, name)
    type(converted).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    converted.load_lora_weights(tmp_path)
    with_lora = draw(converted, name)
    assert not torch.allclose(with_lora, without, atol=1e-3)
    converted.unload_lora_weights()
    assert torch.equal(draw(converted, name), without)
    before = load(folders[name])
    before.load_lora_weights(tmp_path)
    assert torch.equal(draw(route(convert(before, name)), name), with_lora)


@worded
def test_callbacks_see_every_step(name: str, folders: dict[str, Path]) -> None:
    steps: list[int] = []

    def note(*args: Any) -> Any:
        steps.append(args[-3] if name == "PixArtSigmaPipeline" else args[1])
        return args[-1] if isinstance(args[-1], dict) else None

    how = "callback" if name == "PixArtSigmaPipeline" else "callback_on_step_end"
    draw(route(convert(load(folders[name]), name)), name, **{how: note})
    assert steps == [0, 1, 2]


@each
def test_half_precision(name: str, folders: dict[str, Path]) -> None:
    pipe = route(convert(load(folders[name], torch_dtype=torch.bfloat16), name))
    assert {parameter.dtype for parameter in pipe.transformer.diffcr.routers.parameters()} <= {torch.bfloat16, torch.float32}
    more = {key: value.to(torch.bfloat16) for key, value in CALLS[name].items() if isinstance(value, Tensor)}
    routed = draw(pipe, name, **more)
    assert routed.isfinite().all()
    dcs.specialize_(pipe.transformer)
    torch.testing.assert_close(draw(pipe, name, **more), routed, rtol=1e-2, atol=1e-2)


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
