"""The evaluation recipe: its arms are what a user would load by hand, its figures what their definitions say, its table complete."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torchvision
from diffusers import DiffusionPipeline
from matplotlib.image import imread
from parts.evaluating import Pipeline
from parts.metrics import ClipScore, distances, feature_network, train_classifier
from parts.tiny import captioned_photographs
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

import diffcr_surgery as dcs
from diffcr_surgery.demo.data import load_splits
from tests.launch import run_recipe
from tests.pipelines import clip, save_pipeline

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate.py"
CALL = {"num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Eight images with captions, and the same in two folders of classes."""
    captioned = captioned_photographs(tmp_path_factory.mktemp("data") / "captioned", 8)
    by_class = tmp_path_factory.mktemp("by_class")
    for index, path in enumerate(sorted(captioned.glob("*.png"))):
        folder = by_class / ("7", "3")[index % 2]
        folder.mkdir(exist_ok=True)
        Image.open(path).save(folder / path.name)
    return {False: captioned, True: by_class}


def subject_of(folder: Path, data: dict[bool, Path], count: int = 4) -> Pipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe, data["DiT" in type(pipe).__name__], count, CALL, seed=5)


def train(pipe: DiffusionPipeline, inputs: dict[str, Any], folder: Path, how: str) -> None:
    """Leave in a folder what training would, with random weights in place of trained ones."""
    torch.manual_seed(1)
    model = pipe.transformer
    if how == "peft":
        lora = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    elif how.startswith("lora"):
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    with torch.no_grad():
        for weight in (weight for name, weight in model.named_parameters() if how == "full" or "lora_B" in name):
            weight.add_(0.1 * torch.randn_like(weight))
    if how == "peft":
        lora.save_pretrained(folder)
    elif how == "lora of the pipeline":
        pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))
    elif how == "lora of the transformer":
        model.save_lora_adapter(folder)
    elif how == "full":
        model.save_pretrained(folder / "transformer")
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000)))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(torch.tensor([0.2, 0.6]))
        for router in model.diffcr.routers.values():
            router.weight.normal_()
    dcs.save_adapter(model, folder)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("PixArtSigmaPipeline", "peft"),
        ("PixArtSigmaPipeline", "full"),
        ("StableDiffusion3Pipeline", "lora of the pipeline"),
        ("FluxPipeline", "lora of the pipeline"),
        ("FluxPipeline", "lora of the transformer"),
        ("FluxPipeline", "full"),
        ("DiTPipeline", "peft"),
    ],
)
def test_an_arm_draws_what_the_trained_pipeline_draws(name: str, how: str, data: dict[bool, Path], tmp_path: Path) -> None:
    base = save_pipeline(name, tmp_path / "base")
    trained = subject_of(base, data)
    with dcs.capture_inputs(trained.dense) as seen:
        dense = trained.sample(trained.dense, range(4))
    train(trained.pipe, seen.inputs, tmp_path / "adapter", how)
    routed = trained.sample(dcs.specialize_(trained.dense), range(4))
    assert not torch.equal(dense, routed)

    subject = subject_of(base, data)
    arm = subject.arm("routed", tmp_path / "adapter", seen.inputs, None)
    assert arm.ratio == pytest.approx(0.4)
    torch.testing.assert_close(subject.sample(arm.model, range(4)), routed, rtol=0, atol=1e-5)
    assert torch.equal(subject.sample(subject.dense, range(4)), dense)  # the arm took nothing from the dense one
    (tmp_path / "adapter" / "diffcr.json").unlink()
    fine_tuned = subject.arm("dense, trained on", tmp_path / "adapter", seen.inputs, None)
    assert fine_tuned.ratio == 0 and not torch.equal(subject.sample(fine_tuned.model, range(4)), dense)


def test_lora_that_diffusers_cannot_load_is_refused(data: dict[bool, Path], tmp_path: Path) -> None:
    subject = subject_of(save_pipeline("DiTPipeline", tmp_path / "base"), data)
    save_file({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 16)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="diffusers loads no LoRA into a DiTTransformer2DModel; save it with peft's save_pretrained"):
        subject.arm("lora", tmp_path, {}, None)


def test_samples_do_not_depend_on_the_batch_and_classes_may_have_names(data: dict[bool, Path], tmp_path: Path) -> None:
    base = save_pipeline("DiTPipeline", tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"id2label": {"3": "dog", "7": "cat, tabby"}}))  # as published ones have it
    named = shutil.copytree(data[True], tmp_path / "named")
    (named / "7").rename(named / "cat")
    subject, numbered = subject_of(base, {True: named}), subject_of(base, data)
    assert subject.wanted(range(4))[0] == ["3", "3", "cat", "cat"] and numbered.wanted(range(4))[0] == ["3", "3", "7", "7"]
    together = subject.sample(subject.dense, range(4))
    assert torch.equal(numbered.sample(numbered.dense, range(4)), together)
    one_by_one = torch.cat([subject.sample(subject.dense, [row]) for row in range(4)])
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-5)


