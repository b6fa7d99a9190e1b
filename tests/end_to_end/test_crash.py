"""A training run that is killed at any moment goes on from its newest checkpoint, and ends where it would have ended."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import TEST_ENVIRONMENT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills processes")

SCRIPT = Path(__file__).with_name("crash_run.py")
KILLS = 16


def test_killed_at_random_moments_it_ends_bit_identical(tmp_path: Path) -> None:
    seed = 0 if os.environ.get("CI") else random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")  # shown where it fails
    command = [sys.executable, SCRIPT, tmp_path, str(KILLS), str(seed)]
    done = subprocess.run(command, env=TEST_ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads((tmp_path / "report.json").read_text())
    print(f"newest step after each death: {report['deaths']}; left behind: {report['leftovers']}")
    assert not any([report["undisturbed"], *report["ends"]]), done.stderr[-6000:]
    assert sum(map(len, report["deaths"])) == KILLS
    undisturbed = tmp_path / "undisturbed"
    expected = load_file(undisturbed / "final.safetensors")
    assert {"diffcr.ratio_table", "diffcr.routers.0.weight"} <= expected.keys()
    assert float(expected["diffcr.ratio_table"].mean()) == pytest.approx(0.4, abs=1e-5)
    for run in range(len(report["ends"])):
        killed = tmp_path / f"killed-{run}"
        actual = load_file(killed / "final.safetensors")
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        for name in ("diffcr.safetensors", "diffcr.json"):
            assert (killed / "adapter" / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes()
        assert {path.name for path in killed.glob("step-*")} == {path.name for path in undisturbed.glob("step-*")}
