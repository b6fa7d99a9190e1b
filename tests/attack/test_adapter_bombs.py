"""Adapters made to hang a process or to fill its memory, and files that are none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffcr_surgery.save import SETTINGS, TENSORS
from tests.attack.adapters import (
    adapter,
    raw,
    saved,
)
from tests.launch import TEST_ENVIRONMENT

SCRIPT = """
import resource, sys, warnings
from pathlib import Path
import torch
import diffcr_surgery as dcs
from tests.small import Denoiser, inputs

warnings.simplefilter("error")
torch.set_num_threads(1)
dcs.plan(Denoiser(), inputs(100.0, 900.0))  # what is loaded once
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30,) * 2)
opened = []
folder = "."
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
for folder in sys.argv[1:]:
    opened.clear()
    try:
        dcs.load_adapter_(Denoiser(), folder, inputs(100.0, 900.0))
        outcome = "loaded"
    except Exception as error:
        outcome = f"{type(error).__name__} {str(error)[:300]!r}"
    stray = [path for path in opened if not path.startswith((folder, sys.prefix, sys.base_prefix)) and not path.endswith((".py", ".pyc"))]
    print(Path(folder).name, outcome, stray if stray else "", sep="\\t", flush=True)
"""


def _settings(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        files = adapter()
        for name, value in changes.items():
            (files.settings if name in files.settings else files.settings["config"])[name] = value
        files.signed().write(folder, kept="")

    return write


def _kept(**changes: Any) -> Callable[[Path], None]:
    """The same in the copy beside the tensors, which counts where the signature tells it from the settings."""

    def write(folder: Path) -> None:
        files = adapter()
        files.settings["config"].update(changes)
        files.signed().write(folder)
        (folder / SETTINGS).write_text(saved().text())

    return write


def _text(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / SETTINGS).write_text(text)

    return write


def _other(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return write


def _many_tensors(folder: Path) -> None:
    header = {f"{number:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(1_000_000)}
    (folder / TENSORS).write_bytes(raw(header, b""))


def _sparse(folder: Path) -> None:
    """One tensor of a terabyte that takes no place on the disk."""
    size = 2**40
    with (folder / TENSORS).open("wb") as file:
        file.write(raw({"ratio_table": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b""))
        file.truncate(file.tell() + size)


def _expression(expression: str) -> Callable[[Path], None]:
    return _settings(blocks=expression)


ROW = {"path": "blocks.0", "occurrence": 0, "block_class": "Block", "width": 8}
BOMBS: dict[str, Callable[[Path], None]] = {
    "a milliard regions beside the tensors": _kept(timestep_regions=10**9, region_weights=None),
    "fifty thousand weights beside the tensors": _kept(region_weights=[1] * 50_000),
    "very catastrophic beside the tensors": _kept(blocks="(((.+)+)+)+x"),
    "a million regions": _settings(timestep_regions=10**6, region_weights=None),
    "a milliard regions": _settings(timestep_regions=10**9, region_weights=None),
    "countless regions": _settings(timestep_regions=10**400),
    "a hundred thousand bins": _settings(bins=[number / 10**5 for number in range(10**5 + 1)]),
    "ten thousand bins": _settings(bins=[number / 10**4 for number in range(10**4 + 1)]),
    "a hundred thousand weights": _settings(region_weights=[1] * 10**5),
    "shared by countless": _settings(share_routing=10**400),
    "a hundred thousand sites": _settings(sites=[ROW] * 10**5),
    "five thousand sites": _settings(sites=[ROW] * 5_000),
    "five thousand sites with a filter": _settings(sites=[ROW | {"path": f"blocks.{i}"} for i in range(5_000)], blocks=".*"),
    "nested": _text("[" * 100_000),
    "nested objects": _text('{"a":' * 100_000),
    "nested settings": _text(saved().text().replace('"tokens"', "[" * 50_000 + "]" * 50_000, 1)),
    "twenty megabytes": _text('{"version": 2, "model_class": "' + "x" * 20_000_000 + '"}'),
    "twenty megabytes of lists": _text("[" + "[]," * 7_000_000 + "[]]"),
    "many digits": _text('{"version": ' + "9" * 10_000 + "}"),
    "a million digits": _text('{"version": ' + "9" * 1_000_000 + "}"),
    "catastrophic": _expression("(.+)+x"),
    "very catastrophic": _expression("(((.+)+)+)+x"),
    "polynomial": _expression("(.*)*" * 6 + "x"),
    "slow to compile": _expression("(?i)" + "[\u0100-\uffff]" * 1_999),
    "too long to compile": _expression("(?i)" + "[\u0100-\uffff]" * 2_000),
    "too deep to compile": _expression("(" * 9_000),
    "repeated too often": _expression("a{99999999999}"),
    "two alphabets": _expression("(?u)(?a)a"),
    "a set in a set": _expression("[[a]"),
    "a million tensors": _many_tensors,
    "a terabyte": _sparse,
    "settings are a folder": _other(SETTINGS, Path.mkdir),
    "tensors are a folder": _other(TENSORS, Path.mkdir),
    "settings are a pipe": _other(SETTINGS, os.mkfifo),
    "tensors are a pipe": _other(TENSORS, os.mkfifo),
    "settings are endless": _other(SETTINGS, lambda path: path.symlink_to("/dev/zero")),
    "tensors are endless": _other(TENSORS, lambda path: path.symlink_to("/dev/zero")),
    "settings are a loop": _other(SETTINGS, lambda path: path.symlink_to(path.name)),
    "tensors are a loop": _other(TENSORS, lambda path: path.symlink_to(path.name)),
    "settings are nowhere": _other(SETTINGS, lambda path: path.symlink_to("nowhere")),
    "settings are a terminal": _other(SETTINGS, lambda path: path.symlink_to("/dev/tty")),
}


SOME = ("very catastrophic", "a milliard regions", "nested settings", "settings are a pipe", "tensors are a pipe", "tensors are endless")


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory, and makes pipes and devices")
@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(BOMBS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_bombs_neither_hang_nor_fill_the_memory(names: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own that is given a gigabyte, and opens nothing but the two files."""
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        saved().write(folder)
        BOMBS[name](folder)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, env=TEST_ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcomes = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    assert tuple(outcomes) == names
    print(done.stdout)
    harmless = {
        "slow to compile",
        "catastrophic",
        "very catastrophic",
        "polynomial",
        "very catastrophic beside the tensors",
    }  # expressions that are never run
    for name, (outcome, stray) in outcomes.items():
        assert outcome == "loaded" if name in harmless else outcome.startswith("AdapterError "), (name, outcome)
        assert not stray, (name, stray)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
