"""The study's parts: which experiments there are, what tells them apart, and what its report says of records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from study import arms, experiment
from study.arms import ARMS, Experiment, chosen
from study.experiment import SIZES, Record, key_of
from study.report import FID, LOG_LOSS, LOSS, Records, Spread, difference, variant_table, write_report
from study.runner import read_records
from study.tasks import PARTS, Task, draw, part_timesteps, task_named
from study.training import OwnRule, Schedule, train

import diffcr_surgery as dcs
from diffcr_surgery.ratios import Budget
from tests.small import LAYERS, REGIONS, converted, give

BOTH = ("digits", "photographs")


def record(task: str, arm: str, target: float, seed: int, loss: float, **more: Any) -> Record:
    """What an experiment leaves."""
    table = [[0.0, 0.2], [0.4, 0.6]]
    key = key_of(Experiment(task, arm, target, seed), "small")
    found = {"key": key, "task": task, "arm": arm, "target": target, "seed": seed, "size": "small", "base": "x"}
    found |= {"losses": [loss] * PARTS, "loss": loss, "distances": {"fid": 10 * loss, "kid": loss / 100, "kid_std": 0.0, "kid_subset": 500}}
    found |= {"accuracy": 0.9, "psnr": None if task == "digits" else 20.0, "ratio": target, "flops_share": 1 - target, "latency_share": 0.9}
    found |= {"train_seconds": 60.0, "seconds": 90.0, "device": "a processor", "torch": "2", "table": table, "executed": table}
    return found | {"trained_share": 0.7, "routing": [["01" * 128] * 2] * 2} | more


def test_patterns_choose_experiments() -> None:
    everything = chosen(["*"], arms.SEEDS)
    assert len(everything) == len(set(everything)) == 2 * len(arms.SEEDS) * sum(len(arm.targets) for arm in ARMS.values())
    assert [e.seed for e in everything] == sorted(e.seed for e in everything), "a seed is finished before the next"
    assert chosen(["photographs/dense/*"], [7]) == [Experiment("photographs", "dense", 0.0, 7)]
    assert chosen(["nothing"], [7]) == []


def test_keys_change_with_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Experiment("digits", "regions-4", 0.3, 11)
    key, others = key_of(one, "small"), [replace(one, seed=12), replace(one, target=0.5), replace(one, task="photographs")]
    assert len({key, key_of(one, "smoke"), *(key_of(other, "small") for other in others)}) == 5
    monkeypatch.setitem(ARMS, one.arm, replace(ARMS[one.arm], title="by another name"))
    assert key_of(one, "small") == key
    monkeypatch.setitem(ARMS, one.arm, replace(ARMS[one.arm], settings={"timestep_regions": 5}))
    assert key_of(one, "small") != key
    monkeypatch.setitem(ARMS, one.arm, replace(ARMS[one.arm], settings={"timestep_regions": 4}))
    monkeypatch.setitem(SIZES, "small", replace(SIZES["small"], steps=1))
    assert key_of(one, "small") != key
    smoke = key_of(one, "smoke")
    monkeypatch.setattr(experiment, "VERSION", -1)
    assert key_of(one, "smoke") != smoke


def test_a_library_default_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that arms leave to the library are part of what was run."""
    one = Experiment("digits", "uniform", 0.3, 11)
    key, config = key_of(one, "small"), ARMS["uniform"].config(0.3)
    monkeypatch.setattr(arms.Arm, "config", lambda self, target: replace(config, gate="sigmoid"))
    assert key_of(one, "small") != key


@pytest.mark.parametrize("name", BOTH)
def test_tasks_fit_their_denoisers(name: str) -> None:
    task: Task = task_named(name)
    model = task.new_denoiser(16, 2, 2)
    batch = task.training[:2]
    out = model(x=batch.clean, timestep=torch.tensor([0, 999]), **batch.known)
    assert out.shape == batch.clean.shape
    assert 0.3 < float(task.training.clean[task.training.counts.expand_as(task.training.clean) > 0].std()) < 1.5
    plan = dcs.plan(model, {"x": batch.clean, "timestep": torch.tensor([0, 999]), **batch.known}, ARMS["regions-4"].config(0.3))
    assert [site.tokens for site in plan.routed_sites] == [256, 256]
    wanted = task.wanted(8)
    perfect = task.judge(wanted.clean if name == "photographs" else task.training.clean[:8], wanted)
    assert (perfect.psnr is None) == (name == "digits") and (perfect.psnr is None or perfect.psnr > 40)


