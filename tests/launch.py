"""Processes of their own: in which surroundings, and recipes run as a user does, in one process or in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["ENVIRONMENT", "TEST_ENVIRONMENT", "TWO_PROCESSES", "run_recipe"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
SOURCES = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
TEST_ENVIRONMENT = {**ENVIRONMENT, "PYTHONPATH": SOURCES}  # in which `tests` can be imported too
# With --cpu accelerate leaves starting the processes to MPI and, without it, starts one; --multi_gpu starts them itself, and the variable
# above keeps them on the CPU.
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                 "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


def run_recipe(recipe: Path, *arguments: str, folder: Path, launch: tuple[str, ...] = ()) -> str:
    """Return what a recipe printed; it must have ended well."""
    command = [sys.executable, *launch, str(recipe), *arguments]
    for _ in range(2):  # gloo on a loaded machine has been seen to abort; what it leaves is looked at all the same
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
        if "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
