"""What the testing kit says when something does not hold: the comparison of trees, and the laws of a pattern, case by case."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import find, settings
from hypothesis.errors import NoSuchExample
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery import testing as dt
from diffcr_surgery.testing import pattern_law
from diffcr_surgery.testing.by_hand import bracket, gather, kept_count
from diffcr_surgery.testing.compare import first_difference, same, snapshot, what_changed


def test_without_hypothesis_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import diffcr_surgery.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'diffcr_surgery[testing]'" in done.stderr


@pytest.mark.parametrize(
    ("actual", "expected", "text"),
    [
        ({"x": torch.ones(2)}, {"y": torch.ones(2)}, r"law: it: a dict of the tensors \['x'\]; expected a dict of \['y'\]"),
        (torch.ones(2), torch.ones(3), r"law: it is \(2,\) torch.float32; expected \(3,\) torch.float32"),
        (torch.ones(2), torch.ones(2).double(), r"expected \(2,\) torch.float64"),
        ({"x": torch.tensor([[1, 2]])}, {"x": torch.tensor([[1, 3]])}, r"law: it\.x\[0, 1\] is 2; expected 3\. Token 1\."),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), r"it\[1\] is nan; expected 2"),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0]), r"it\[1\] is inf; expected 2"),
        (torch.tensor([2**53 + 1]), torch.tensor([2**53]), r"it\[0\] is 9007199254740993; expected 9007199254740992"),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), r"it\[0\] is \(1\+1j\); expected \(1\+2j\)"),
        ((torch.ones(1), 5), (torch.ones(1), 7), r"beside its tensors it is .*, 5\); expected .*, 7\)"),
        ((torch.ones(1), [5]), (torch.ones(1), (5,)), r"beside its tensors it is .*\[5\]\); expected .*\(5,\)\)"),
    ],
)
def test_differences_are_named(actual: Any, expected: Any, text: str) -> None:
    with pytest.raises(dt.LawError, match=text):
        same("law", "it", actual, expected, describe=lambda path, index: f"Token {index[-1]}." if path else "")


def test_what_is_equal_passes() -> None:
    same("law", "it", {"x": torch.tensor([torch.nan, 1.0])}, {"x": torch.tensor([torch.nan, 1.0])})
    same("law", "it", torch.tensor([100.0]), torch.tensor([100.5]), tolerance=0.01)
    assert first_difference(torch.tensor([0.5, 100.0]), torch.tensor([0.0, 100.0]), 0.01) is None  # in units of the largest entry
    assert first_difference(torch.empty(0), torch.empty(0)) is None
    assert first_difference(torch.zeros(1), torch.full((1,), 1e-8), 1e-4) is None  # where all is next to nothing
    same("law", "it", (torch.ones(1), object()), (torch.ones(1), object()))  # a cache, say, that each model has of its own


def test_snapshots_show_what_changed() -> None:
    model = dt.Denoiser(dt.Architecture()).bfloat16()
    before = snapshot(model)
    assert what_changed(before, snapshot(model)) == []
    model.blocks[0].out.bias.data[0] += 1
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    after = snapshot(model)
    model.embed.weight.grad.add_(1)
    assert what_changed(after, snapshot(model)) == ["tensor embed.weight"]
    model.embed.weight.grad = None
    model.blocks[0].norm1.eps = 1.0
    model.head.register_forward_hook(lambda *_: None)
    torch.rand(1)
    assert what_changed(before, snapshot(model)) == [
        "module blocks.0.norm1", "module head", "tensor blocks.0.out.bias", "the random state",
    ]  # fmt: skip


def test_arithmetic_by_hand() -> None:
    assert [kept_count(ratio, 10) for ratio in (0.0, 0.3, 0.7, 0.95, 1.0)] == [10, 7, 3, 1, 1]
    assert bracket(0.35, (0.0, 0.1, 0.3, 0.5)) == [(pytest.approx(0.75), 0.3), (pytest.approx(0.25), 0.5)]
    assert bracket(0.0, (0.0, 0.5))[0] == (1.0, 0.0) and bracket(0.5, (0.0, 0.5))[1] == (1.0, 0.5)
    table, kept = torch.arange(5.0), torch.tensor([0, 2])
    assert gather(table, ["m+n"], kept, 3).tolist() == [0, 1, 2, 4]
    assert gather(table, ["n+m"], kept, 3).tolist() == [0, 2, 3, 4]
    assert gather(table, ["n-m"], torch.tensor([0, 3, 5]), 7).tolist() == [1, 3]
    assert gather(torch.arange(9.0).reshape(3, 3), ["n", "n"], kept, 3).tolist() == [[0, 2], [6, 8]]


def pattern(block: nn.Module, **inputs: str) -> dcs.BlockPattern:
    named = {name.replace("__", "."): words for name, words in inputs.items()}
    return dcs.BlockPattern("planted", f"{type(block).__module__}:{type(block).__qualname__}", named)


class Sorting(nn.Module):
    """Takes tokens in any order; returns as many, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1].expand(-1, 6 - x.shape[1], -1)], 1) if x.shape[1] < 6 else x


