"""The configuration: what it refuses and how it says so, and its versioned JSON form."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcr_surgery.config import BRANCHES, CONFIG_VERSION, COSTS, GATES, DiffCRConfig
from diffcr_surgery.errors import ConfigError

NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**400


def each(name: str, expected: str, *values: Any) -> list[tuple[dict[str, Any], str]]:
    return [({name: value}, expected) for value in values]


WRONG = [
    *each("target_ratio", r"expected a number in \[0, 0\.9\]", -0.01, 0.91, NAN, INFINITY, HUGE, "0.3", True, None, [0.3]),
    *each("initial_ratio", r"expected a number in \[0, 0\.9\]", -0.01, 0.91, NAN, "0", False, None),
    *each("max_ratio", r"expected a number in \[0, 1\]", -0.1, 1.1, NAN, "0.9", True),
    *each("ratio_loss_weight", r"expected a number in \[0, inf\]", -1, NAN, INFINITY, HUGE, "0.3", True, None),
    *each("max_ratio", "lose every token.*below 1", 1.0, 1),
    ({"target_ratio": 0.5, "max_ratio": 0.4}, r"expected a number in \[0, 0\.4\]"),
    ({"initial_ratio": 0.5, "max_ratio": 0.4, "target_ratio": 0}, r"expected a number in \[0, 0\.4\]"),
    ({"max_ratio": 0.6, "bins": (0, 0.5)}, r"expected a number in \[0, 0\.5\]"),
    *each("timestep_regions", "whole number of at least 1", 0, -1, 2.0, "4", True, None, NAN),
    *each("timestep_range", "lowest < highest", (5, 5), (1, 0), (1,), (0, 1, 2), []),
    *each("timestep_range", "sequence of finite numbers", "0-1000", 1000, None, ("0", "1"), (0, NAN), (0, INFINITY)),
    *each("timestep_range", "sequence of finite numbers", (False, True), (0, None), (0, HUGE)),
    *each("timestep_argument", 'name of a forward argument, or "auto"', 3, None, "", ["timestep"]),
    *each("bins", "at least two rising ratios", (), (0,), (0.1, 0.5), (0, 0.5, 0.5), (0, 0.5, 0.4), (0, 1.1), (-0.1, 0, 1)),
    *each("bins", "at least 0.0001 apart", (0, 0.5, 0.5 + 1e-5), (0, 5e-324, 1)),
    *each("bins", "sequence of finite numbers", 0.5, None, "0, 1", (0, "half"), ("0", "1"), (0, NAN), (False, True), (0, HUGE)),
    *each("gate", "expected one of 'doubled_sigmoid', 'straight_through', 'sigmoid'", "relu", None, 1, ["sigmoid"]),
    *each("branches", "expected one of 'two'", "three", 2, None),
    *each("cost", "expected one of 'tokens'", "seconds", None),
    *each("blocks", "regular expression", "(", "*", "[[a]", 3, b"blocks", ["blocks"]),
    *each("learn_ratios", "True or False", 0, 1, "false", None),
    *each("target_share", r"expected a number in \[0, 1\]", -0.1, 1.5, NAN, "0.8", True),
    *each("share_routing", "whole number of at least 1", 0, -1, 2.0, "2", True, None),
    *each("region_weights", "expected 1 numbers of at least 0", (1, 1), (), (-1,), (0,), (1e308, 1e308)),
    *each("region_weights", "sequence of finite numbers", "1", 3, (NAN,), (INFINITY,)),
]


def label(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, dict) else "-"


@pytest.mark.parametrize(("settings", "expected"), WRONG, ids=label)
def test_what_was_given_and_what_was_expected(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        DiffCRConfig(**settings)
    name = next(iter(settings)) if len(settings) == 1 else next(n for n in settings if str(caught.value).startswith(n))
    assert str(caught.value).startswith(f"{name}=")


@pytest.mark.parametrize(("settings", "expected"), WRONG, ids=label)
def test_the_same_from_json(settings: dict[str, Any], expected: str) -> None:
    if any(isinstance(value, bytes) for value in settings.values()):
        settings = {"blocks": {"not": "text"}}  # JSON has no bytes
    with pytest.raises(ConfigError, match=expected):
        DiffCRConfig.from_json(json.dumps({"version": CONFIG_VERSION, **settings}))


def test_defaults_are_valid_and_a_config_is_a_frozen_value() -> None:
    config = DiffCRConfig()
    assert hash(config) == hash(DiffCRConfig()) and config == pickle.loads(pickle.dumps(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target_ratio = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        DiffCRConfig(0.3)  # type: ignore[misc]


def test_numbers_and_sequences_take_one_form() -> None:
    """So that equal settings are equal, hash alike, and can be written."""
    config = DiffCRConfig(bins=[0, 0.5, 1], timestep_range=[0, 1000], target_ratio=0)  # type: ignore[arg-type]
    assert config == DiffCRConfig(bins=(0.0, 0.5, 1.0), timestep_range=(0.0, 1000.0), target_ratio=0.0)
    assert [type(v) for v in (*config.bins, *config.timestep_range, config.target_ratio)] == [float] * 6
    exact = DiffCRConfig(bins=numpy.linspace(0, 1, 5), max_ratio=numpy.float32(0.5), timestep_range=numpy.array([0, 1000]))
    assert exact.bins == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert DiffCRConfig.from_json(exact.to_json()) == exact


@st.composite
def configs(draw: st.DrawFn) -> DiffCRConfig:
    inner = [step / 1000 for step in sorted(draw(st.sets(st.integers(1, 998), max_size=6)))]
    last = draw(st.floats(0.999, 1))
    top = draw(st.floats(0, 0.99))
    bound = st.floats(-1e6, 1e6)
    regions = draw(st.integers(1, 50))
    weights = st.lists(st.floats(0, 1e6), min_size=regions, max_size=regions).filter(any)
    ends = sorted(draw(st.tuples(bound, bound).filter(lambda pair: pair[0] != pair[1])))
    return DiffCRConfig(
        target_ratio=draw(st.floats(0, top)),
        target_share=draw(st.none() | st.floats(0, 1)),
        timestep_regions=regions,
        region_weights=draw(st.none() | weights.map(tuple)),
        share_routing=draw(st.integers(1, 50)),
        timestep_argument=draw(st.text(min_size=1)),
        timestep_range=draw(st.just("auto") | st.just((ends[0], ends[1]))),
        bins=(0.0, *inner, last),
        max_ratio=top,
        gate=draw(st.sampled_from(GATES)),  # type: ignore[arg-type]
        branches=draw(st.sampled_from(BRANCHES)),  # type: ignore[arg-type]
        cost=draw(st.sampled_from(COSTS)),  # type: ignore[arg-type]
        ratio_loss_weight=draw(st.floats(0, 1e9)),
        blocks=draw(st.none() | st.sampled_from([r"blocks\.\d+", "", "ünïcode|\\\\"])),
        initial_ratio=draw(st.floats(0, top)),
        learn_ratios=draw(st.booleans()),
    )


@given(configs())
def test_json_round_trip(config: DiffCRConfig) -> None:
    again = DiffCRConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.0, 0.85])
def test_a_frozen_ratio_is_one_that_is_executed(ratio: float) -> None:
    """Rounded between two bins, the first blocks would take the lower and the last the higher."""
    config = DiffCRConfig(initial_ratio=ratio, learn_ratios=False)
    assert ratio in config.bins and set(DiffCRConfig().bins) <= set(config.bins)
    assert DiffCRConfig.from_json(config.to_json()) == config
    assert DiffCRConfig(initial_ratio=ratio).bins == DiffCRConfig().bins


def test_json_is_versioned_strict_and_complete() -> None:
    data = json.loads(DiffCRConfig(timestep_range=(0, 1)).to_json(), parse_constant=pytest.fail)
    assert data.pop("version") == CONFIG_VERSION
    assert set(data) == {field.name for field in dataclasses.fields(DiffCRConfig)}


def test_settings_left_out_of_the_json_take_their_defaults() -> None:
    assert DiffCRConfig.from_dict({"version": CONFIG_VERSION, "target_ratio": 0.4}) == DiffCRConfig(target_ratio=0.4)


def test_reading_changes_nothing_in_the_data() -> None:
    data = {"version": CONFIG_VERSION, "bins": [0, 1]}
    DiffCRConfig.from_dict(data)
    assert data == {"version": CONFIG_VERSION, "bins": [0, 1]}


@pytest.mark.parametrize("version", [0, CONFIG_VERSION + 1, -1, str(CONFIG_VERSION), True, 1.0, None, [CONFIG_VERSION]], ids=repr)
def test_other_versions_are_refused_by_name(version: object) -> None:
    with pytest.raises(ConfigError, match="this release reads version") as caught:
        DiffCRConfig.from_dict({"version": version})
    assert f"version {version!r}" in str(caught.value)


def test_a_missing_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="version None is not supported"):
        DiffCRConfig.from_json('{"target_ratio": 0.2}')


def test_unknown_settings_are_listed_beside_the_known() -> None:
    with pytest.raises(ConfigError, match=r"Unknown settings \['colour', 'target'\].*'target_ratio'"):
        DiffCRConfig.from_dict({"version": CONFIG_VERSION, "target": 0.2, "colour": 1})


@pytest.mark.parametrize("text", ["", "{", "target_ratio=0.2", "{'version': 1}", "[" * 100_000, '{"version": 1}}'], ids=lambda t: t[:9])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not valid JSON.*to_json"):
        DiffCRConfig.from_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ("3", "int"), ('"text"', "str"), ("true", "bool")])
def test_json_that_is_no_object(text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"JSON object, not {kind}"):
        DiffCRConfig.from_json(text)
