"""The study as a user runs it: some experiments, stopped and started again, and the report made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import study
from study.arms import chosen
from study.experiment import Place
from study.runner import run_all

from tests.launch import run_recipe

FOLDER = Path(study.__file__).parent
ONLY = (
    "digits/dense/*",
    "digits/uniform/0.3/*",
    "digits/merging-free/0.5/*",
    "digits/regions-10/0.5/*",
    "digits/budget-10/*",
    "digits/shallow/0.5/*",
)


def run(out: Path, *arguments: str) -> str:
    return run_recipe(FOLDER, "run", "--size", "smoke", "--seeds", "3", "--out", str(out), "--jobs", "2", *arguments, folder=out.parent)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    assert f"0 of {len(ONLY)} experiments have a record; {len(ONLY)} to run" in run(out, "--only", *ONLY)
    return out


def test_records_hold_what_the_report_needs(done: Path) -> None:
    found = {record["arm"]: record for record in records(done)}
    assert found.keys() == {"dense", "uniform", "merging-free", "regions-10", "budget-10", "shallow"}
    assert len({record["base"] for record in found.values()}) == 1
    assert all(len(record["losses"]) == 20 and record["loss"] > 0 and record["distances"]["fid"] > 0 for record in found.values())
    assert found["dense"]["flops_share"] == 1.0 and "train_seconds" not in found["merging-free"]
    for arm, target in (("uniform", 0.3), ("regions-10", 0.5), ("budget-10", 0.3)):
        assert found[arm]["ratio"] == pytest.approx(target, abs=0.06)  # a table of two rows has coarse steps
        assert found[arm]["settings"]["config"]["target_ratio"] == target
    assert found["budget-10"]["flops_share"] == pytest.approx(found["uniform"]["flops_share"], rel=0.01)
    assert found["budget-10"]["trained_share"] > 0.95, "ten steps of Adam do not reach the target, the dial does"
    assert [len(found["regions-10"]["table"]), len(found["regions-10"]["table"][0])] == [2, 10]
    maps = found["regions-10"]["routing"]
    assert [len(maps), len(maps[0]), len(maps[0][0])] == [10, 4, 256] and set("".join(maps[0])) <= set("012")


def test_a_run_goes_on_where_it_was_stopped(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one process in place of two, which is to make no difference."""
    path, experiments, place = done / "records.jsonl", chosen(ONLY, [3]), Place("smoke", done / "weights", "cpu")
    before = path.read_text(encoding="utf-8").splitlines()
    run_all(experiments, place, path, jobs=1)
    assert f"{len(ONLY)} of {len(ONLY)} experiments have a record; 0 to run" in capsys.readouterr().out
    lost, same = json.loads(before[-1]), ("key", "base", "losses", "distances", "ratio")
    for written in (100, len(before[-1])):  # killed while it wrote the last line
        path.write_text("\n".join(before[:-1]) + "\n" + before[-1][:written], encoding="utf-8")
        run_all(experiments, place, path, jobs=1)
        assert "1 to run" in capsys.readouterr().out
        assert path.read_text(encoding="utf-8").splitlines()[:-1] == before[:-1]
        again = records(done)[-1]
        assert {name: again[name] for name in same} == {name: lost[name] for name in same}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    run(
        tmp_path / "out", "--device", "cuda", "--jobs", "1", "--only", "*/dense/*", "*/regions-4/0.3/*", "*/merging/0.3/*", "*/random/0.3/*"
    )
    assert len(records(tmp_path / "out")) == 8


def test_it_shows_what_there_is(tmp_path: Path) -> None:
    text = run(tmp_path / "out", "--list", "--only", "photographs/two/*", "digits/dense/*")
    assert text.splitlines() == ["digits/dense/0/3  dense", "photographs/two/0.3/3  two branches"]


def test_the_report_of_a_run(done: Path) -> None:
    run_recipe(FOLDER, "report", str(done / "records.jsonl"), "--out", str(done / "report"), folder=done)
    text, planned = (done / "report" / "RESULTS.md").read_text(encoding="utf-8"), len(chosen(["*"], [3]))
    assert (
        f"{len(ONLY)} of {planned} experiments of size smoke, seeds 3" in text
        and "### Target 0.3" in text
        and "uniform (Mixture-of-Depths)" in text
    )