class Summing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class Telling(nn.Module):
    """Its second output tells the first token from the others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x[:, 0]


class Growing(nn.Module):
    """Its second output has as many entries as the first token says."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x[:, : 1 + int(x[0, 0, 0] > x[0, 1, 0])]


class Picky(nn.Module):
    """Cannot bear a mask that hides anything."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not mask.all():
            raise ValueError("a token is hidden")
        return x * mask[..., None]


class Curt(nn.Module):
    """Takes six tokens, and of any other number only says that something is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 6:
            raise ValueError
        return 2 * x


@pytest.mark.parametrize(
    ("block", "inputs", "axes", "text"),
    [
        (Sorting(), {"x": torch.randn(2, 6, 4)}, {"x": "b n c"}, "given half of the tokens, it still returns 6"),
        (Summing(), {"x": torch.randn(2, 6, 4)}, {"x": "b n c"}, "none of its outputs has the form of 'x'"),
        (Telling(), {"x": torch.randn(2, 6, 4)}, {"x": "b n c"}, "with the tokens permuted, its output 1 changes by .*, and should not"),
        (Summing(), {"x": torch.randn(2, 6)}, {"x": "b n c"}, r"writes 'b n c' for 'x', which has the shape \(2, 6\)"),
        (nn.Flatten(0, 1), (torch.randn(2, 6, 4),), {"input": "b n c"}, "none of its outputs has the form"),
        (Curt(), {"x": torch.randn(2, 6, 4)}, {"x": "b n c"}, "the block raises ValueError on permuted or on fewer tokens"),
    ],
    ids=["as many as ever", "no stream", "another output", "other axes", "positional", "no words"],
)
def test_blocks_that_are_no_sets(block: nn.Module, inputs: Any, axes: dict[str, str], text: str) -> None:
    with pytest.raises(dt.LawError, match=text):
        dt.check_pattern(pattern(block, **axes), block, inputs)


def test_a_machine_without_memory_says_nothing_about_a_pattern() -> None:
    left: list[int] = []  # calls until memory is full

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("full")
            return 2 * x

    x = torch.randn(2, 6, 4)
    left[:] = [10_000]
    dt.check_pattern(pattern(Large(), x="b n c"), Large(), {"x": x})
    for calls in range(1, 10_001 - left[0]):
        left[:] = [calls]
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            dt.check_pattern(pattern(Large(), x="b n c"), Large(), {"x": x})


def test_an_output_that_changes_its_shape_is_named() -> None:
    block, x = Growing(), torch.randn(1, 6, 4)
    with pytest.raises(dt.LawError, match="its output 1 changes"):
        for seed in range(20):  # whether it does depends on the draw
            torch.manual_seed(seed)
            dt.check_pattern(pattern(block, x="b n c"), block, {"x": x + torch.randn_like(x)})


def test_a_declared_argument_that_is_not_in_what_is_given_is_refused() -> None:
    block, angles = dt.Denoiser(dt.Architecture(rotary="shared")).blocks[0], torch.randn(5, 4)
    call = {"x": torch.randn(2, 5, 4), "rotary": (angles.cos(), angles.sin())}
    true = {"x": "b n c", "rotary__0": "n d", "rotary__1": "n d"}
    for wrong in ("rotary.2", "rotary", "rotary.0.cos"):
        text = f"declares ['{wrong}']; the call's tensors are ['rotary.0', 'rotary.1', 'x']"
        with pytest.raises(dt.LawError, match=re.escape(text)):
            dt.check_pattern(pattern(block, **true, **{wrong: "n d"}), block, call)
    dt.check_pattern(pattern(block, **true, rotary="-", bias="b 1 1 n", skip="b n c"), block, call | {"skip": None})  # not tested


def test_masks_a_block_cannot_bear_shaken_stay_as_they_are() -> None:
    block, mask = Picky(), torch.ones(2, 6, dtype=torch.bool)
    trial = pattern_law._Trial(pattern(block, x="b n c", mask="b n"), block, {"x": torch.randn(2, 6, 4), "mask": mask})
    assert torch.equal(trial.given[1]["mask"], mask)


