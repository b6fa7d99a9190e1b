"""Disks that are full, read-only or gone: an error by name, and everything as it was."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import AdapterError
from diffcr_surgery.save import SETTINGS, TENSORS
from tests.launch import TEST_ENVIRONMENT
from tests.models import snapshot
from tests.small import Denoiser, converted, inputs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts, limits and devices")


@pytest.fixture(scope="module")
def old() -> nn.Module:
    torch.manual_seed(0)
    return converted(initial_ratio=0.1)


@pytest.fixture(scope="module")
def new() -> nn.Module:
    torch.manual_seed(0)
    return converted(initial_ratio=0.6)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB and 20 files. Where none may be mounted, `largest_file` is what is left of a full disk."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=20", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Write to the disk until it is full, but for some bytes; to be deleted to make room."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 512):
                pass
        except OSError:
            file.truncate(max(file.tell() - leave, 0))
    return ballast


def loads_as(folder: Path, model: nn.Module) -> bool:
    loaded = dcs.load_adapter_(Denoiser(), folder, inputs(100.0, 900.0))
    own = loaded.diffcr.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in model.diffcr.state_dict().items())


def cannot_save(model: nn.Module, folder: Path) -> None:
    """Saving is refused by the name of the folder; the model and what lies in the folder are as they were."""
    before, files = snapshot(model), contents(folder)
    with pytest.raises(AdapterError, match="could not be written") as caught:
        dcs.save_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert snapshot(model) == before
    assert contents(folder) == files


def contents(folder: Path) -> dict[str, Any]:
    """Every entry below a folder, with the bytes of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("leave", [0, 4096])
def test_a_full_disk_keeps_the_adapter_that_was_there(disk: Path, old: nn.Module, new: nn.Module, leave: int) -> None:
    """Full at once, and after the first file."""
    folder = disk / "adapter"
    dcs.save_adapter(old, folder)
    ballast = fill(disk, leave)
    cannot_save(new, folder)
    assert loads_as(folder, old)
    ballast.unlink()
    dcs.save_adapter(new, folder)
    assert loads_as(folder, new)


def test_a_first_save_on_a_full_disk_leaves_nothing_in_the_folder(disk: Path, new: nn.Module) -> None:
    ballast = fill(disk, 4096)
    with pytest.raises(AdapterError, match=r"adapter: .*\. Choose a folder that can be written"):
        dcs.save_adapter(new, disk / "adapter")
    assert not contents(disk / "adapter")
    ballast.unlink()
    dcs.save_adapter(new, disk / "adapter")
    assert loads_as(disk / "adapter", new)


def test_a_full_disk_leaves_no_part_of_a_checkpoint(disk: Path) -> None:
    with dcs.atomic_folder(disk / "step-1") as folder:
        (folder / "weights").write_bytes(b"1" * 4096)
    before = contents(disk)
    with pytest.raises(OSError, match="No space left"), dcs.atomic_folder(disk / "step-2") as folder:
        (folder / "weights").write_bytes(b"2" * 2**20)
    assert contents(disk) == before
    with dcs.atomic_folder(disk / "step-2") as folder:
        (folder / "weights").write_bytes(b"2" * 4096)
    assert sorted(path.name for path in disk.iterdir()) == ["step-1", "step-2"]


def test_a_disk_without_room_for_another_file(disk: Path, old: nn.Module, new: nn.Module) -> None:
    """Bytes are left, but no entries: not even a folder can be made."""
    dcs.save_adapter(old, disk / "adapter")
    for number in range(20):
        try:
            (disk / f"{number}").mkdir()
        except OSError:
            break
    else:
        pytest.fail("the disk was not filled")
    before = contents(disk)
    cannot_save(new, disk / "adapter")
    with pytest.raises(OSError, match="No space left"), dcs.atomic_folder(disk / "step-1"):
        pytest.fail("the body must not run")
    assert contents(disk) == before and loads_as(disk / "adapter", old)
    for number in range(5):
        (disk / f"{number}").rmdir()
    dcs.save_adapter(new, disk / "adapter")
    assert loads_as(disk / "adapter", new)


def test_a_read_only_disk(disk: Path, old: nn.Module, new: nn.Module) -> None:
    dcs.save_adapter(old, disk / "adapter")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    cannot_save(new, disk / "adapter")
    cannot_save(new, disk / "another")
    with pytest.raises(OSError, match="Read-only"), dcs.atomic_folder(disk / "step-1"):
        pytest.fail("the body must not run")
    assert loads_as(disk / "adapter", old)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    dcs.save_adapter(new, disk / "adapter")
    assert loads_as(disk / "adapter", new)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(old: nn.Module, new: nn.Module, tmp_path: Path) -> None:
    dcs.save_adapter(old, tmp_path / "adapter")
    (tmp_path / "adapter").chmod(stat.S_IRUSR | stat.S_IXUSR)
    cannot_save(new, tmp_path / "adapter")
    assert loads_as(tmp_path / "adapter", old)
    (tmp_path / "adapter").chmod(stat.S_IRWXU)
    dcs.save_adapter(new, tmp_path / "adapter")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of any file this process writes: beyond it a write fails as on a disk with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_a_file_that_may_not_grow(old: nn.Module, new: nn.Module, tmp_path: Path, size: int) -> None:
    dcs.save_adapter(old, tmp_path)
    with largest_file(size):
        cannot_save(new, tmp_path)
    assert loads_as(tmp_path, old)
    dcs.save_adapter(new, tmp_path)
    assert loads_as(tmp_path, new)