@pytest.mark.parametrize("target", arms.TARGETS)
def test_a_shallower_model_costs_what_the_others_do(target: float) -> None:
    task = task_named("digits")
    call = experiment.call_of(task.held_out[:1], 500)
    counted = []
    for arm in ("uniform", "shallow"):
        model: Any = task.new_denoiser(64, 6, 2)
        plan = dcs.plan(model, call, dcs.DiffCRConfig(cost="flops", bins=arms.BINS))
        if arm == "uniform":
            dcs.convert_(model, call, ARMS[arm].config(target))
        else:
            budget = Budget.of(plan.config, torch.tensor(plan.site_costs))
            assert target < experiment._leave_out(model, call, budget, target) < target + 0.15
            assert len(model.blocks) == {0.2: 5, 0.3: 4, 0.5: 3}[target]
        dcs.specialize_(model.eval())
        counted.append(experiment._flops(model, call))
    assert counted[0] == pytest.approx(counted[1], rel=0.01)


def test_every_batch_lies_in_one_region_of_each_arm() -> None:
    assert sorted(t for part in range(PARTS) for t in part_timesteps(part)) == list(range(1000))
    for arm in ARMS.values():
        regions = arm.settings.get("timestep_regions", 1)
        assert all(len({t * regions // 1000 for t in part_timesteps(part)}) == 1 for part in range(PARTS))


def test_equal_seeds_show_every_model_the_same() -> None:
    task = task_named("digits")
    seen: list[list[torch.Tensor]] = []
    for _ in range(2):
        model = task.new_denoiser(8, 1, 1)
        seen.append([])
        model.register_forward_pre_hook(lambda module, args, kwargs: seen[-1].append(kwargs["x"]), with_kwargs=True)
        train(task, model, Schedule(3, 2, 1e-3), seed=5)
    assert len(seen[0]) == 3 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_relative_gradients_do_not_know_how_large_losses_are() -> None:
    """A part of the timestep range whose loss and gradients are a thousandth of the others' moves the table as if they were not."""
    tables = []
    for scale in (1.0, 1e-3):
        model, source = converted(), torch.Generator().manual_seed(0)
        rule = OwnRule(model, 20, True, {"settle": 0.0})
        for step in range(20):
            part, size = (2, scale) if step % 2 else (17, 1.0)
            gradient = torch.zeros(LAYERS, REGIONS)
            gradient[:, part // 5] = size * (torch.linspace(-1, 1, LAYERS) + torch.randn(LAYERS, generator=source))
            give(model, gradient)
            rule.step(torch.tensor(size * (2 + torch.rand(1, generator=source).item())), part)
        assert dcs.ratio_table(model).grad is None
        tables.append(dcs.ratio_table(model).detach())
    assert tables[0].std() > 0.05 and torch.allclose(*tables, atol=1e-5)


def test_records_survive_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    path.write_text('{"key": "a"}\n{"key": "b"', encoding="utf-8")
    assert read_records(path) == [{"key": "a"}]


def test_differences_are_taken_within_seeds() -> None:
    losses = {"uniform": (0.5, 0.7, 0.9), "regions-4": (0.4, 0.6, 0.8)}
    found = Records([record("digits", arm, 0.3, seed, loss) for arm, row in losses.items() for seed, loss in enumerate(row)])
    apart = difference(found, LOSS, "digits", 0.3, "regions-4", "uniform")
    assert apart is not None and apart.mean == pytest.approx(-0.1) and apart.error == pytest.approx(0, abs=1e-12) and apart.seeds == 3
    spread = found.spread("digits", "uniform", 0.3, FID)
    assert spread is not None and (spread.mean, spread.error) == (pytest.approx(7.0), pytest.approx(2 / 3**0.5))
    assert difference(found, LOSS, "digits", 0.5, "regions-4", "uniform") is None


@pytest.mark.parametrize("sign", [-1, 1])
def test_how_sure_a_difference_is(sign: int) -> None:
    values = {
        (0.1, 0.1, 0.1): (True, True),
        (0.10, 0.11, 0.12): (True, True),
        (0.1, 0.2, 0.3): (True, False),
        (0.1, 0.2, 0.7): (False, False),
    }
    for given, expected in values.items():
        spread = Spread.of([sign * value for value in given])
        assert (spread.beyond(2), spread.sure) == expected, f"{abs(spread.mean) / max(spread.error, 1e-9)} standard errors"
    for nothing in (Spread.of([sign * 0.1]), Spread.of([0.0, 0.0])):
        assert not nothing.beyond(2) and not nothing.sure, "one seed tells nothing"


def test_a_report_is_on_one_size() -> None:
    with pytest.raises(SystemExit, match="sizes small, smoke"):
        Records([record("digits", "uniform", 0.3, 0, 0.5), record("digits", "layers", 0.3, 0, 0.5, size="smoke")])


def test_an_arm_without_its_counterpart_is_not_compared() -> None:
    found = Records([record("digits", "two", 0.3, 1, 0.5), record("digits", "regions-4", 0.3, 2, 0.5)])
    assert variant_table(found, "digits").count("\n") == 1, "head and rule alone"


def test_arms_of_different_dense_models_are_not_compared() -> None:
    with pytest.raises(SystemExit, match=r"\('digits', 0\).*start from different dense models"):
        Records([record("digits", "uniform", 0.3, 0, 0.5), record("digits", "layers", 0.3, 0, 0.5, base="y")])


def test_the_report(tmp_path: Path) -> None:
    rows = [record(task, "dense", 0.0, seed, 0.4) for task in BOTH for seed in (1, 2)]
    losses = {"uniform": 0.6, "regions-4": 0.5, "merging": 0.8, "layers": 0.55, "two": 0.52, "layers-two": 0.52}
    rows += [
        record(task, arm, target, seed, loss + seed / 1000)
        for task in BOTH for arm, loss in losses.items() for target in ARMS[arm].targets for seed in (1, 2)
    ]  # fmt: skip
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_report(path, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    planned = chosen(["*"], [1, 2])
    assert f"{len(rows)} of {len(planned)} experiments of size small, seeds 1, 2, on a processor" in text and "6 blocks, 64 wide" in text
    assert "Missing are 12 of `random-free`, 12 of `merging-free`, 12 of `random`," in text and "of `two`" not in text
    assert "12.7 standard errors for 2 seeds;" in text and "trained ones differ by up to 0.0%" in text
    assert "16 × 16, each pixel a token" in text and "from the right 30 % of the same photographs" in text
    assert "| held-out loss | digits, 0.2 | digits, 0.3 | digits, 0.5 | photographs, 0.2 |" in text
    assert f"| uniform (Mixture-of-Depths) |{' 0.6015 ± 0.0005 |' * 6}" in text and "| two branches |  0.5215" not in text
    above = [LOG_LOSS.shown(Spread.of([math.log((0.6 + x) / 0.4) for x in (0.001, 0.002)]), "+")] * 6
    assert f"| uniform (Mixture-of-Depths) | {' | '.join(above)} |" in text and above[0] == "+0.408 ± 0.001"
    assert f"| DiffCR-LT, 4 regions |{' 5.015 ± 0.005 |' * 6}" in text, "FID"
    assert f"| held-out loss, difference |{''.join(f' {task}, {target} |' for task in BOTH for target in (0.2, 0.3, 0.5))}" in text
    assert f"| DiffCR-LT, 4 regions − uniform (Mixture-of-Depths) |{' **-0.1000 ± 0.0000** |' * 6}" in text
    assert f"| DiffCR-LT, 4 regions − DiffCR-L |{' **-0.0500 ± 0.0000** |' * 6}" in text and "relative gradients −" not in text
    assert "| two branches | DiffCR-LT, 4 regions | 1.00× | 0.700 ± 0.000 | +0.0200 ± 0.0000 |" in text
    assert "| two branches | DiffCR-L | 1.00× | 0.700 ± 0.000 | -0.0300 ± 0.0000 |" in text
    pictures = {"overview", "timesteps"} | {f"{task}_{name}" for task in BOTH for name in ("trade_off", "tables", "routing")}
    for name in pictures:
        assert f"(pictures/{name}.png)" in text and (tmp_path / "pictures" / f"{name}.png").stat().st_size > 1000


def test_records_of_other_settings_are_left_out(tmp_path: Path) -> None:
    rows = [
        record("digits", "uniform", 0.3, 1, 0.4),
        record("digits", "layers", 0.3, 1, 0.3, key="of a year ago"),
        record("digits", "uniform", 0.3, 1, 0.5),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_report(path, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    planned = len(chosen(["*"], [1]))
    assert f"1 of {planned} experiments of size" in text
    assert "2 records of other settings, or of experiments run again, are left out." in text
    assert "0.5000" in text and "0.4000" not in text and "0.3000" not in text


def test_what_lies_around_a_hole_is_denoised_from_what_training_has_shown() -> None:
    """Predictions there are of no one's making, so they are not followed."""
    task = task_named("photographs")
    wanted, seen = task.wanted(2), []

    class Wild(torch.nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, **known: Any) -> torch.Tensor:
            seen.append((int(timestep[0]), x))
            return 10.0 * torch.ones_like(x)

    draw(task, Wild(), wanted, steps=PARTS, seed=3, batch=2)
    noise = torch.randn(wanted.clean.shape, generator=torch.Generator().manual_seed(3))
    outside = (wanted.counts == 0).expand_as(noise)
    for timestep, x in seen:
        shown, _ = task.objective.noisy_and_target(torch.zeros_like(noise), noise, torch.tensor([timestep] * 2))
        assert torch.allclose(x[outside], shown[outside], atol=1e-6)
    assert not torch.allclose(seen[-1][1][~outside], shown[~outside], atol=0.1)


def test_findings_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record("digits", "dense", 0.0, 1, 0.4)) + "\n", encoding="utf-8")
    write_report(path, tmp_path)
    results = tmp_path / "RESULTS.md"
    text = results.read_text(encoding="utf-8")
    written = text.replace("<!-- findings -->\n", "<!-- findings -->\n\nIt pays.\n\n")
    results.write_text(written, encoding="utf-8")
    write_report(path, tmp_path)
    assert results.read_text(encoding="utf-8") == written
