"""What `convert_` checks and leaves: plans of other models, slices of a converted Sequential, calls in which a block is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import AlignmentError, ConversionError
from tests.unit.test_runtime import Block, Denoiser, converted, inputs


class Bypassable(Block):
    def forward(self, x: Tensor, c: Tensor, attend: bool = True) -> Tensor:
        return super().forward(x, c) if attend else x + self.mlp(x)


class Choosing(Denoiser):
    """A caller may leave the attention of its last block out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Bypassable()

    def forward(self, x: Tensor, t: Tensor, attend: bool = True) -> Tensor:
        x, c = self.embed(x), self.time(t[:, None] / 1000)
        return self.head(self.blocks[1](self.blocks[0](x, c), c, attend))


def test_a_planned_block_that_is_none_in_a_call_is_refused_and_not_run_dense() -> None:
    model = converted(Choosing(), ratio=0.5)
    for _ in range(2):
        with pytest.raises(AlignmentError, match=r"blocks\.1 \(Bypassable\) was planned as routed, but in this call"):
            model(**inputs(), attend=False)
    model(**inputs())


@pytest.mark.parametrize("depth", [1, 3])
def test_a_plan_of_a_deeper_or_shallower_model_is_refused(depth: int) -> None:
    planned = dcs.plan(Denoiser(depth=2), inputs())
    with pytest.raises(ConversionError, match=r"blocks\.\d"):
        dcs.convert_(Denoiser(depth=depth), planned)


def test_a_plan_of_a_wider_model_is_refused() -> None:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)))
    wider = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, norm_first=True) for _ in range(2)))
    planned = dcs.plan(model.eval(), (torch.randn(2, 10, 8),))
    with pytest.raises(ConversionError, match="another Sequential: 0 is not in both, or has weights of other shapes here"):
        dcs.convert_(wider, planned)
    dcs.convert_(copy.deepcopy(model), planned)


def test_a_slice_of_a_converted_sequential_is_a_model_of_its_own() -> None:
    layers: list[Any] = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(3)]
    model, stream = nn.Sequential(*layers).eval(), torch.randn(2, 10, 8)
    wanted = model[:2](stream)
    dcs.convert_(model, (stream,), dcs.DiffCRConfig(initial_ratio=0.5))
    assert type(model[:2]) is nn.Sequential and torch.equal(model[:2](stream), wanted)
    assert list(model[1:]) == layers[1:] and model[-1] is layers[2] and model[0] is layers[0]
    with pytest.raises(IndexError):
        model[3]
