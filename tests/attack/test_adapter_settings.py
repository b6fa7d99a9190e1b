"""Adapters whose settings are not those that were saved, and carry the fingerprint that fits."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import AdapterError, SurgeryError
from diffcr_surgery.save import SETTINGS, TENSORS
from tests.attack.adapters import (
    BAD_VALUES,
    NAN,
    Files,
    Scratch,
    adapter,
    loaded,
    read,
    refused,
    same,
    saved,
)
from tests.models import snapshot
from tests.small import Denoiser, converted, inputs


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index of nested settings."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


PLACES = [place for place in places(saved().settings) if place != ("fingerprint",)]


def replaced(place: tuple[Any, ...], value: Any) -> Files:
    files = adapter()
    tree = files.settings
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value
    return files


def check_settings(files: Files) -> None:
    """Refused if only changed; refused or sound if signed too, in the file or in the copy kept with the tensors."""
    with Scratch() as folder:
        files.write(folder)
        if files.text() != saved().text():
            assert isinstance(loaded(folder), SurgeryError)
        signed = files.signed()
        signed.write(folder)
        outcome = loaded(folder)
        if isinstance(outcome, nn.Module):
            assert same(outcome, signed)
        (folder / SETTINGS).write_text(saved().text())
        assert type(loaded(folder)) is type(outcome)


@given(place=st.sampled_from(PLACES), value=st.sampled_from(BAD_VALUES))
def test_a_value_of_another_kind(place: tuple[Any, ...], value: Any) -> None:
    check_settings(replaced(place, value))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_value_of_every_other_kind(place: tuple[Any, ...]) -> None:
    for value in BAD_VALUES:
        check_settings(replaced(place, value))


@pytest.mark.parametrize("place", [place for place in PLACES if isinstance(place[-1], str)], ids=str)
def test_a_missing_key(place: tuple[Any, ...]) -> None:
    files = replaced(place, None)
    tree = functools.reduce(lambda inner, key: inner[key], place[:-1], files.settings)
    del tree[place[-1]]
    check_settings(files)


EXTREMES: list[dict[str, Any]] = [
    {"target_share": 0.0}, {"target_share": 1e-300}, {"target_share": 1.0}, {"target_ratio": 5e-324}, {"ratio_loss_weight": 1e308},
    {"max_ratio": 5e-324, "target_ratio": 0.0, "initial_ratio": 0.0}, {"bins": [0.0, 1.0]}, {"cost": "latency"},
    {"cost": "flops", "target_share": 0.5}, {"gate": "sigmoid"}, {"branches": "boundary"}, {"share_routing": 3}, {"share_routing": 1000},
    {"timestep_regions": 1000}, {"timestep_regions": 1}, {"region_weights": [1e308, 0, 0, 0]}, {"region_weights": [1e308] * 4},
    {"timestep_argument": "x"}, {"timestep_argument": "auto"}, {"learn_ratios": False}, {"blocks": ".*"}, {"blocks": ""},
    {"initial_ratio": 0.9},
]  # fmt: skip
RANGES = [[0, 1e300], [-1e300, 1e300], [0, 1e308], [-1e308, 1e308], [5e-324, 1e-323], [1000, 0], [0, 0], [99, 901], [101, 899], [True, 2]]


@pytest.mark.parametrize("changes", EXTREMES, ids=str)
def test_settings_that_are_legal_and_extreme(changes: dict[str, Any]) -> None:
    files = adapter()
    files.settings["config"].update(changes)
    check_settings(files)


@pytest.mark.parametrize("span", RANGES, ids=str)
def test_ranges_of_the_timestep(span: list[float]) -> None:
    """The regions that were settled count, not those of the configuration."""
    files = adapter()
    files.settings["regions"].update(low=span[0], high=span[1])
    check_settings(files)


@pytest.mark.parametrize("version", [0, 1, 3, "2", 2.0, True, None, -2, [2], 10**400, NAN], ids=lambda value: repr(value)[:10])
def test_other_versions(version: Any, folder: Path) -> None:
    replaced(("version",), version).signed().write(folder)
    refused(folder, "version", repr(version)[:20])


def test_a_key_that_stands_twice_counts_once(folder: Path) -> None:
    text = saved().text()
    twice = text.replace('"version": 2,', '"version": 3, "version": 2,', 1)
    assert twice != text
    (folder / SETTINGS).write_text(twice)
    assert isinstance(loaded(folder), nn.Module)
    (folder / SETTINGS).write_text(text.replace('"version": 2,', '"version": 2, "version": 3,', 1))
    refused(folder, "version 3")


@pytest.mark.parametrize("name", ["achieved_ratio", "config", "sites", "left_out", "regions", "version", "model_class", "another"])
def test_nested_just_as_deep_as_can_be_read(name: str, folder: Path) -> None:
    """What Python reads at one place it may not be able to write or show at another, a few calls deeper."""
    body = json.dumps({key: value for key, value in saved().settings.items() if key != name})
    for depth in range(850, 1010):
        (folder / SETTINGS).write_text(f'{body[:-1]}, "{name}": {"[" * depth}{"]" * depth}}}')
        refused(folder)


@pytest.mark.parametrize("path", ["__class__", "diffcr.plan", "blocks", "", "blocks.99", "blocks.0.qkv", "../blocks.0", "\0", "b" * 5000])
def test_sites_the_model_does_not_have(path: str, folder: Path) -> None:
    for blocks in (None, r"blocks\.[012]", ".*"):
        files = replaced(("sites", 0, "path"), path)
        files.settings["config"]["blocks"] = blocks
        files.signed().write(folder)
        refused(folder)


def test_sites_in_another_order_or_twice_or_none(folder: Path) -> None:
    rows = saved().settings["sites"]
    for wrong in (rows[::-1], [rows[0], *rows], rows[:2], [], [rows[0]] * 3):
        replaced(("sites",), wrong).signed().write(folder)
        refused(folder, "blocks.0")


@given(
    copied=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_json_as_the_copy_kept_with_the_tensors(copied: Any) -> None:
    with Scratch() as folder:
        saved().write(folder, json.dumps(copied))
        refused(folder, TENSORS)


# --- an expression that never ends -------------------------------------------------------------------------------------
@functools.cache
def _filtered(expression: str) -> Files:
    model = converted(blocks=expression)
    with tempfile.TemporaryDirectory() as folder:
        dcs.save_adapter(model, folder)
        return read(Path(folder))


def filtered(expression: str) -> Files:
    """An adapter of some blocks, to spoil."""
    return copy.deepcopy(_filtered(expression))


def test_a_filter_is_kept_and_its_blocks_alone_are_routed(tmp_path: Path) -> None:
    files = filtered(r"blocks\.[02]")
    files.write(tmp_path)
    model = loaded(tmp_path)
    assert isinstance(model, nn.Module)
    assert [site.path for site in model.diffcr.plan.routed_sites] == ["blocks.0", "blocks.2"]
    assert model.diffcr.config.blocks == r"blocks\.[02]"


@pytest.mark.parametrize(
    "left_out", [*BAD_VALUES, ["blocks.1", None], [["blocks.1"]], ["\ud800"], {"blocks.1": 1}], ids=lambda v: repr(v)[:15]
)
def test_blocks_left_out_by_a_filter(left_out: Any, tmp_path: Path) -> None:
    """Paths, among them the one that was; anything else is refused."""
    files = filtered(r"blocks\.[02]")
    assert files.settings["left_out"] == ["blocks.1"]
    files.settings["left_out"] = left_out
    files.signed().write(tmp_path)
    refused(tmp_path)


def test_a_filter_on_a_model_with_more_blocks_is_refused(tmp_path: Path) -> None:
    """The expression could mean the new block too, and is not asked."""
    filtered(r"blocks\.\d").write(tmp_path)
    deeper = Denoiser()
    deeper.blocks.append(copy.deepcopy(deeper.blocks[0]))
    before = snapshot(deeper)
    with pytest.raises(AdapterError, match=r"belongs to a model with .*'blocks\.3'"):
        dcs.load_adapter_(deeper, tmp_path, inputs(100.0, 900.0))
    assert snapshot(deeper) == before
