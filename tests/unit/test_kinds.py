"""Which block calls one proof serves: blocks of one class that differ in anything are proven apart, and those that do not, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery.sites import site_calls
from diffcr_surgery.trace import Trace

WIDTH, TOKENS, WINDOW = 8, 8, 4


def local(tokens: int, window: int) -> Tensor:
    """A mask that lets tokens see their own window: their places count then."""
    places = torch.arange(tokens) // window
    return torch.zeros(tokens, tokens).masked_fill(places[:, None] != places, float("-inf"))


class Processor:
    def __init__(self, window: int) -> None:
        self.window = window

    def __call__(self, tokens: int) -> Tensor:
        return local(tokens, self.window)


class Block(nn.Module):
    """Holds its window in one way or another."""

    def __init__(self, window: Any = None, mask: Callable[[int], Tensor] | None = None, table: Tensor | None = None) -> None:
        super().__init__()
        self.window, self.mask = window, mask
        self.register_buffer("table", table)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        windows = (self.window[0] if self.window else tokens) if self.table is None else int(self.table[0])
        mask = local(tokens, windows) if self.mask is None else self.mask(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, mask))
        return x + self.mlp(x)


def made(how: str, window: int) -> Block:
    """A block with a window, told by an attribute of another kind."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "tuple": lambda: {"window": None if window == TOKENS else (window,)},
        "object": lambda: {"mask": Processor(window)},
        "partial": lambda: {"mask": functools.partial(local, window=window)},
        "function": lambda: {"mask": lambda tokens: local(tokens, window)},
        "method": lambda: {"mask": Processor(window).__call__},
        "buffer": lambda: {"table": torch.tensor([window])},
    }
    return Block(**ways[how]())


class Model(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


each_way = pytest.mark.parametrize("how", ["tuple", "object", "partial", "function", "method", "buffer"])


@each_way
@pytest.mark.parametrize("windows", [(TOKENS, WINDOW), (WINDOW, TOKENS)])
def test_blocks_that_differ_in_an_attribute_are_proven_apart(how: str, windows: tuple[int, int]) -> None:
    model = Model(*(made(how, window) for window in windows)).eval()
    assert [site.routed for site in dcs.plan(model, (torch.randn(2, TOKENS, 3),)).sites] == [window == TOKENS for window in windows]


@each_way
def test_blocks_that_are_alike_are_proven_once(how: str) -> None:
    model = Model(*(made(how, TOKENS) for _ in range(3))).eval()
    recorded = Trace(model, (torch.randn(2, TOKENS, 3),))
    assert len({block.kind for block in recorded.recording.blocks.values()}) == 1
    assert all(call.alignment.routable for call in site_calls(recorded.recording))


def test_conjugates_and_packed_weights_are_no_obstacle() -> None:
    """Two blocks with packed weights of their own are of one kind."""

    class Packed(Block):
        def __init__(self) -> None:
            super().__init__(None)
            self.angles = torch.randn(4, dtype=torch.complex64).conj()
            self.register_buffer("packed", torch.randint(256, (300, 300), dtype=torch.uint8))

    blocks = [Packed(), Packed()]
    blocks[1].angles = blocks[0].angles
    recorded = Trace(Model(*blocks).eval(), (torch.randn(2, TOKENS, 3),))
    assert len({block.kind for block in recorded.recording.blocks.values()}) == 1
