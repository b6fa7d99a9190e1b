"""The main job, `python -m diffcr_surgery demo`, in its quick form: its files, and whether its figures agree."""

import json
import math
import os
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

import diffcr_surgery as dcs
from diffcr_surgery.cli import main
from diffcr_surgery.demo.data import load_splits
from diffcr_surgery.demo.measure import held_out_loss
from diffcr_surgery.demo.run import QUICK, new_denoiser

ROOT = Path(__file__).parents[2]
LIBRARIES = ("diffusers", "matplotlib", "rich", "sklearn", "timm")
KEYS = {
    "target_ratio",
    "achieved_ratio",
    "flops_dense",
    "flops_routed",
    "ideal_speedup",
    "latency_dense_ms",
    "latency_routed_ms",
    "speedup",
    "loss_dense",
    "loss_uniform",
    "loss_routed",
    "ratio_table",
    "executed_ratios",
    "device",
    "torch",
    "threads",
    "seconds",
}


# One test, so that parallel workers run the demo once. Not marked slow, though it takes about 40 seconds: a change that breaks
# the main job must not pass the default run.
def test_the_quick_demo_writes_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there"
    command = [sys.executable, "-m", "diffcr_surgery", "demo", "--quick", "--seed", "1", "--out", str(out)]
    # One thread, as every test: threads that wait for each other crawl when other workers use the cores.
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))

    check_every_figure_is_there(report)
    check_speedups_are_ratios_of_what_was_measured(report)
    check_target_is_met_by_what_is_executed(report)
    check_executed_table_is_the_learned_one_rounded(report)
    check_flops_fall_by_what_bypasses(report)
    check_losses_are_means_over_the_regions(report)
    check_pictures_show_something(out)
    check_files_give_the_trained_models_back(out, report)
    for text in ("dense", "uniform", "DiffCR", "speed-up", f"{report['loss_routed']:.4f}"):
        assert text in done.stdout


def entries(table: list[list[float]]) -> list[float]:
    return list(chain.from_iterable(table))


def check_every_figure_is_there(report: dict[str, Any]) -> None:
    assert report.keys() >= KEYS
    assert all(math.isfinite(value) for value in report.values() if isinstance(value, float))
    assert report["device"] and report["threads"] >= 1 and report["torch"] == torch.__version__
    assert report["quick"] is True and report["seed"] == 1


def check_speedups_are_ratios_of_what_was_measured(report: dict[str, Any]) -> None:
    assert report["speedup"] == pytest.approx(report["latency_dense_ms"] / report["latency_routed_ms"])
    assert report["ideal_speedup"] == pytest.approx(report["flops_dense"] / report["flops_routed"])
    assert report["latency_dense_ms"] > 0 and report["latency_routed_ms"] > 0


def check_target_is_met_by_what_is_executed(report: dict[str, Any]) -> None:
    assert report["achieved_ratio"] == pytest.approx(statistics.fmean(entries(report["executed_ratios"])))
    assert abs(report["achieved_ratio"] - report["target_ratio"]) <= 0.03
    assert report["achieved_ratio_uniform"] == pytest.approx(report["target_ratio"])


def check_executed_table_is_the_learned_one_rounded(report: dict[str, Any]) -> None:
    learned, executed = entries(report["ratio_table"]), entries(report["executed_ratios"])
    assert [len(row) for row in report["ratio_table"]] == [4] * 6
    assert all(0 <= ratio <= 0.9 + 1e-6 for ratio in learned)
    assert len(set(learned)) > 1, "the table learned nothing: all its entries are equal"
    for ratio, executed_bin in zip(learned, executed, strict=True):
        assert executed_bin == pytest.approx(round(executed_bin, 1)), "not a bin"
        assert abs(ratio - executed_bin) < 0.1 + 1e-6, "not one of the two bins around it"


def check_flops_fall_by_what_bypasses(report: dict[str, Any]) -> None:
    # Attention falls faster than the tokens do and what stands outside the blocks does not fall at all, so: about as much.
    saved = 1 - report["flops_routed"] / report["flops_dense"]
    assert saved == pytest.approx(report["achieved_ratio"], abs=0.08)
    assert report["flops_uniform"] == pytest.approx(report["flops_routed"], rel=0.1)


def check_losses_are_means_over_the_regions(report: dict[str, Any]) -> None:
    for name in ("dense", "uniform", "routed"):
        assert report[f"loss_{name}"] == pytest.approx(statistics.fmean(report[f"region_losses_{name}"]))
        assert 0 < report[f"loss_{name}"] < 1, "to predict no noise at all has loss 1"
        assert 0 <= report[f"legible_{name}"] <= 1


def check_pictures_show_something(out: Path) -> None:
    for name in ("samples.png", "ratios.png", "routing.png"):
        picture = imread(out / name)
        assert min(picture.shape[:2]) > 200, name
        assert picture[..., :3].std() > 0.05, name


def check_files_give_the_trained_models_back(out: Path, report: dict[str, Any]) -> None:
    inputs = {"x": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([0, 999]), "y": torch.tensor([3, 7])}
    adapters = {"denoiser": ("routed", "adapter"), "uniform": ("uniform", "uniform"), "dense": ("dense", None)}
    for weights, (name, adapter) in adapters.items():
        model = new_denoiser().eval()
        model.load_state_dict(load_file(out / f"{weights}.safetensors"))
        if adapter is not None:
            dcs.load_adapter_(model, out / adapter, inputs)
            if name == "routed":
                assert model.diffcr.executed_ratios().tolist() == report["executed_ratios"]
            dcs.specialize_(model)
        # The losses in the report are reproduced from the files: they are those of this very model.
        losses = held_out_loss(model, load_splits(1)[1], regions=4, per_region=QUICK.loss_timesteps, seed=3)
        assert losses == pytest.approx(report[f"region_losses_{name}"], rel=1e-3)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named_with_the_remedy(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith((f"{library}.", "diffcr_surgery.demo")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # what makes `import` say that there is no such module
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"needs {library}" in message and "pip install 'diffcr_surgery[all]'" in message
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


def test_the_command_line_itself_loads_no_extra() -> None:
    code = "import sys, diffcr_surgery.cli as cli; cli.main(['--help'])"
    after = f"finally: print('LOADED', [name for name in {LIBRARIES!r} if name in sys.modules])"
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n{after}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout and "demo" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["demo"], ["demo", "--out", "x", "--seed", "one"], ["fly"]])
def test_wrong_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: diffcr-surgery" in capsys.readouterr().err
