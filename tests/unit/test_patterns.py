"""Declared patterns: what is malformed, which one a block gets, the proof they face, and plug-ins."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcr_surgery as dcs
from diffcr_surgery import patterns
from diffcr_surgery.errors import PatternError
from diffcr_surgery.patterns import BlockPattern, pattern_of, register_pattern

WIDTH, TOKENS, TEXT = 8, 6, 6  # as many words as tokens: only the axes tell them apart


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(patterns, "_REGISTRY", {})
    yield


def target(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


class Block(nn.Module):
    """Attention with positions from a shared table and with text, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.read = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, table: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + functional.scaled_dot_product_attention(q * table, k * table, v)
        x = x + functional.scaled_dot_product_attention(x, *self.read(text).chunk(2, -1))
        return x + self.mlp(x)


class Special(Block):
    pass


class MoreSpecial(Special):
    pass


class Denoiser(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.table, text=text)
        return x


INPUTS = {"x": torch.randn(2, TOKENS, WIDTH), "text": torch.randn(2, TEXT, WIDTH)}
RIGHT = {"x": "b n c", "table": "n c"}


# --- a pattern is checked when it is made ----------------------------------------------------------------------------
def test_pattern_is_a_frozen_value_that_keeps_order() -> None:
    given = {"x": "b n c", "table": "n c"}
    pattern = BlockPattern("mine", "pkg.mod:Class", given, ("b n c",))
    given["text"] = "b n c"
    assert list(pattern.inputs.items()) == [("x", "b n c"), ("table", "n c")]
    assert pattern == pickle.loads(pickle.dumps(pattern))
    with pytest.raises(TypeError):
        pattern.inputs["x"] = "-"  # type: ignore[index]
    with pytest.raises(AttributeError):
        pattern.name = "yours"  # type: ignore[misc]


@pytest.mark.parametrize("wrong", ["", "Class", "pkg.mod.Class", ":Class", "pkg.mod:", None, 3, Block], ids=repr)
def test_target_is_text_of_module_and_class(wrong: Any) -> None:
    with pytest.raises(PatternError, match=r"Pattern 'mine': target .* is not of the form 'package\.module:Class'"):
        BlockPattern("mine", wrong, RIGHT)


@pytest.mark.parametrize("wrong", [{}, [], None, [("x", "b n c")], "b n c"], ids=repr)
def test_inputs_are_a_mapping(wrong: Any) -> None:
    with pytest.raises(PatternError, match="inputs must map argument paths to axis patterns"):
        BlockPattern("mine", "pkg.mod:Class", wrong)


@pytest.mark.parametrize("stream", ["b m c", "b m+n c", "b n n", "-"])
def test_first_input_is_the_stream(stream: str) -> None:
    with pytest.raises(PatternError, match="the first input is the routed stream and names 'n' once") as caught:
        BlockPattern("mine", "pkg.mod:Class", {"x": stream, "y": "b n c"})
    assert repr(stream) in str(caught.value)


@pytest.mark.parametrize("stream", ["batch n c", "n batch c", "h w n c"])
def test_a_stream_of_more_than_two_axes_names_its_batch(stream: str) -> None:
    """Else its first axis would be taken for tokens that all samples share."""
    with pytest.raises(PatternError, match=rf"Pattern 'mine': .* more than two axes names its batch 'b'.* got '{stream}'"):
        BlockPattern("mine", "pkg.mod:Class", {"x": stream})
    BlockPattern("mine", "pkg.mod:Class", {"x": "n c", "y": stream})


@pytest.mark.parametrize("axes", ["b n 2", "", "n m+n", None, ["b", "n", "c"]], ids=repr)
@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_axis_patterns_are_checked(where: str, axes: Any) -> None:
    inputs, outputs = ({"x": "b n c", "y": axes}, ()) if where == "inputs" else ({"x": "b n c"}, (axes,))
    with pytest.raises(PatternError, match="Axis pattern"):
        BlockPattern("mine", "pkg.mod:Class", inputs, outputs)


# --- registration ----------------------------------------------------------------------------------------------------
def test_registering_returns_the_pattern_and_may_be_repeated() -> None:
    pattern = BlockPattern("mine", target(Block), RIGHT)
    assert register_pattern(pattern) is pattern
    register_pattern(BlockPattern("mine", target(Block), dict(RIGHT)))  # a module imported twice
    assert pattern_of(Block()) == pattern


@pytest.mark.parametrize("other", [("yours", RIGHT), ("mine", {"x": "b n c"})], ids=["another name", "other axes"])
def test_a_class_has_one_pattern(other: tuple[str, Mapping[str, str]]) -> None:
    first = register_pattern(BlockPattern("mine", target(Block), RIGHT))
    with pytest.raises(PatternError, match=r"Block has the pattern 'mine' already.*subclass"):
        register_pattern(BlockPattern(other[0], target(Block), other[1]))
    assert pattern_of(Block()) is first


