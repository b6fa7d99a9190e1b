"""Adapter files from anyone: whatever is in them, loading raises a `SurgeryError` and leaves the model as it was, or gives what they say.

Most attacks are *signed*: they carry the right fingerprint, which anyone can compute, so that what lies behind it is reached.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import AdapterError, SurgeryError
from diffcr_surgery.save import MAX_HEADER_BYTES, MAX_SETTINGS_BYTES, SETTINGS, TENSORS, _fingerprint
from tests.models import snapshot
from tests.unit.test_optimizer import Denoiser, converted, inputs

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the sound adapter."""
    saved().write(tmp_path)
    return tmp_path


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


def test_the_sound_adapter_loads(folder: Path) -> None:
    """What every refusal below is measured against; a signature made here is the one that was saved."""
    model = loaded(folder)
    assert isinstance(model, nn.Module) and same(model, saved())
    assert adapter().signed().settings == saved().settings


# --- bytes -----------------------------------------------------------------------------------------------------------
def content(name: str) -> bytes:
    return saved().text().encode() if name == SETTINGS else save(saved().tensors, {SETTINGS: saved().text()})


each_file = pytest.mark.parametrize("name", [SETTINGS, TENSORS])


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


# --- settings --------------------------------------------------------------------------------------------------------
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


# --- tensors ---------------------------------------------------------------------------------------------------------
def raw(entries: dict[str, Any], data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file made by hand."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entries() -> tuple[dict[str, Any], bytes]:
    """The header and the data of the sound file, to be spoiled."""
    whole = content(TENSORS)
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


NAMES = sorted(saved().tensors)
each_tensor = pytest.mark.parametrize("tensor", NAMES)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, MAX_HEADER_BYTES])
def test_declared_length_of_the_header(length: int, folder: Path) -> None:
    header, data = entries()
    (folder / TENSORS).write_bytes(raw(header, data, length=length))
    refused(folder, TENSORS)


