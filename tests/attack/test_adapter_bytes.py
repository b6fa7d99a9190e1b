"""Adapter files whose bytes are not those that were saved, or not to be had."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import AdapterError
from diffcr_surgery.save import MAX_SETTINGS_BYTES, SETTINGS, TENSORS
from tests.attack.adapters import (
    Scratch,
    adapter,
    content,
    each_file,
    loaded,
    refused,
    same,
    saved,
)
from tests.small import Denoiser, inputs


def test_the_sound_adapter_loads(folder: Path) -> None:
    """What every refusal below is measured against; a signature made here is the one that was saved."""
    model = loaded(folder)
    assert isinstance(model, nn.Module) and same(model, saved())
    assert adapter().signed().settings == saved().settings


def loads_only_as_saved(name: str, spoiled: bytes) -> None:
    """Bytes in place of a file of the adapter: refused, or what was saved, bit for bit."""
    with Scratch() as folder:
        saved().write(folder)
        (folder / name).write_bytes(spoiled)
        outcome = loaded(folder)
        if isinstance(outcome, nn.Module):
            assert same(outcome, saved()) and outcome.diffcr.config.to_json() == json.dumps(saved().settings["config"], indent=2)
        else:
            assert isinstance(outcome, AdapterError)


@each_file
@given(data=st.data())
def test_truncated(name: str, data: st.DataObject) -> None:
    whole = content(name)
    header = 8 + int.from_bytes(content(TENSORS)[:8], "little")
    spots = [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(whole) - 2, len(whole) - 1]
    end = data.draw(st.sampled_from([spot for spot in spots if spot < len(whole)]) | st.integers(0, len(whole) - 1))
    loads_only_as_saved(name, whole[:end])


@each_file
@given(data=st.data())
def test_flipped_bits(name: str, data: st.DataObject) -> None:
    """Anywhere: in the length of the header, in the header and the settings kept there, in values, in text."""
    spoiled = bytearray(content(name))
    region = data.draw(st.sampled_from([(0, 8), (8, 300), (0, len(spoiled)), (len(spoiled) - 250, len(spoiled))]))
    for bit in data.draw(st.lists(st.integers(8 * region[0], 8 * region[1] - 1), min_size=1, max_size=40, unique=True)):
        spoiled[bit // 8] ^= 1 << bit % 8
    loads_only_as_saved(name, bytes(spoiled))


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_the_values_counts(step: int) -> None:
    """A flipped bit that leaves a likely number is seen by the fingerprint alone."""
    whole = content(TENSORS)
    first = 8 + int.from_bytes(whole[:8], "little")
    for place in range(first, len(whole), step):
        with Scratch() as folder:
            saved().write(folder)
            (folder / TENSORS).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            refused(folder, TENSORS)


@each_file
@given(spoiled=st.binary(max_size=2000))
def test_random_bytes(name: str, spoiled: bytes) -> None:
    loads_only_as_saved(name, spoiled)


@each_file
def test_a_file_of_another_adapter(name: str, folder: Path) -> None:
    """Tensors of another adapter bring their own settings; settings of another one are not believed."""
    other = saved(0.7)
    with Scratch() as elsewhere:
        other.write(elsewhere)
        (folder / name).write_bytes((elsewhere / name).read_bytes())
    model = loaded(folder)
    assert isinstance(model, nn.Module)
    assert same(model, other if name == TENSORS else saved())
    assert model.diffcr.config.initial_ratio == (0.7 if name == TENSORS else 0.3)


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("tokens", "\xe4").encode("latin-1"),
    "NUL": lambda text: text.encode() + b"\0",
    "two objects": lambda text: text.encode() + b"{}",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_encodings(encoding: str, folder: Path) -> None:
    (folder / SETTINGS).write_bytes(ENCODINGS[encoding](saved().text()))
    refused(folder, SETTINGS)


def test_line_ends_say_nothing(folder: Path) -> None:
    (folder / SETTINGS).write_bytes(saved().text().replace(", ", ",\r\n").encode())
    assert isinstance(loaded(folder), nn.Module)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read everything")
@each_file
def test_unreadable(name: str, folder: Path) -> None:
    (folder / name).chmod(0)
    refused(folder, name)
    (folder / name).chmod(0o600)
    folder.chmod(0)
    try:
        with pytest.raises(AdapterError, match="cannot be read"):
            dcs.load_adapter_(Denoiser(), folder, inputs(100.0, 900.0))
    finally:
        folder.chmod(0o700)


def test_a_link_to_the_files_is_as_good_as_the_files(folder: Path) -> None:
    """Caches of downloads hold links."""
    with Scratch() as cache:
        for name in (SETTINGS, TENSORS):
            (folder / name).rename(cache / name)
            (folder / name).symlink_to(cache / name)
        assert isinstance(loaded(folder), nn.Module)


def test_settings_just_too_large(folder: Path) -> None:
    text = saved().text()
    (folder / SETTINGS).write_text(text + " " * (MAX_SETTINGS_BYTES - len(text)))
    assert isinstance(loaded(folder), nn.Module)
    (folder / SETTINGS).write_text(text + " " * (MAX_SETTINGS_BYTES - len(text) + 1))
    refused(folder, "larger than any adapter's")
