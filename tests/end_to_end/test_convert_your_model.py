"""The recipe for one's own model: what it leaves, and that five lines are all that tells it from a dense script."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_your_model import HELD_OUT, DiT, digits, held_out_loss
from safetensors.torch import load_file

import diffcr_surgery as dcs
from tests.launch import run_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "convert_your_model.py"
MARKED = re.compile(r"^(?!\s*#).*  # DiffCR (\d)/5\n", re.MULTILINE)


def run(script: Path, folder: Path, *length: str) -> tuple[str, dict[str, Any]]:
    text = run_recipe(script, *length, "--out", "out", folder=folder)
    return text, json.loads((folder / "out" / "results.json").read_text())


def test_it_trains_converts_and_specialises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, results = run(RECIPE, tmp_path, "--smoke")
    assert "mean ratio 0.300" in text and f"routed: held-out loss {results['routed']['held_out_loss']:.4f}" in text
    assert results["routed"]["flops_per_call"] < 0.75 * results["dense"]["flops_per_call"]
    assert 0 < results["dense"]["held_out_loss"] < results["routed"]["held_out_loss"] < 1  # of 1 for no training at all

    out = tmp_path / "out"
    table = load_file(out / "adapter" / "diffcr.safetensors")["ratio_table"]
    assert table.shape == (6, 4) and float(table.mean()) == pytest.approx(0.3, abs=1e-3) and len(table.unique()) > 4
    monkeypatch.setattr(DiT, "__module__", "__main__")  # the name it had in the script, which the adapter knows it by
    model = DiT()
    model.load_state_dict(load_file(out / "model.safetensors"))
    images, labels = (tensor[:HELD_OUT] for tensor in digits())
    dcs.load_adapter_(model, out / "adapter", (images[:2], torch.tensor([0, 999]), labels[:2]))
    assert held_out_loss(dcs.specialize_(model), images, labels) == pytest.approx(results["routed"]["held_out_loss"], rel=1e-4)


def without_its_five_lines() -> str:
    source = RECIPE.read_text(encoding="utf-8")
    assert MARKED.findall(source) == ["1", "2", "3", "4", "5"]
    dense = re.sub(r"# before: ", "", MARKED.sub("", source))
    assert source.count("dcs.") == dense.count("dcs.") + 7 and "dcs." not in dense
    return dense


def test_five_lines_are_all_that_names_the_library() -> None:
    compile(without_its_five_lines(), "dense.py", "exec")


@pytest.mark.slow
def test_without_its_five_lines_it_is_a_dense_script(tmp_path: Path) -> None:
    dense = without_its_five_lines()
    script = tmp_path / "dense.py"
    script.write_text(dense.replace("import diffcr_surgery as dcs\n", ""), encoding="utf-8")
    _, results = run(script, tmp_path, "--steps", "5")
    assert results["routed"] == results["dense"]  # trained on twice alike, then
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "results.json"}