@pytest.mark.parametrize("wrong", [None, "pkg.mod:Class", {"x": "b n c"}, BlockPattern], ids=repr)
def test_only_patterns_are_registered(wrong: Any) -> None:
    with pytest.raises(PatternError, match=f"takes a BlockPattern, not {type(wrong).__name__}"):
        register_pattern(wrong)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_most_specific_class_wins_whatever_came_first(backwards: bool) -> None:
    made = [BlockPattern(cls.__name__, target(cls), RIGHT) for cls in (Block, Special)]
    for pattern in reversed(made) if backwards else made:
        register_pattern(pattern)
    found = [pattern_of(cls()) for cls in (Block, Special, MoreSpecial)]
    assert [pattern.name if pattern else None for pattern in found] == ["Block", "Special", "Special"]


def test_a_class_of_the_same_name_or_prefix_elsewhere_is_another() -> None:
    register_pattern(BlockPattern("elsewhere", "somewhere.else:Block", RIGHT))
    register_pattern(BlockPattern("prefix", target(Block)[:-1], RIGHT))
    assert pattern_of(Block()) is None


def test_a_pattern_imports_nothing() -> None:
    register_pattern(BlockPattern("absent", "no_such_library.blocks:Block", RIGHT))
    assert pattern_of(Block()) is None and "no_such_library" not in sys.modules


class Other(nn.Module):
    pass


class Both(Block, Other):
    pass


class Third(Both):
    pass


def test_two_patterns_equally_specific_are_a_tie() -> None:
    for cls in (Block, Other):
        register_pattern(BlockPattern(cls.__name__, target(cls), RIGHT))
    with pytest.raises(PatternError, match=r"Both is matched by the patterns 'Block' \(.*:Block\) and 'Other' \(.*:Other\), neither"):
        pattern_of(Both())
    settled = register_pattern(BlockPattern("both", target(Both), RIGHT))
    assert pattern_of(Both()) is settled and pattern_of(Third()) is settled


def test_a_class_is_known_by_the_names_it_is_exported_under() -> None:
    from diffusers.models import transformers
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(8, 2, 4)
    exported = register_pattern(
        BlockPattern("exported", f"{transformers.__name__}.pixart_transformer_2d:BasicTransformerBlock", {"x": "b n c"})
    )
    assert pattern_of(block) is exported
    register_pattern(BlockPattern("defined", target(BasicTransformerBlock), {"x": "b n c"}))
    with pytest.raises(PatternError, match=r"'exported' .* and 'defined'|'defined' .* and 'exported'"):
        pattern_of(block)


class Convolved(nn.Module):
    """No attention: the analysis sees no block here."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, table: Tensor, text: Tensor) -> Tensor:
        x = x + self.pool((x * table).mean(1, keepdim=True))
        return x + self.mlp(x)


def test_a_declared_class_is_a_block_whatever_it_does() -> None:
    with pytest.raises(dcs.SurgeryError, match="No block was found"):
        dcs.plan(Denoiser(Convolved), INPUTS)
    register_pattern(BlockPattern("pooled", target(Convolved), RIGHT))
    assert len(dcs.plan(Denoiser(Convolved), INPUTS).routed_sites) == 2


# --- the proof -------------------------------------------------------------------------------------------------------
def test_a_declared_pattern_takes_the_place_of_the_search() -> None:
    register_pattern(BlockPattern("right", target(Block), RIGHT))
    declared = dcs.plan(Denoiser(), INPUTS)
    assert [dict(site.aligned) for site in declared.routed_sites] == [RIGHT, RIGHT]
    assert all("proven" in site.reason for site in declared.routed_sites)


def test_the_search_finds_the_same() -> None:
    """What the refusals below are measured against."""
    assert [dict(site.aligned) for site in dcs.plan(Denoiser(), INPUTS).routed_sites] == [RIGHT, RIGHT]


def test_subclasses_face_the_pattern_of_their_parent() -> None:
    register_pattern(BlockPattern("of the parent", target(Block), {"x": "b n c"}))
    with pytest.raises(PatternError, match="'of the parent'"):
        dcs.plan(Denoiser(MoreSpecial), INPUTS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": "b n c"},  # positions stay behind
        {"x": "b n c", "table": "c n"},
        {"x": "b n c", "table": "b n c"},
        {"x": "b n c", "text": "b n c"},
        {"x": "b c n", "table": "n c"},
        {"text": "b n c", "table": "n c"},
        {"x": "b n c", "tables": "n c"},
        {"z": "b n c", "table": "n c"},
        {"x": "b n c", "table": "n c", "tabel": "n c"},  # misspelt
        {"x": "b n c", "table": "n c", "text": "b n c"},  # passes any permutation, and would throw words away
    ],
    ids=str,
)
def test_a_wrong_declaration_is_an_error_and_never_silent_noise(wrong: dict[str, str]) -> None:
    register_pattern(BlockPattern("planted", target(Block), wrong))
    model = Denoiser()
    with pytest.raises(PatternError) as caught:
        dcs.convert_(model, INPUTS, dcs.DiffCRConfig())
    for words in ("'planted'", target(Block), "blocks.0", str(wrong), "remove it"):
        assert words in str(caught.value)
    assert not hasattr(model, "diffcr") and type(model) is Denoiser