@pytest.mark.parametrize("below", [False, True], ids=["itself", "its parent"])
def test_a_folder_that_is_a_file(new: nn.Module, tmp_path: Path, below: bool) -> None:
    path = tmp_path / "adapter"
    path.write_text("something else")
    folder = path / "inner" if below else path
    with pytest.raises(AdapterError, match=f"could not be written to {folder}"):
        dcs.save_adapter(new, folder)
    with pytest.raises(OSError, match=r"exist|directory"), dcs.atomic_folder(folder / "step-1"):
        pytest.fail("the body must not run")
    assert path.read_text() == "something else" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [SETTINGS, TENSORS])
def test_a_file_that_is_a_folder(new: nn.Module, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "kept").write_text("something else")
    with pytest.raises(AdapterError, match="could not be written"):
        dcs.save_adapter(new, tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / name / "kept").read_text() == "something else"
    shutil.rmtree(tmp_path / name)
    dcs.save_adapter(new, tmp_path)
    assert loads_as(tmp_path, new)


@pytest.mark.parametrize("target", ["/dev/full", "elsewhere", "nowhere"])
def test_links_in_place_of_the_files_are_replaced_and_not_followed(new: nn.Module, tmp_path: Path, target: str) -> None:
    folder, elsewhere = tmp_path / "adapter", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("something else")
    for name in (SETTINGS, TENSORS):
        (folder / name).symlink_to(target if target.startswith("/") else tmp_path / target)
    dcs.save_adapter(new, folder)
    assert loads_as(folder, new) and not any(path.is_symlink() for path in folder.iterdir())
    assert elsewhere.read_text() == "something else" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "."])
def test_links_in_place_of_a_checkpoint_are_not_followed(tmp_path: Path, target: str) -> None:
    """Nor is a link under the name it bears while it is written: nothing outside is removed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("something else")
    (tmp_path / "runs").mkdir()
    for name in ("step-1", ".step-2"):
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    before = contents(tmp_path)
    for name in ("step-1", "step-2"):
        with pytest.raises(OSError, match=r"there already|exist|directory"), dcs.atomic_folder(tmp_path / "runs" / name) as folder:
            (folder / "weights").write_text("1")
    assert contents(tmp_path) == before


DELETED = """
import os, shutil, sys, warnings
import diffcr_surgery as dcs
from tests.models import snapshot
from tests.small import converted

warnings.simplefilter("error")
model, moment, folder = converted(), None, sys.argv[1]
before = snapshot(model)

def delete(event, args):
    global moment
    if event == moment:
        moment = None
        shutil.rmtree(folder)

sys.addaudithook(delete)
for event in sys.argv[2:]:
    dcs.save_adapter(model, folder)
    moment = event
    try:
        dcs.save_adapter(model, folder)
    except dcs.errors.AdapterError as error:
        print(error, moment, snapshot(model) == before, os.path.exists(folder), sep="\\t")
dcs.save_adapter(model, folder)
"""


def test_a_folder_that_is_deleted_midway(tmp_path: Path) -> None:
    """By someone else: when the scratch folder is about to be made, when the files are written, and when they are put in place."""
    folder, moments = tmp_path / "adapter", ["tempfile.mkdtemp", "os.chmod", "os.rename"]
    done = subprocess.run(
        [sys.executable, "-c", DELETED, folder, *moments], env=TEST_ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(moments), done.stdout
    assert all(f"could not be written to {folder}" in error for error, *_ in lines)
    assert [rest for _, *rest in lines] == [["None", "True", "False"]] * len(moments)
    assert contents(folder).keys() == {str(folder / name) for name in (SETTINGS, TENSORS)}
    dcs.load_adapter_(Denoiser(), folder, inputs(100.0, 900.0))


def test_a_checkpoint_may_hold_links_and_pipes(tmp_path: Path) -> None:
    """They have no content to be flushed: a link may lead nowhere yet, and a pipe would be waited at for ever."""
    with dcs.atomic_folder(tmp_path / "step-1") as folder:
        (folder / "newest").symlink_to(tmp_path / "step-1" / "weights")
        (folder / "weights").write_text("1")
        os.mkfifo(folder / "pipe")
        waiting = os.open(folder / "pipe", os.O_RDWR)  # so that a test that fails ends
    os.close(waiting)
    assert (tmp_path / "step-1" / "newest").read_text() == "1"


def test_a_checkpoint_that_is_deleted_midway(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), dcs.atomic_folder(tmp_path / "runs" / "step-1") as folder:
        shutil.rmtree(tmp_path / "runs")
    assert not contents(tmp_path)
    with dcs.atomic_folder(tmp_path / "runs" / "step-1") as folder:
        (folder / "weights").write_text("1")
    assert (tmp_path / "runs" / "step-1" / "weights").read_text() == "1"
