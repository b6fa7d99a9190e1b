"""`python -m diffcr_surgery bench` on a short DiT-XL/2: its files, and whether its figures agree. Nothing here looks at how fast it was."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from matplotlib.image import imread

import diffcr_surgery as dcs
from diffcr_surgery.bench.hooks import Limit, attach
from diffcr_surgery.bench.measure import achieved_ratio
from diffcr_surgery.bench.models import FAMILIES
from diffcr_surgery.bench.run import BASELINE
from diffcr_surgery.bench.sides import build_sides, load_merging, share
from diffcr_surgery.cli import main
from diffcr_surgery.flops import count_flops

SMALL = ["bench", "--model", "dit-xl-2", "--layers", "2", "--rounds", "2"]
COLUMNS = (
    "side",
    "ratio requested",
    "achieved",
    "latency ms (median)",
    "IQR ms",
    "speed-up over dense",
    "share of the limit's speed-up",
    "share of the FLOPs ideal",
    "peak MiB",
)


def test_the_bench_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "not" / "there"
    arguments = [*SMALL, "--tokens", "64", "--ratio", "0.8", "0.3", "--break-even", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    table = (out / "table.md").read_text(encoding="utf-8")

    check_head(report, table)
    check_sides(report, table)
    check_speed_ups_come_from_the_latencies(report)
    check_break_even(report, table)
    assert table.strip() in printed.out
    assert "token merging at 0.8 is missing: ratio 0.8 is more than token merging can do" in printed.err
    assert "token merging at 0.8 is missing" in table
    picture = imread(out / "latency.png")
    assert picture.std() > 0.05 and min(picture.shape[:2]) > 300


def check_head(report: dict[str, Any], table: str) -> None:
    assert (report["model"], report["layers"], report["shortened"], report["tokens"], report["batch"]) == ("dit-xl-2", 2, True, 64, 1)
    assert report["dtype"] == "float32" and report["compile"] is False and report["torch"] == torch.__version__
    assert report["device_name"] and report["threads"] == torch.get_num_threads()
    assert "dit-xl-2 (shortened: 2 of 28 layers), 64 tokens, batch 1, float32, eager" in table
    assert report["routing_share"].keys() == {"0.3", "0.8"} and all(0 < share < 10 for share in report["routing_share"].values())
    assert all(f"{share:.1%}".replace("%", " %") + f" at {ratio}" in table for ratio, share in report["routing_share"].items())
    assert report["identical_at_0"] is True and "bit for bit: yes" in table


def check_sides(report: dict[str, Any], table: str) -> None:
    rows = {(row["side"], row["ratio"]): row for row in report["sides"]}
    wanted = [("dense", 0), ("routed", 0)]
    wanted += [("routed", 0.3), ("limit", 0.3), ("token merging", 0.3), ("routed", 0.8), ("limit", 0.8)]
    assert list(rows) == wanted
    for (_, ratio), row in rows.items():
        kept = {0: 64, 0.3: 45, 0.8: 13}[ratio]  # ⌈(1 - ratio) · 64⌉
        assert row["achieved"] == pytest.approx(1 - kept / 64)
        assert row["peak_bytes"] > 0 and len(row["latencies_ms"]) == report["rounds"] == 2
        assert row["flops"] <= rows["dense", 0]["flops"]
    assert rows["routed", 0]["flops"] == rows["dense", 0]["flops"]
    for ratio in (0.3, 0.8):
        ideal = rows["dense", 0]["flops"] / rows["routed", ratio]["flops"]
        assert report["ideal_speed_up"][f"{ratio:g}"] == pytest.approx(ideal)
        assert rows["limit", ratio]["flops"] < rows["routed", ratio]["flops"]  # by the routers
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert tuple(cell.strip() for cell in lines[0].strip("|").split("|")) == COLUMNS
    assert len(lines) == 2 + len(wanted) + 2  # one ideal for each ratio
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}


def check_speed_ups_come_from_the_latencies(report: dict[str, Any]) -> None:
    dense, *others = report["sides"]
    limits = {row["ratio"]: row["speed_up"] for row in others if row["side"] == "limit"}
    for row in others:
        quotients = [a / b for a, b in zip(dense["latencies_ms"], row["latencies_ms"], strict=True)]
        assert row["speed_up"] == pytest.approx(statistics.median(quotients))
        assert row["latency_ms"] == pytest.approx(statistics.median(row["latencies_ms"]))
        assert row["share_of_ideal"] == pytest.approx(row["speed_up"] / report["ideal_speed_up"][f"{row['ratio']:g}"])
        expected = row["speed_up"] / limits[row["ratio"]] if row["ratio"] else None
        assert row["share_of_limit"] == (pytest.approx(expected) if expected else None)


def check_break_even(report: dict[str, Any], table: str) -> None:
    assert report["break_even"].keys() == {"0.3", "0.8"}
    for ratio, found in report["break_even"].items():
        assert list(found["speed_ups"]) == ["16", "64"]
        faster = [int(tokens) for tokens, speed_up in found["speed_ups"].items() if speed_up > 1]
        assert found["tokens"] == (faster[0] if faster else None)
        assert f"Break-even at ratio {ratio}: {f'{faster[0]} tokens' if faster else 'none up to 64'} (" in table


def test_without_the_baseline_the_column_is_missing_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere.py"
    arguments = [*SMALL, "--layers", "1", "--tokens", "16", "--ratio", "0.5", "--baseline", str(nowhere), "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = f"token merging is missing: there is no file {nowhere}."
    assert said in capsys.readouterr().err and said in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert {row["side"] for row in json.loads((tmp_path / "report.json").read_text())["sides"]} == {"dense", "routed", "limit"}


def test_without_a_ratio_above_0_nothing_is_said_of_routing(tmp_path: Path) -> None:
    assert main([*SMALL, "--layers", "1", "--tokens", "16", "--ratio", "0", "--break-even", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "against the time of their blocks" not in table and "Routed at 0 gives what dense gives, bit for bit: yes." in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "200"], "--tokens 200: the image is square, so expected a square number of at least 4, such as 256 or 1024."),
        (["--tokens", "1"], "--tokens 1: the image is square"),
        (["--ratio", "0.95"], "--ratio 0.95: expected shares of tokens that bypass, between 0 and 0.9."),
        (["--ratio", "-0.1"], "--ratio -0.1: expected shares"),
        (["--model", "sana"], "--model sana: expected one of dit-xl-2, pixart-sigma, sd3-medium, flux-dev."),
        (["--rounds", "0"], "--rounds 0: expected at least 1."),
        (["--batch", "0"], "--batch 0: expected at least 1."),
        (["--layers", "0"], "--layers 0: expected at least 1."),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch finds no CUDA device here; use --device cpu.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    assert main([*SMALL, "--tokens", "16", "--ratio", "0.5", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    assert main([*SMALL, "--tokens", "16", "--ratio", "0.5", "--out", str(tmp_path / "taken")]) == 2
    assert f"cannot write to --out {tmp_path / 'taken'}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that no one can write to")
def test_a_folder_that_takes_no_files_is_an_error_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tokens", "16", "--ratio", "0.5", "--out", "/proc"]) == 2
    assert "cannot write to --out /proc" in capsys.readouterr().err


def small_flux() -> torch.nn.Module:
    return FluxTransformer2DModel(
        num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=True
    ).eval()


def small_sd3() -> torch.nn.Module:
    widths = {"caption_projection_dim": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    return SD3Transformer2DModel(sample_size=12, num_layers=2, num_attention_heads=2, attention_head_dim=8, **widths).eval()


# Narrow models of two real classes: text beside the image, rotary tables shared by the batch, blocks that return two streams.
@pytest.mark.parametrize(("name", "make"), [("flux-dev", small_flux), ("sd3-medium", small_sd3)])
@torch.no_grad()
def test_all_sides_of_a_model_with_text(name: str, make: Any) -> None:
    model, inputs = make(), FAMILIES[name].inputs(2, 6) | {"return_dict": False}
    merging, missing = load_merging(BASELINE)
    sides, plan, notes = build_sides(model, inputs, [0.5], merging)
    assert not missing and not notes and [side.name for side in sides] == ["dense", "routed", "routed", "limit", "token merging"]
    weights = {id(parameter) for parameter in model.parameters()}
    outputs, flops = [], []
    for side in sides:
        assert {id(p) for n, p in side.model.named_parameters() if not n.startswith("diffcr.")} == weights  # one set for all
        outputs.append(side.model(**inputs)[0])
        assert achieved_ratio(side.model, plan, lambda side=side: side.model(**inputs)) == pytest.approx(side.ratio)
        flops.append(count_flops(lambda side=side: side.model(**inputs)))
    dense, at_0, *shorter = outputs
    assert torch.equal(dense, at_0)
    assert all(x.shape == dense.shape and x.isfinite().all() and not torch.equal(x, dense) for x in shorter)
    assert flops[0] == flops[1] and all(count < flops[0] for count in flops[2:])


@torch.no_grad()
def test_the_limit_runs_the_blocks_on_the_first_tokens_and_the_head_on_all() -> None:
    model, inputs = small_flux(), FAMILIES["flux-dev"].inputs(1, 6) | {"return_dict": False}
    plan = dcs.plan(model, inputs)
    attach(twin := share(model), plan, Limit(plan, 0.5))
    seen: list[tuple[int, int]] = []
    for block in (*twin.transformer_blocks, *twin.single_transformer_blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["hidden_states"].shape[1], len(kwargs["image_rotary_emb"][0]))), with_kwargs=True
        )
    whole = twin(**inputs)[0]
    assert seen == [(18, 512 + 18)] * 5  # text keeps its places in the rotary tables
    alone = {**inputs, "hidden_states": inputs["hidden_states"][:, :18], "img_ids": inputs["img_ids"][:18]}
    torch.testing.assert_close(whole[:, :18], model(**alone)[0])
    assert whole.shape[1] == 36
    assert not model.transformer_blocks[0]._forward_hooks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_sides_are_not_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcr_surgery.bench import run

    outputs: list[torch.Tensor] = []

    def keep(calls: Any, rounds: int, cuda: bool) -> list[list[float]]:
        outputs.extend(call()[0].clone() for call in calls)
        return [[1.0]] * len(calls)

    monkeypatch.setattr(run, "seconds_in_turns", keep)
    assert main([*SMALL, "--layers", "1", "--tokens", "16", "--ratio", "0.5", "--compile", "--out", str(tmp_path)]) == 0
    dense, at_0, routed, limit, merged = outputs
    torch.testing.assert_close(dense, at_0)
    shorter = {"routed": routed, "limit": limit, "token merging": merged}
    for name, output in shorter.items():  # the compiler reuses a graph where it sees no difference, and it overlooks hooks
        assert (output - dense).abs().max() > 1e-3, name
    assert json.loads((tmp_path / "report.json").read_text())["compile"] is True
