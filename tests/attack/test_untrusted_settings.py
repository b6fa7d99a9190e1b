"""Configurations, axes and patterns from anyone: a `ConfigError`, a `PatternError`, or a sound value."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import diffcr_surgery as dcs
from diffcr_surgery import patterns
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.config import CONFIG_VERSION
from diffcr_surgery.errors import ConfigError, PatternError
from diffcr_surgery.patterns import BlockPattern, register_pattern
from diffcr_surgery.ratios import Budget
from diffcr_surgery.timesteps import TimestepRegions
from tests.small import LAYERS, Denoiser
from tests.small import inputs as inputs_of

many = settings(max_examples=25 * settings().max_examples)  # an example takes a millisecond
NAMES = [field.name for field in fields(dcs.DiffCRConfig)]
DEEP = functools.reduce(lambda inner, _: [inner], range(900), [])
HUGE = 10**400

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text(st.characters(categories=["Cs", "Cc"]))
    | st.sampled_from([HUGE, -HUGE, 10**9, 1e308, -1e308, 5e-324, "auto", "two", "(", "a{99999999999}", "[[a]", "(?u)(?a)a", DEEP])
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(NAMES), inner, max_size=4)
)
numbers = st.floats(0, 1) | st.floats() | st.integers()
likely = {
    "bins": st.lists(st.floats(0, 1), max_size=5).map(lambda bins: [0, *sorted(bins)]) | st.lists(numbers),
    "timestep_range": st.lists(numbers, min_size=2, max_size=2) | st.just([-1e308, 1e308]) | st.just([0, 1e308]),
    "timestep_regions": st.integers(1, 2000),
    "region_weights": st.lists(numbers, min_size=1, max_size=3) | st.just([1e308] * 2) | st.just([0, 0]),
    "share_routing": st.integers(-1, 2000),
    "blocks": st.from_regex(r"[a(+*?\\dbx)\[\].{},0-9|^$-]{0,20}", fullmatch=True),
    "timestep_argument": st.text(),
} | dict.fromkeys(["target_ratio", "target_share", "max_ratio", "initial_ratio", "ratio_loss_weight"], numbers)  # fmt: skip


@st.composite
def settings_like(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration's JSON with some values that are likely and some that are anything."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    values = {name: draw(likely[name] if name in likely and draw(st.integers(0, 3)) else anything) for name in names}
    return {"version": CONFIG_VERSION} | values | draw(st.just({}) | st.dictionaries(st.text(), scalars, max_size=1))


def check_config(make: Any) -> dcs.DiffCRConfig | None:
    """Make a configuration, or be refused with a text that can be printed; what is made is sound."""
    try:
        config = make()
    except ConfigError as error:
        assert 0 < len(str(error).encode()) < 5_000
        return None
    again = dcs.DiffCRConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config) and again.to_json() == config.to_json()
    assert repr(config)
    check_budget(config)
    return config


def check_budget(config: dcs.DiffCRConfig) -> None:
    """Regions and savings that a configuration leads to are numbers in range."""
    low, high = config.timestep_range if config.timestep_range != "auto" else (0.0, 1000.0)
    regions = TimestepRegions(config.timestep_regions, None, low, high)
    found = [regions.region(timestep) for timestep in (low, low / 2 + high / 2, high)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == config.timestep_regions - 1
    costs = torch.tensor([[1.0 - ratio for ratio in config.reachable_bins]] * 2)
    budget = Budget.of(config, costs)
    assert float(budget.region_weights.sum()) == pytest.approx(1)
    assert 0 <= budget.uniform(config.max_ratio) <= 1 + 1e-6


@given(anything)
@many
def test_any_json_as_a_configuration(value: Any) -> None:
    check_config(lambda: dcs.DiffCRConfig.from_dict(value))
    check_config(lambda: dcs.DiffCRConfig.from_json(json.dumps(value)))


@given(settings_like())
@example({"version": 1, "timestep_range": [-1e308, 1e308], "timestep_regions": 4})
@example({"version": 1, "timestep_range": [0, 1e308], "timestep_regions": 4})
@example({"version": 1, "timestep_range": [0, 5e-324], "timestep_regions": 1000})
@example({"version": 1, "region_weights": [1e308, 1e308], "timestep_regions": 2})
@example({"version": 1, "region_weights": [5e-324], "timestep_regions": 1})
@example({"version": 1, "blocks": "(" * 9000})
@example({"version": 1, "blocks": "a" * 20_000})
@example({"version": 1, "max_ratio": 5e-324, "target_ratio": 0, "initial_ratio": 0})
@many
def test_likely_and_unlikely_values(value: dict[str, Any]) -> None:
    check_config(lambda: dcs.DiffCRConfig.from_json(json.dumps(value)))


@given(name=st.sampled_from(NAMES), value=anything)
@many
def test_any_value_for_a_setting(name: str, value: Any) -> None:
    value = json.loads(json.dumps(value))  # which makes one character of two halves
    check_config(lambda: dcs.DiffCRConfig(**{name: value}))


@given(
    text=st.text() | st.text(st.sampled_from('{}[]":,truefalsn0123456789.eE+-\\u \n')), place=st.integers(0, 500), cut=st.integers(0, 20)
)
@many
def test_any_text_for_a_configuration(text: str, place: int, cut: int) -> None:
    whole = dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=4, timestep_range=(0, 999)).to_json()
    check_config(lambda: dcs.DiffCRConfig.from_json(text))
    check_config(lambda: dcs.DiffCRConfig.from_json(whole[:place] + text + whole[place + cut :]))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 5_000, '{"version": ' + "9" * 5_000 + "}", "NaN", "\ufeff{}", '{"version": 1}' * 2, "",
     '{"version": 1, "bins": [' + "0," * 1_000_000 + "0]}", '{"version": 1, "blocks": "' + "a|" * 1_000_000 + '"}',
     '{"version": 1, "timestep_regions": 1000000000}', '{"version": 1, "' + "x" * 1_000_000 + '": 0}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_bombs(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dcs.DiffCRConfig.from_json(text)
    assert len(str(caught.value)) < 5_000


def test_numbers_that_python_does_not_write() -> None:
    for name in ("timestep_regions", "target_ratio", "share_routing", "bins"):
        with pytest.raises(ConfigError, match=r"too long to be written|expected a"):
            dcs.DiffCRConfig(**{name: 10**5_000})


def test_the_limits_are_named() -> None:
    most = dcs.DiffCRConfig(timestep_regions=1000, share_routing=1000, bins=[number / 999 for number in range(1000)], blocks="a" * 10_000)
    assert dcs.DiffCRConfig.from_json(most.to_json()) == most
    for setting in (
        {"timestep_regions": 1001}, {"share_routing": 1001}, {"bins": [number / 1000 for number in range(1001)]}, {"blocks": "a" * 10_001},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"at most 1000|longer than 10000 characters"):
            dcs.DiffCRConfig(**setting)  # type: ignore[arg-type]


# --- axes ------------------------------------------------------------------------------------------------------------
WORDS = ["b", "n", "m+n", "n+m", "n-m", "1", "c", "d", "-", "...", "m+n+n", "+", "n n", "\n", "\u2003", "(h w)", "ñ", "𝐧", "0", "__", "B"]  # noqa: RUF001


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=8).map(" ".join) | st.text() | scalars)
@many
def test_any_text_as_axes(pattern: Any) -> None:
    try:
        axes = parse_axes(pattern)
    except PatternError as error:
        assert 0 < len(str(error).encode()) < 5_000
        return
    assert parse_axes(str(axes)) == axes
    assert {axes.words[place] for place in axes.tokens} <= {"n", "m+n", "n+m", "n-m"}
    assert axes.words == tuple(pattern.split()) or pattern.split() == ["-"]
    assert len({axes.words[place] for place in axes.tokens}) <= 1
    assert axes.batch is None or axes.words[axes.batch] in ("b", "1")
    assert all(word.isascii() for word in axes.words)


@pytest.mark.parametrize(
    "pattern",
    [
        "n" * 1_000_000,
        " ".join(f"a{number}" for number in range(200_000)),
        "b " * 500_000,
        "\n" * 1_000_000,
        "- " * 300_000,
        "\u2003" * 2_000,
    ],
    ids=lambda pattern: repr(pattern[:6]),
)
def test_endless_axes(pattern: str) -> None:
    with pytest.raises(PatternError, match=f"has {len(pattern)} characters") as caught:
        parse_axes(pattern)
    assert len(str(caught.value)) < 1_000


# --- patterns --------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(patterns, "_REGISTRY", {})
    yield


axes_like = st.sampled_from(["b n c", "n c", "m+n d", "b n n", "-", "b n", "n"]) | st.text() | scalars
inputs_like = st.dictionaries(st.text(), axes_like, max_size=3) | anything


def check_pattern(name: Any, target: Any, inputs: Any, outputs: Any) -> None:
    try:
        pattern = BlockPattern(name, target, inputs, outputs)
    except PatternError as error:
        assert 0 < len(str(error).encode(errors="surrogatepass")) < 5_000
        return
    assert pattern.outputs == tuple(outputs) and dict(pattern.inputs) == inputs
    assert pattern == pickle.loads(pickle.dumps(pattern)) and repr(pattern)
    patterns._REGISTRY.clear()
    assert register_pattern(pattern) is pattern
    assert len(dcs.plan(Denoiser(), inputs_of(100.0, 900.0)).routed_sites) == LAYERS, "a pattern of another class is in the way"


@given(
    name=st.just("mine") | scalars,
    target=st.just("package.module:Class") | st.text() | scalars,
    inputs=st.just({"x": "b n c"}) | inputs_like,
    outputs=st.just(["b n c"]) | st.lists(axes_like, max_size=3) | anything,
)
def test_any_json_as_a_pattern(name: Any, target: Any, inputs: Any, outputs: Any) -> None:
    check_pattern(name, target, inputs, outputs)
    check_pattern("mine", target, {"x": "b n c"}, ())
    check_pattern("mine", "package.module:Class", inputs, ())
    check_pattern("mine", "package.module:Class", {"x": "b n c"}, outputs)


@pytest.mark.parametrize("outputs", [None, 5, "b n c", {"b n c": 1}, True, b"b"], ids=repr)
def test_outputs_are_a_sequence_of_axes(outputs: Any) -> None:
    with pytest.raises(PatternError, match="outputs must be a tuple of axis patterns"):
        BlockPattern("mine", "package.module:Class", {"x": "b n c"}, outputs)


@pytest.mark.parametrize("name", [None, 3, ["mine"], b"mine", HUGE], ids=lambda name: repr(name)[:10])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(PatternError, match="name of a pattern is a text"):
        BlockPattern(name, "package.module:Class", {"x": "b n c"})


@pytest.mark.parametrize("inputs", [{3: "b n c"}, {None: "b n c"}, {("x",): "b n c"}, {"x": "b n c", 0: "n c"}], ids=repr)
def test_paths_of_arguments_are_text(inputs: Any) -> None:
    with pytest.raises(PatternError, match="must map argument paths"):
        BlockPattern("mine", "package.module:Class", inputs)


@given(anything)
@many
def test_anything_registered(value: Any) -> None:
    with pytest.raises(PatternError, match=f"takes a BlockPattern, not {type(value).__name__}"):
        register_pattern(value)
    assert not patterns._REGISTRY
