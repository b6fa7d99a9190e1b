"""The recipes run as a user runs them."""

import shutil
from pathlib import Path

import pytest

from tests.launch import run_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_register_block_pattern(tmp_path: Path) -> None:
    text = run_recipe(RECIPES / "register_block_pattern.py", folder=tmp_path)
    assert "Without a pattern: No block was found in Denoiser" in text
    assert "Denoiser: 4 of 4 blocks routed" in text and "positions: 1 n c" in text
    assert "At ratio 0 nothing has changed: True" in text
    assert "moves by 0.000" not in text


@pytest.mark.slow  # C++ is compiled for a minute; what is packaged, `tests/unit/test_compile.py` exports
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="AOTInductor needs a C++ compiler")
def test_export_package(tmp_path: Path) -> None:
    """A region each, packaged, gives what the model gives; the recipe itself compares them."""
    text = run_recipe(RECIPES / "export_package.py", "--out", "packages", "--layers", "1", "--width", "64", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == ["region_0.pt2", "region_1.pt2"]
    assert text.count("largest difference") == 2
