"""The inpainting recipe as a user runs it: on the bundled photographs, on a folder and in latents, by two processes, and started again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import inpainting
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from parts.inpainting_model import Inpainter
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs

import diffcr_surgery as dcs
from tests.launch import TWO_PROCESSES, run_recipe

RECIPE = Path(inpainting.__file__)
WEIGHTS = {"pretrained.safetensors", "dense.safetensors", "routed.safetensors"}
LEFT = {"comparison.png", "cost.png", "ratios.png", "report.json", "routed", "checkpoints", "logs", *WEIGHTS}


def run(out: Path, *arguments: str, launch: tuple[str, ...] = ()) -> str:
    return run_recipe(RECIPE, "--smoke", "--out", str(out), *arguments, folder=out.parent, launch=launch)


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    text = run(out)
    assert "VisionTransformer: 2 of 2 blocks routed; target ratio 0.5," in text and "Decoder: 2 of 2 blocks routed" in text
    return out


def test_it_leaves_everything_a_user_needs(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == LEFT
    for name in ("comparison.png", "cost.png", "ratios.png"):
        with Image.open(trained / name) as picture:
            assert min(picture.size) > 100
    for name in ("pretrained", "dense", "routed"):
        assert list((trained / "logs" / name).rglob("events.out.tfevents*"))


def test_the_report(trained: Path) -> None:
    found = report(trained)
    assert found["decoder_ratio"] == pytest.approx(0.3, abs=0.02) and found["encoder_ratio"] == pytest.approx(0.5)
    assert len(found["decoder_ratios_learned"]) == 2 and len(found["decoder_ratios_learned"][0]) == 10
    psnr = found["masked_psnr"]
    assert found["masked_psnr_difference"] == pytest.approx(psnr["routed"] - psnr["dense"], abs=1e-3)
    assert all(len(found["loss_by_region"][name]) == 10 for name in ("dense", "routed"))
    assert [row["hole"] for row in found["cost_by_hole"]] == [13, 19, 26, 32]


def test_the_cost_follows_the_hole(trained: Path) -> None:
    rows = report(trained)["cost_by_hole"]
    dense = [row["flops_dense"] for row in rows]
    assert dense == sorted(dense) and 2 < dense[3] / dense[0] < 3  # of 32 tokens over 13; the timestep's embedding is the same for all
    assert all(row["flops_routed"] < row["flops_dense"] for row in rows[1:])


def test_the_result_loads_as_any_adapter_does(trained: Path) -> None:
    sizes = {"width": 16, "encoder_depth": 2, "decoder_depth": 2, "heads": 2}
    model = Inpainter(channels=3, size=32, patch=4, **sizes)
    model.load_state_dict(load_file(trained / "routed.safetensors"))
    dcs.load_adapter_(model.encoder, trained / "routed" / "encoder", (torch.randn(2, 4, 32, 32),))
    places = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]])
    inputs = {"tokens": torch.randn(2, 4, 48), "context": torch.randn(2, 4, 16), "places": places, "timestep": torch.tensor([0, 999])}
    dcs.load_adapter_(model.decoder, trained / "routed" / "decoder", inputs)
    learned = torch.tensor(report(trained)["decoder_ratios_learned"])
    torch.testing.assert_close(dcs.ratio_table(model.decoder).detach(), learned)


def test_a_run_that_was_stopped_goes_on_and_ends_alike(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained / "checkpoints" / "pretrained", again / "checkpoints" / "pretrained")
    shutil.copytree(trained / "checkpoints" / "routed" / "step-5", again / "checkpoints" / "routed" / "step-5")
    run(again)
    for name in ("dense", "routed"):
        first, second = (load_file(out / f"{name}.safetensors") for out in (trained, again))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert report(again)["masked_psnr"] == report(trained)["masked_psnr"]


def test_two_processes(trained: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", launch=TWO_PROCESSES)
    found = report(tmp_path / "out")
    assert found["decoder_ratio"] == pytest.approx(0.3, abs=0.02)
    assert found["loss"] != report(trained)["loss"]  # twice as many crops a step


@pytest.mark.slow
def test_a_folder_of_ones_own_in_the_latents_of_an_autoencoder_from_given_weights(tmp_path: Path) -> None:
    folder = tmp_path / "photographs" / "some"
    folder.mkdir(parents=True)
    for name in ("chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).resize((90, 60)).save(folder / f"{name}.jpg")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        norm_num_groups=4, latent_channels=4)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    given = ("--data", str(folder.parent), "--vae", str(tmp_path / "vae"))
    run(tmp_path / "first", *given)
    run(tmp_path / "second", *given, "--from", str(tmp_path / "first" / "pretrained.safetensors"))
    assert {path.name for path in (tmp_path / "second" / "checkpoints").iterdir()} == {"dense", "routed"}
    assert [row["hole"] for row in report(tmp_path / "second")["cost_by_hole"]] == [3, 5, 6, 8]


def test_the_large_configuration_in_the_help_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{" + str(inpainting.__doc__).partition("{")[2].partition("}")[0] + "}"
    (tmp_path / "large.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["inpainting.py", "--config", str(tmp_path / "large.yaml"), "--out", str(tmp_path)])
    given = inpainting.arguments()
    assert {name: getattr(given, name.replace("-", "_")) for name in yaml.safe_load(text)} == yaml.safe_load(text)


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["inpainting.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        inpainting.arguments()
    text = capsys.readouterr().out
    assert "make it a DiffCR model" in text and "held-out crops to fill" in text and "(default: 0.3)" in text
