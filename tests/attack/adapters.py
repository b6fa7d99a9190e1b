"""Adapters to spoil, and what has to come of loading them: a `SurgeryError` and the model as it was, or what the files say.

Most attacks are *signed*: they carry the right fingerprint, which anyone can compute, so that what lies behind it is reached.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import AdapterError, SurgeryError
from diffcr_surgery.save import SETTINGS, TENSORS, _fingerprint
from tests.models import snapshot
from tests.small import Denoiser, converted, inputs

NAN, INFINITY = math.nan, math.inf
DEEP = functools.reduce(lambda inner, _: [inner], range(800), [])
BAD_VALUES = [
    None, True, False, 0, 1, -1, 2.0, 10**9, 10**400, -(10**400), 1e308, -1e308, 5e-324, NAN, INFINITY, "", "2", "auto", "\ud800",
    "a\0b\nc", "__class__", "diffcr.plan", "../../x", [], [[]], [0, 1], ["blocks.0"], {}, {"": {}}, DEEP,
]  # fmt: skip


class Files(NamedTuple):
    """An adapter as settings and tensors."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def signed(self) -> Files:
        """The same with the fingerprint that fits."""
        body = {name: value for name, value in self.settings.items() if name != "fingerprint"}
        return Files(body | {"fingerprint": _fingerprint(body, self.tensors)}, self.tensors)

    def text(self) -> str:
        return json.dumps(self.settings) + "\n"

    def write(self, folder: Path, kept: str | None = None) -> None:
        """Write both files, with other settings kept beside the tensors, or with none (an empty text)."""
        (folder / SETTINGS).write_text(self.text())
        kept = self.text() if kept is None else kept
        (folder / TENSORS).write_bytes(save(self.tensors, {SETTINGS: kept} if kept else None))


def read(folder: Path) -> Files:
    return Files(json.loads((folder / SETTINGS).read_text()), load((folder / TENSORS).read_bytes()))


@functools.cache
def saved(ratio: float = 0.3) -> Files:
    """An adapter of the small denoiser, with routers and ratios that training could have left."""
    torch.manual_seed(1)
    model = converted(initial_ratio=ratio, timestep_argument="t")
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.normal_()
    with tempfile.TemporaryDirectory() as folder:
        dcs.save_adapter(model, folder)
        return read(Path(folder))


def adapter() -> Files:
    """A copy of it to spoil."""
    return copy.deepcopy(saved())


class Scratch:
    """A folder for one example of a property."""

    def __enter__(self) -> Path:
        self.folder = tempfile.TemporaryDirectory()
        return Path(self.folder.name)

    def __exit__(self, *_: Any) -> None:
        self.folder.cleanup()


def loaded(folder: Path) -> nn.Module | SurgeryError:
    """Load an adapter; check that a refusal can be printed and leaves the model as it was, and that what loads is sound."""
    model = Denoiser()
    before, files = snapshot(model), sorted(path.name for path in folder.iterdir())
    try:
        dcs.load_adapter_(model, folder, inputs(100.0, 900.0))
    except SurgeryError as error:
        assert snapshot(model) == before
        assert len(str(error).encode()) < 10_000
        return error
    finally:
        assert sorted(path.name for path in folder.iterdir()) == files
    check_sound(model)
    return model


def check_sound(model: nn.Module) -> None:
    """The ratios are in range, their budget is a number, and the model runs or says by name what it cannot do."""
    config, table = model.diffcr.config, dcs.ratio_table(model).detach()
    assert 0 <= float(table.min()) and float(table.max()) <= config.max_ratio + 1e-6
    assert all(parameter.isfinite().all() for parameter in model.diffcr.state_dict().values())
    assert math.isfinite(model.diffcr.saving().item())
    low, high = config.timestep_range if config.timestep_range != "auto" else (100.0, 900.0)
    try:
        for mode in (True, False):
            model.train(mode)
            (model(**inputs(low, (low + high) / 2, high)).sum() + dcs.ratio_loss(model)).backward()
    except SurgeryError as error:
        assert str(error)


def refused(folder: Path, *words: str) -> None:
    outcome = loaded(folder)
    assert isinstance(outcome, AdapterError), outcome
    assert all(word in str(outcome) for word in words), outcome


def same(model: nn.Module, files: Files) -> bool:
    own = model.diffcr.state_dict()
    return own.keys() == files.tensors.keys() and all(torch.equal(own[name], files.tensors[name]) for name in own)


def content(name: str) -> bytes:
    return saved().text().encode() if name == SETTINGS else save(saved().tensors, {SETTINGS: saved().text()})


each_file = pytest.mark.parametrize("name", [SETTINGS, TENSORS])


def raw(entries: dict[str, Any], data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file made by hand."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data
