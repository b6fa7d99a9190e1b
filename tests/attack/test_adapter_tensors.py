"""Adapters whose tensors are not those that were saved: by the file's header, or by their values under a fingerprint that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffcr_surgery.errors import AdapterError
from diffcr_surgery.save import MAX_HEADER_BYTES, TENSORS
from tests.attack.adapters import (
    INFINITY,
    NAN,
    Files,
    Scratch,
    adapter,
    content,
    loaded,
    raw,
    refused,
    same,
    saved,
)


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


WRONG = {
    "dtype": ["F64", "F16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "F33", "", None, 3],
    "shape": [
        [], [0], [1], [2**40], [2**63], [2**64], [-1], [0, 2**62], [1.5], None, "3", [2**32, 2**32], [[3]], [1] * 100, [None],
        [2**31, 2**33],
    ],
    "data_offsets": [
        [0, 0], [0, 4], [4, 0], [-4, 0], [0, 2**40], [2**63, 2**63 + 32], [10**6, 10**6 + 32], [0], None, ["0", "32"],
    ],
}  # fmt: skip


@each_tensor
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values], ids=str)
def test_what_is_declared_of_a_tensor(tensor: str, field: str, value: Any, folder: Path) -> None:
    header, data = entries()
    assert header[tensor][field] != value
    header[tensor][field] = value
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
            assert isinstance(outcome, AdapterError) and tensor in str(outcome)


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
