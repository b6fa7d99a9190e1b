"""Folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed

from diffcr_surgery._shards import by_first, several_processes

__all__ = ["atomic_folder", "sync"]


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder to write to that becomes ``path`` in one step when the body ends, and is removed if it raises.

    For checkpoints of a training run, whatever writes them: ``accelerator.save_state``, ``torch.distributed.checkpoint.save``,
    ``save_file``. Until then the folder bears the same name with a dot in front; what a killed run left under it is removed. In a
    distributed run every process enters and leaves, and all are given the same folder.

    Args:
        path: The folder to make. It must not exist: checkpoints bear the number of their step, and none is written over.

    Raises:
        FileExistsError: If it does.

    Example:
        >>> with atomic_folder("checkpoints/step-100") as folder:
        ...     written = (folder / "state.txt").write_text("all of it")
        >>> sorted(entry.name for entry in Path("checkpoints").iterdir())
        ['step-100']
    """
    final = Path(path)
    scratch = final.with_name(f".{final.name}")
    if final.exists():
        raise FileExistsError(f"{final} is there already; give each checkpoint a name of its own, such as the number of its step.")

    def make() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def finish() -> None:
        for entry in [*scratch.rglob("*"), scratch]:
            if not entry.is_symlink() and (entry.is_file() or entry.is_dir()):  # a link may lead nowhere yet, a pipe would be waited at
                sync(entry)
        os.rename(scratch, final)
        sync(final.parent)

    _wait()
    try:
        by_first(make)
        yield scratch
        _wait()
        by_first(finish)
    finally:
        if not several_processes() or distributed.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _wait() -> None:
    """Let all processes of a distributed run come to the same place."""
    if several_processes():
        distributed.barrier()


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk now; only then a rename after it survives a loss of power."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