@each_tensor
@pytest.mark.parametrize("dtype", ["F64", "F16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "F33", "", None, 3])
def test_declared_dtype(tensor: str, dtype: Any, folder: Path) -> None:
    header, data = entries()
    header[tensor]["dtype"] = dtype
    (folder / TENSORS).write_bytes(raw(header, data))
    refused(folder, TENSORS)


@each_tensor
@pytest.mark.parametrize("shape", [
    [], [0], [1], [2**40], [2**63], [2**64], [-1], [0, 2**62], [1.5], None, "3", [2**32, 2**32], [[3]], [1] * 100, [None], [2**31, 2**33],
], ids=str)  # fmt: skip
def test_declared_shape(tensor: str, shape: Any, folder: Path) -> None:
    header, data = entries()
    header[tensor]["shape"] = shape
    (folder / TENSORS).write_bytes(raw(header, data))
    refused(folder, TENSORS)


@each_tensor
@pytest.mark.parametrize(
    "offsets", [[0, 0], [0, 4], [4, 0], [-4, 0], [0, 2**40], [2**63, 2**63 + 32], [10**6, 10**6 + 32], [0], None, ["0", "32"]], ids=str
)
def test_declared_offsets(tensor: str, offsets: Any, folder: Path) -> None:
    header, data = entries()
    if header[tensor]["data_offsets"][0] == 0 and offsets == header[tensor]["data_offsets"]:
        pytest.fail("this is the sound one")
    header[tensor]["data_offsets"] = offsets
    (folder / TENSORS).write_bytes(raw(header, data))
    refused(folder, TENSORS)


@each_tensor
@pytest.mark.parametrize(
    "name", ["../../x", "/x", "C:\\x", "a\0b", "n" * 10_000, "\N{PILE OF POO}", "", "__metadata__", "routers.0.__class__", "plan"]
)
def test_names(tensor: str, name: str, folder: Path) -> None:
    """A name is never more than a name."""
    files = adapter()
    moved = files.tensors.pop(tensor)
    header, data = entries()
    header[name] = header.pop(tensor)
    (folder / TENSORS).write_bytes(raw(header, data))
    refused(folder, TENSORS)
    if name != "__metadata__":
        Files(files.settings, files.tensors | {name: moved}).signed().write(folder)
        refused(folder, TENSORS)


SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[0], lambda t: t[None], lambda t: t.flatten(), lambda t: t[:0], lambda t: t[:, :0], lambda t: t.T, lambda t: t.repeat(2, 1),
    lambda t: t[0, 0], lambda t: t[:, :1], lambda t: t.repeat(1, 3),
]  # fmt: skip


@each_tensor
@pytest.mark.parametrize("reshape", range(len(SHAPES)))
def test_signed_shapes(tensor: str, reshape: int, folder: Path) -> None:
    files = adapter()
    files.tensors[tensor] = SHAPES[reshape](files.tensors[tensor]).clone(memory_format=torch.contiguous_format)
    files.signed().write(folder)
    refused(folder, TENSORS, tensor)


DTYPES = [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int32]


@each_tensor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signed_dtypes(tensor: str, dtype: torch.dtype, folder: Path) -> None:
    files = adapter()
    files.tensors[tensor] = files.tensors[tensor].to(dtype)
    files.signed().write(folder)
    refused(folder, TENSORS, tensor)


@each_tensor
def test_signed_tensor_is_missing(tensor: str, folder: Path) -> None:
    files = adapter()
    del files.tensors[tensor]
    files.signed().write(folder)
    refused(folder, TENSORS, tensor)


SPOILED = [NAN, INFINITY, -INFINITY, -1.0, -1e-30, -0.0, 0.0, 1e-45, 1e-38, 0.999, 1.0, 1.5, 3e38]


@each_tensor
@given(data=st.data())
def test_signed_values(tensor: str, data: st.DataObject) -> None:
    """Some entries or all; what loads has the values of the file."""
    files = adapter()
    values = files.tensors[tensor]
    places = data.draw(st.just(range(values.numel())) | st.lists(st.integers(0, values.numel() - 1), min_size=1, max_size=4))
    for place in places:
        values.view(-1)[place] = data.draw(st.sampled_from(SPOILED))
    with Scratch() as folder:
        files.signed().write(folder)
        outcome = loaded(folder)
        if isinstance(outcome, nn.Module):
            assert same(outcome, files)
        assert isinstance(outcome, nn.Module | AdapterError)
        if not values.isfinite().all() or ("routers" not in tensor and (values < 0).any()):
            assert isinstance(outcome, AdapterError)


@pytest.mark.parametrize("value", [NAN, INFINITY, -0.1, 0.0, 3e38, 1.1, "rising", "first column zero"])
def test_costs_that_are_none(value: Any, folder: Path) -> None:
    files = adapter()
    costs = files.tensors["site_costs"]
    if value == "rising":
        costs[1] = costs[1].flip(0)
    elif value == "first column zero":
        costs[2] = 0.0
    else:
        costs.fill_(value)
    files.signed().write(folder)
    refused(folder, "site_costs")


def test_weights_that_are_finite_only_in_the_file(folder: Path) -> None:
    """1e300 is a number in double precision, and infinite in the router it would be copied to."""
    files = adapter()
    files.tensors["routers.1.weight"] = files.tensors["routers.1.weight"].double().fill_(1e300)
    files.signed().write(folder)
    refused(folder, "routers.1.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions_load(dtype: torch.dtype, folder: Path) -> None:
    files = adapter()
    files.tensors["routers.1.weight"] = files.tensors["routers.1.weight"].to(dtype)
    files.signed().write(folder)
    model = loaded(folder)
    assert isinstance(model, nn.Module)
    assert torch.equal(model.diffcr.routers["1"].weight, files.tensors["routers.1.weight"].float())


# --- bombs, and files that are none ----------------------------------------------------------------------------------
SCRIPT = """
import resource, sys, warnings
from pathlib import Path
import torch
import diffcr_surgery as dcs
from tests.unit.test_optimizer import Denoiser, inputs

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
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in names)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
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