def test_a_pattern_that_moves_too_much_is_told_so() -> None:
    block = dt.Denoiser(dt.Architecture(block="joint")).blocks[0]
    call = {"x": torch.randn(2, 5, 4), "text": torch.randn(2, 5, 4)}
    dt.check_pattern(pattern(block, x="b n c"), block, call)
    with pytest.raises(dt.LawError, match="It holds if 'text' does not move"):
        dt.check_pattern(pattern(block, x="b n c", text="b n c"), block, call)


def test_a_square_bias_is_found_to_be_missing() -> None:
    block = dt.Denoiser(dt.Architecture(bias="pairs")).blocks[0]
    call = {"x": torch.randn(2, 5, 4), "bias": torch.randn(5, 5)}
    with pytest.raises(dt.LawError, match="'bias' has to move with the tokens too, as 'n n'"):
        dt.check_pattern(pattern(block, x="b n c"), block, call)


def test_a_table_longer_than_the_stream_is_found_to_be_missing() -> None:
    block, angles = dt.Denoiser(dt.Architecture(block="joint", bias="keys")).blocks[0], torch.randn(2, 1, 1, 8)
    call = {"x": torch.randn(2, 5, 4), "text": torch.randn(2, 3, 4), "bias": angles}
    with pytest.raises(dt.LawError, match=r"'bias' has to move with the tokens too, as 'b . . m\+n'"):
        dt.check_pattern(pattern(block, x="b n c"), block, call)


def test_the_proof_refuses_text_declared_to_move_in_a_layout_of_its_own() -> None:
    """Two samples, two tokens, two words: left alone, the text has its batch axis in front, unlike the stream."""
    block, angles = dt.Denoiser(dt.Architecture(block="cross", rotary="shared", layout="n b c")).blocks[0], torch.randn(2, 4)
    call = {"x": torch.randn(2, 2, 4), "text": torch.randn(2, 2, 4), "rotary": (angles.cos(), angles.sin())}
    mark, true = torch.ones(2, 2, dtype=torch.bool), {"x": "n b c", "rotary.0": "n d", "rotary.1": "n d"}
    sample = pattern_law.BlockSample(block, (), call)
    assert pattern_law.align_block(sample, {"x": mark}, true, search=False).routable
    found = pattern_law.align_block(sample, {"x": mark}, true | {"text": "b n c"}, search=False)
    assert not found.routable and "['text'] need not move" in found.reason


def test_a_proof_that_disagrees_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    block, angles = dt.Denoiser(dt.Architecture(rotary="shared")).blocks[0], torch.randn(5, 4)
    call = {"x": torch.randn(2, 5, 4), "rotary": (angles.cos(), angles.sin())}
    true = pattern(block, x="b n c", rotary__0="n d", rotary__1="n d")
    align = pattern_law.align_block
    with monkeypatch.context() as patch:
        patch.setattr(
            pattern_law, "align_block", lambda *given, **how: dataclasses.replace(align(*given, **how), routable=False, reason="no")
        )
        with pytest.raises(dt.LawError, match="is true, but the library's proof rejects it: no"):
            dt.check_pattern(true, block, call)
    monkeypatch.setattr(pattern_law, "align_block", lambda *given, **how: dataclasses.replace(align(*given, **how), routable=True))
    with pytest.raises(dt.LawError, match=r"proof accepts 'planted' without 'rotary\.\d', which has to move"):
        dt.check_pattern(true, block, call)


class Noisy(nn.Module):
    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x * noise


class Timed(nn.Module):
    def forward(self, x: Tensor, time_steps: Tensor) -> Tensor:
        return x * time_steps


def test_settings_have_regions_where_there_is_a_timestep() -> None:
    for drawn in (dt.configs(Timed()), dt.configs(Noisy(), timestep_argument="noise"), dt.configs()):
        find(drawn, lambda config: config.timestep_regions == 4)
    for drawn in (dt.configs(Noisy()), dt.configs(dt.Denoiser(dt.Architecture()))):
        with pytest.raises(NoSuchExample):
            find(drawn, lambda config: config.timestep_regions > 1, settings=settings(max_examples=50))


def test_settings_weight_their_regions_or_not() -> None:
    for regions in (1, 3):
        find(dt.configs(timestep_regions=regions), lambda config: config.region_weights is None)
    weighted = find(dt.configs(timestep_regions=3), lambda config: config.region_weights is not None)
    assert weighted.region_weights == (1, 1, 1)
    with pytest.raises(NoSuchExample):
        find(dt.configs(timestep_regions=1), lambda config: config.region_weights is not None, settings=settings(max_examples=50))


def test_settings_have_a_bound_among_any_bins() -> None:
    assert find(dt.configs(bins=(0.0, 0.3)), lambda config: True).max_ratio == 0.3
