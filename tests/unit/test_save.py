"""Saving an adapter, interrupted wherever it can be."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery import save
from diffcr_surgery.errors import AdapterError
from tests.small import Denoiser, converted, inputs


class Killed(BaseException):
    """Stands for the end of the process: no handler of errors sees it."""


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return converted()


@pytest.fixture()
def versions(original: nn.Module) -> list[nn.Module]:
    """One model at two moments of its training; the settings differ as well."""
    first, second = copy.deepcopy(original), converted(target_ratio=0.45, initial_ratio=0.5)
    for model, value in ((first, 0.1), (second, 0.7)):
        with torch.no_grad():
            dcs.ratio_table(model).fill_(value)
            for router in model.diffcr.routers.values():
                router.weight.fill_(value)
    return [first, second]


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Have the process end when it is about to put the ``at``-th file in its place."""
    replace, calls = os.replace, []

    def replacing(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise Killed
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", replacing)


def loads_as(folder: Path, model: nn.Module) -> bool:
    loaded = dcs.load_adapter_(Denoiser(), folder, inputs(100.0, 900.0))
    same = all(torch.equal(a, b) for a, b in zip(loaded.diffcr.state_dict().values(), model.diffcr.state_dict().values(), strict=True))
    return same and loaded.diffcr.config.target_ratio == model.diffcr.config.target_ratio


def test_interrupted_between_the_files_the_new_adapter_is_there_whole(
    versions: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = versions
    dcs.save_adapter(old, tmp_path)
    interrupt(monkeypatch, at=2)
    with pytest.raises(Killed):
        dcs.save_adapter(new, tmp_path)
    assert loads_as(tmp_path, new)


def test_interrupted_before_the_first_file_the_old_adapter_is_there_whole(
    versions: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = versions
    dcs.save_adapter(old, tmp_path)
    interrupt(monkeypatch, at=1)
    with pytest.raises(Killed):
        dcs.save_adapter(new, tmp_path)
    assert loads_as(tmp_path, old)


@pytest.mark.parametrize("at", [1, 2])
def test_a_first_save_that_was_interrupted_leaves_no_adapter(
    versions: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    interrupt(monkeypatch, at)
    with pytest.raises(Killed):
        dcs.save_adapter(versions[0], tmp_path)
    with pytest.raises(AdapterError, match=r"holds no diffcr\.json"):
        dcs.load_adapter_(Denoiser(), tmp_path, inputs(100.0, 900.0))


def test_the_save_after_an_interrupted_one_is_whole_again(
    versions: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = versions
    dcs.save_adapter(old, tmp_path)
    with monkeypatch.context() as patched:
        interrupt(patched, at=2)
        with pytest.raises(Killed):
            dcs.save_adapter(new, tmp_path)
    dcs.save_adapter(old, tmp_path)
    assert loads_as(tmp_path, old)


def test_a_folder_that_cannot_be_written_keeps_its_adapter(
    versions: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = versions
    dcs.save_adapter(old, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(AdapterError, match=r"could not be written to .*No space left on device"):
            dcs.save_adapter(new, tmp_path)
    assert loads_as(tmp_path, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diffcr.json", "diffcr.safetensors"]


def test_an_adapter_that_does_not_list_the_blocks_left_out_is_loaded(tmp_path: Path) -> None:
    """So were they saved at first."""
    dcs.save_adapter(converted(blocks=r"blocks\.[01]"), tmp_path)
    settings, tensors = save._read(tmp_path)
    del settings["left_out"], settings["fingerprint"]
    settings["fingerprint"] = save._fingerprint(settings, tensors)
    save._write(tmp_path, settings, tensors)
    loaded = dcs.load_adapter_(Denoiser(), tmp_path, inputs(100.0, 900.0))
    assert [site.path for site in loaded.diffcr.plan.routed_sites] == ["blocks.0", "blocks.1"]


def test_a_class_of_the_script_that_trained_is_known_again_where_it_is_imported(
    original: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(original)
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "__module__", "__main__")
        dcs.save_adapter(dcs.convert_(Denoiser(), inputs(100.0, 900.0), model.diffcr.config), tmp_path)
    loaded = dcs.load_adapter_(Denoiser(), tmp_path, inputs(100.0, 900.0))
    assert len(dcs.ratio_table(loaded)) == len(dcs.ratio_table(model))

    class Another(Denoiser):
        pass

    with pytest.raises(
        AdapterError, match=r"was trained on a __main__\.Denoiser; this is a .*Another\. Load it into a model of that class"
    ):
        dcs.load_adapter_(Another(), tmp_path, inputs(100.0, 900.0))
    dcs.save_adapter(model, tmp_path / "elsewhere")
    monkeypatch.setattr(Denoiser, "__module__", "elsewhere")
    with pytest.raises(AdapterError, match=r"this is a elsewhere\.Denoiser"):
        dcs.load_adapter_(Denoiser(), tmp_path / "elsewhere", inputs(100.0, 900.0))
