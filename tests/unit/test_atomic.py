"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import diffcr_surgery as dcs


def test_the_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "step-3"
    with dcs.atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"1234")
        assert not path.exists() and folder.parent == path.parent and folder.name.startswith(".")
    assert [entry.name for entry in path.parent.iterdir()] == ["step-3"]
    assert (path / "inner" / "weights").read_bytes() == b"1234"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_raises_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), dcs.atomic_folder(tmp_path / "step-3") as folder:
        (folder / "weights").write_bytes(b"12")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may be found full as late as when the content is flushed to it."""

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), dcs.atomic_folder(tmp_path / "step-3") as folder:
        (folder / "weights").write_bytes(b"12")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_already_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "step-3"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "weights").write_text("old")
    with pytest.raises(FileExistsError, match=r"step-3 is there already; give each checkpoint a name of its own"), dcs.atomic_folder(path):
        pytest.fail("the body must not run")
    assert (path if kind == "file" else path / "weights").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_is_neither_found_nor_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".step-3"
    left.mkdir()
    (left / "half").write_bytes(b"12")
    assert list(tmp_path.glob("step-*")) == []
    with dcs.atomic_folder(tmp_path / "step-3") as folder:
        (folder / "weights").write_bytes(b"1234")
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    assert [path.name for path in (tmp_path / "step-3").iterdir()] == ["weights"]