def evaluated(out: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *given, "--out", str(out)])
    evaluate.main()
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # matplotlib, of tensors
def test_a_table_of_all_kinds_of_arms(
    data: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_pipeline("PixArtSigmaPipeline", tmp_path / "base")
    trained = subject_of(base, data)
    with dcs.capture_inputs(trained.dense) as seen:
        trained.sample(trained.dense, range(4))
    dcs.save_adapter(dcs.convert_(trained.dense, seen.inputs), tmp_path / "untrained")
    train(subject_of(base, data).pipe, seen.inputs, tmp_path / "routed", "peft")
    tiny_clip(tmp_path / "clip")

    given = [
        "--model",
        str(base),
        "--data",
        str(data[False]),
        "--size",
        "32",
        "--steps",
        "2",
        "--samples",
        "8",
        "--batch",
        "3",
        "--rounds",
        "1",
    ]
    given += ["--adapter", f"untrained={tmp_path / 'untrained'}", "--adapter", f"DiffCR={tmp_path / 'routed'}"]
    given += ["--baseline", "dense", "token_merging", "random", "--ratio", "0.5"]
    report = evaluated(
        tmp_path / "out", monkeypatch, *given, "--features", f"clip:{tmp_path / 'clip'}", "--clip-score", str(tmp_path / "clip")
    )

    arms = {arm["arm"]: arm for arm in report["arms"]}
    assert list(arms) == ["dense", "token_merging 0.5", "random 0.5", "untrained", "DiffCR"]
    ratios = [arm["ratio"] for arm in arms.values()]
    assert ratios == pytest.approx([0, 0.5, 0.5, 0, 0.4])
    assert report["real"] == 8 and report["settings"]["ratio"] == 0.5
    dense, untrained = arms["dense"], arms["untrained"]
    assert dense["clip_score"] > 0
    assert untrained["distances"] == dense["distances"] and untrained["clip_score"] == dense["clip_score"]  # the same images, bit for bit
    assert untrained["cost"]["flops"] == dense["cost"]["flops"]
    for name in ("token_merging 0.5", "random 0.5", "DiffCR"):
        assert arms[name]["distances"]["fid"] != dense["distances"]["fid"]
        assert arms[name]["cost"]["flops"] < 0.9 * dense["cost"]["flops"] and arms[name]["cost"]["latency_ms"] > 0
        assert arms[name]["cost"]["peak_mib"] > 0 and arms[name]["distances"]["kid_subset"] == 4

    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert text in capsys.readouterr().out
    titles, _, *lines = text.split("\n\n")[0].splitlines()
    assert titles == "| arm | ratio | FID | KID × 1000 | CLIP score | GFLOPs | latency ms | speed-up | peak MiB |"
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in arms]
    assert imread(tmp_path / "out" / "samples.png")[..., :3].std() > 0.05

    dialled = evaluated(tmp_path / "dialled", monkeypatch, *given, "--features", "digits", "--budget", "0.8")
    assert {arm["arm"]: arm["ratio"] for arm in dialled["arms"]}["DiffCR"] == pytest.approx(0.2, abs=0.03)
    assert all(0 <= arm["recognised"] <= 1 for arm in dialled["arms"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "x"], "--data is missing"),
        (["--demo", "x", "--adapter", "a=b"], "--demo brings its own adapters"),
        (["--model", "x", "--data", "y", "--baseline"], "nothing to compare: give --adapter or --baseline"),
        (["--model", "x", "--data", "y", "--adapter", "out"], "--adapter out: expected NAME=DIR"),
        (["--model", "x", "--data", "y"], "--features is missing"),
        (["--demo", "x", "--samples", "3"], "--samples 3: expected at least 4"),
        ([], "one of the arguments --model --demo --smoke is required"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluated(tmp_path, monkeypatch, *given)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--adapter", "a={out}"], r"holds neither diffcr\.json nor pytorch_lora_weights\.safetensors"),
        (["--baseline", "token_merging", "--ratio", "0.9"], r"ratio 0\.9 is more than token merging can do"),
        (["--features", "inception:nowhere.pth"], r"'inception:nowhere\.pth': expected inception:PATH, clip:DIR or timm:NAME"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(
    given: list[str], message: str, data: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_pipeline("DiTPipeline", tmp_path / "base")
    given = [word.format(out=tmp_path) for word in given]
    with pytest.raises(SystemExit, match=message):
        evaluated(
            tmp_path,
            monkeypatch,
            "--model",
            str(base),
            "--data",
            str(data[True]),
            "--steps",
            "1",
            "--samples",
            "4",
            "--features",
            "digits",
            *given,
        )


def test_smoke(tmp_path: Path) -> None:
    text = run_recipe(RECIPE, "--smoke", "--out", "out", folder=tmp_path)
    arms = {arm["arm"]: arm for arm in json.loads((tmp_path / "out" / "evaluation.json").read_text())["arms"]}
    assert list(arms) == ["dense", "token_merging 0.3", "random 0.3", "uniform", "DiffCR"]
    assert [arm["ratio"] for arm in arms.values()] == pytest.approx([0, 19 / 64, 19 / 64, 0.3, 0.3], abs=1e-3)
    assert all(arm["cost"]["flops"] < 0.75 * arms["dense"]["cost"]["flops"] for name, arm in arms.items() if name != "dense")
    assert text == (tmp_path / "out" / "evaluation.md").read_text() + "\n"


def test_distances_are_what_their_definitions_say() -> None:
    real, generated = torch.randn(60, 4), torch.randn(40, 4) + 0.5
    found = distances(real, generated)
    one, other = np.cov(real.numpy().T), np.cov(generated.numpy().T)
    shift = float((real.mean(0) - generated.mean(0)).square().sum())
    assert found.fid == pytest.approx(shift + np.trace(one + other - 2 * scipy.linalg.sqrtm(one @ other)).real, rel=1e-4)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 4 + 1) ** 3

    def without_diagonal(of: Tensor) -> float:
        return float((of.sum() - of.trace()) / (len(of) * (len(of) - 1)))

    unbiased = without_diagonal(kernel(real, real)) + without_diagonal(kernel(generated, generated))
    unbiased -= 2 * float(kernel(real, generated).mean())
    assert found.kid == pytest.approx(unbiased, abs=4 * found.kid_std / 100**0.5)  # subsets are draws of it
    assert found.kid_subset == 20 and distances(real, generated) == found
    assert distances(torch.randn(2500, 2), torch.randn(3000, 2)).kid_subset == 1000
    assert distances(real, real[:30]).fid < found.fid
    with pytest.raises(ValueError, match="60 real and 3 generated images; expected at least 4 of each"):
        distances(real, real[:3])


def test_the_small_classifier_reads_digits_it_has_not_seen() -> None:
    training, held_out = load_splits(0)
    images = (held_out.images + 1) / 2
    classifier = train_classifier((training.images + 1) / 2, training.labels)
    assert float(classifier.recognised(images, held_out.labels).float().mean()) > 0.95
    assert classifier(images).shape == (297, 64)
    first, again, other = (train_classifier(images, held_out.labels, seed=seed, steps=3)(images) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_feature_networks_from_files(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 40, 40)
    inception = torchvision.models.inception_v3(weights=None, init_weights=False).eval()  # with the auxiliary head its files have
    torch.save(inception.state_dict(), tmp_path / "inception.pth")
    pooled: list[Tensor] = []
    inception.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    resized = torchvision.transforms.v2.functional.resize(
        images, [299, 299], torchvision.transforms.InterpolationMode.BICUBIC, antialias=True
    )
    with torch.no_grad():
        inception(2 * resized - 1)
        found = feature_network(f"inception:{tmp_path / 'inception.pth'}")(images)
    torch.testing.assert_close(found, pooled[0])

    network = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    assert feature_network(f"timm:test_vit:{tmp_path / 'vit.pth'}")(images).shape == (2, network.num_features)
    tiny_clip(tmp_path / "clip")
    assert feature_network(f"clip:{tmp_path / 'clip'}")(images[:, :1]).shape == (2, 12)


def tiny_clip(folder: Path, sign: float = -1.0) -> None:
    """Save a random CLIP with its tokenizer; with this seed its scores are above 0, with the other sign below."""
    torch.manual_seed(0)
    tokenizer, text = (clip(16)[name] for name in ("tokenizer", "text_encoder"))
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    model = CLIPModel(config)
    with torch.no_grad():
        model.visual_projection.weight.mul_(sign)
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_clip_score_is_that_of_the_model_behind_its_own_processor(sign: float, tmp_path: Path) -> None:
    tiny_clip(tmp_path, sign)
    images, captions = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), ["a cat", "a fox", "red snow", "a photograph", "bad", "an"]
    found = ClipScore(tmp_path, torch.device("cpu"))(images / 255, captions)
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        given = processor(text=captions, images=list(images), padding=True, return_tensors="pt")
        expected = 100 * model(**given).logits_per_image.diagonal() / model.logit_scale.exp()
    assert bool((expected * sign < 0).all()) and len(expected.round().unique()) > 3
    torch.testing.assert_close(found, expected.clamp_min(0), rtol=0, atol=1e-2)
