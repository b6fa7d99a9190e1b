"""The recipes run as a user runs them."""

import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def run(name: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, RECIPES / name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_register_block_pattern(tmp_path: Path) -> None:
    text = run("register_block_pattern.py", tmp_path)
    assert "Without a pattern: No block was found in Denoiser" in text
    assert "Denoiser: 4 of 4 blocks routed" in text and "positions: 1 n c" in text
    assert "At ratio 0 nothing has changed: True" in text
    assert "moves by 0.000" not in text
