"""The one frozen configuration of a DiffCR conversion, with its versioned JSON form."""

from __future__ import annotations

import itertools
import json
import math
import numbers
import re
import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from diffcr_surgery.errors import ConfigError

__all__ = ["CONFIG_VERSION", "DiffCRConfig", "shown"]

CONFIG_VERSION = 1

GATES = ("doubled_sigmoid", "straight_through", "sigmoid")
BRANCHES = ("two", "boundary")
COSTS = ("tokens", "flops", "latency")
MOST, LONGEST = 1_000, 10_000  # regions, bins or blocks in a row; characters of an expression. What a file says must not fill the memory
CLOSEST_BINS = 1e-4  # nearer ones could not be told apart by ratios in single precision
DEFAULT_BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


@dataclass(frozen=True, kw_only=True)
class DiffCRConfig:
    """Settings of a conversion (arXiv 2412.16822).

    A *compression ratio* is the share of tokens that bypass a block: 0 keeps all, 0.3 sends 30 % round the block.

    Args:
        target_ratio: Compression ratio whose cost the budget aims at, in ``[0, max_ratio]``: what this ratio at every block would save.
            With ``cost="tokens"`` that is the mean ratio.
        target_share: In place of ``target_ratio``: the share of the dense model's cost to come down to, such as 0.8, everything outside the
            blocks included (with ``cost="tokens"``, the blocks alone).
        timestep_regions: Number R of equal parts of the timestep range, at most 1,000, each with ratios of its own (1 is DiffCR-L).
        timestep_argument: Name of the forward argument that holds the timestep, or ``"auto"``. Irrelevant for R = 1.
        timestep_range: ``(lowest, highest)`` timestep, clean to noisy, or ``"auto"`` to read it off the example inputs.
        bins: The ratios that can be executed, rising, the first 0, at least 1e-4 apart and at most 1,000 of them.
        max_ratio: Upper bound of every ratio, at most the last bin.
        gate: How a kept token's update is scaled by its score s: ``"doubled_sigmoid"`` by 2s (1 at the start),
            ``"straight_through"`` by 1 with the gradient of s, ``"sigmoid"`` by s (the paper's form; it halves updates at the start).
        branches: How a ratio between two bins gets its gradient: ``"two"`` runs the block at both bins and blends (the paper's way);
            ``"boundary"`` runs it once, on the larger kept set, and blends each token's update (see :mod:`diffcr_surgery.rewrite`).
        cost: What the budget counts: ``"tokens"``, each as much as any other; ``"flops"`` of each block; or ``"latency"``, measured on the
            model's device while planning.
        region_weights: How often inference visits each region, cleanest first, in any unit; ``None`` for equally often.
        ratio_loss_weight: Weight λ of :func:`diffcr_surgery.ratio_loss`.
        blocks: Regular expression; only blocks whose qualified name matches it in full are routed. ``None`` routes all.
        share_routing: Number of consecutive blocks for which the router of the first decides. Those of them that run at the same ratio keep
            the same tokens, and a specialised model gathers and scatters once for them.
        initial_ratio: Value of every ratio after conversion.
        learn_ratios: ``False`` freezes the table: with ``initial_ratio=0.3`` this is uniform Mixture-of-Depths. That ratio becomes a bin
            if it is none, or else some blocks would run below it and others above.

    Raises:
        ConfigError: If a value is out of range; the text names it.

    Example:
        >>> config = DiffCRConfig(target_ratio=0.2, timestep_regions=4)
        >>> DiffCRConfig.from_json(config.to_json()) == config
        True
    """

    target_ratio: float = 0.2
    target_share: float | None = None
    timestep_regions: int = 1
    timestep_argument: str = "auto"
    timestep_range: tuple[float, float] | Literal["auto"] = "auto"
    bins: tuple[float, ...] = DEFAULT_BINS
    max_ratio: float = 0.9
    gate: Literal["doubled_sigmoid", "straight_through", "sigmoid"] = "doubled_sigmoid"
    branches: Literal["two", "boundary"] = "two"
    cost: Literal["tokens", "flops", "latency"] = "tokens"
    region_weights: tuple[float, ...] | None = None
    ratio_loss_weight: float = 0.3
    blocks: str | None = None
    share_routing: int = 1
    initial_ratio: float = 0.0
    learn_ratios: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", _numbers("bins", self.bins))
        if not (isinstance(self.timestep_range, str) and self.timestep_range == "auto"):
            object.__setattr__(self, "timestep_range", _range(self.timestep_range))
        _check_bins(self.bins)
        self._settle_number("max_ratio", 0.0, self.bins[-1])
        if self.max_ratio >= 1.0:
            raise ConfigError("max_ratio=1.0 would let a block lose every token; choose a value below 1, such as 0.9.")
        self._settle_number("target_ratio", 0.0, self.max_ratio)
        if self.target_share is not None:
            self._settle_number("target_share", 0.0, 1.0)
        self._settle_number("initial_ratio", 0.0, self.max_ratio)
        self._settle_number("ratio_loss_weight", 0.0, math.inf)
        for name in ("timestep_regions", "share_routing"):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= MOST:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: expected a whole number of at least 1 and at most {MOST}.")
        for name, choices in (("gate", GATES), ("branches", BRANCHES), ("cost", COSTS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: expected one of {', '.join(map(repr, choices))}.")
        if self.region_weights is not None:
            object.__setattr__(self, "region_weights", _weights(self.region_weights, self.timestep_regions))
        if not isinstance(self.timestep_argument, str) or not self.timestep_argument:
            raise ConfigError(f'timestep_argument={shown(self.timestep_argument)}: expected the name of a forward argument, or "auto".')
        if not isinstance(self.learn_ratios, bool):
            raise ConfigError(f"learn_ratios={shown(self.learn_ratios)}: expected True or False.")
        _check_blocks(self.blocks)
        if not self.learn_ratios and len(self.bins) < MOST and min(abs(self.initial_ratio - b) for b in self.bins) >= CLOSEST_BINS:
            object.__setattr__(self, "bins", tuple(sorted((*self.bins, self.initial_ratio))))

    def _settle_number(self, name: str, low: float, high: float) -> None:
        value = _number(getattr(self, name))
        if value is None or not low <= value <= high:
            raise ConfigError(f"{name}={shown(getattr(self, name))}: expected a number in [{low:g}, {high:g}].")
        object.__setattr__(self, name, value)

    @property
    def reachable_bins(self) -> tuple[float, ...]:
        """The bins up to ``max_ratio``, and the one above it if it lies between two."""
        top = next(i for i, b in enumerate(self.bins) if b >= self.max_ratio - 1e-6)
        return self.bins[: max(top, 1) + 1]

    def to_json(self) -> str:
        """Return the configuration as versioned JSON text."""
        return json.dumps({"version": CONFIG_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> DiffCRConfig:
        """Read a configuration written by :meth:`to_json`.

        Raises:
            ConfigError: If the text is no JSON object, has another version, or names unknown settings.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"The configuration is not valid JSON ({error}); write it with DiffCRConfig.to_json().") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> DiffCRConfig:
        """Read a configuration from the decoded JSON object; see :meth:`from_json`."""
        if not isinstance(data, dict):
            raise ConfigError(f"A configuration is a JSON object, not {type(data).__name__}.")
        version = data.get("version")
        if type(version) is not int or version != CONFIG_VERSION:  # JSON's true equals 1
            raise ConfigError(f"Configuration version {shown(version)} is not supported; this release reads version {CONFIG_VERSION}.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known - {"version"}, key=str)
        if unknown:
            raise ConfigError(f"Unknown settings {shown(unknown)}; expected some of {sorted(known)}.")
        return cls(**{name: value for name, value in data.items() if name != "version"})


def _number(value: Any) -> float | None:
    """Return a finite number as a float; ``None`` for anything else, booleans and numbers in quotes among it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    items = [None] if isinstance(value, str) or not hasattr(value, "__iter__") else [_number(item) for item in value]
    found = tuple(item for item in items if item is not None)
    if len(found) < len(items):
        raise ConfigError(f"{name}={shown(value)}: expected a sequence of finite numbers.")
    return found


def _range(value: Any) -> tuple[float, float]:
    bounds = _numbers("timestep_range", value)
    if len(bounds) != 2 or bounds[0] >= bounds[1] or (bounds[1] - bounds[0]) * MOST == math.inf:
        raise ConfigError(
            f"timestep_range={shown(value)}: expected (lowest, highest) with lowest < highest, not infinitely far apart, such as (0, 1000)."
        )
    return bounds[0], bounds[1]


def _weights(value: Any, regions: int) -> tuple[float, ...]:
    weights = _numbers("region_weights", value)
    if len(weights) != regions or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ConfigError(
            f"region_weights={shown(value)}: expected {regions} numbers of at least 0, one for each timestep region, not all of them 0."
        )
    return weights


def _check_bins(bins: tuple[float, ...]) -> None:
    rising = all(b - a >= CLOSEST_BINS for a, b in itertools.pairwise(bins))
    if not 2 <= len(bins) <= MOST or bins[0] != 0.0 or not rising or bins[-1] > 1.0:
        raise ConfigError(
            f"bins={shown(bins)}: expected at least two rising ratios in [0, 1], the first 0, at least {CLOSEST_BINS:g} apart, and at most "
            f"{MOST}."
        )


def _check_blocks(value: Any) -> None:
    problem = "" if value is None or isinstance(value, str) else f" (a {type(value).__name__})"
    if isinstance(value, str) and len(value) > LONGEST:
        problem = f" (longer than {LONGEST} characters)"
    try:
        if value is not None and not problem:
            re.compile(value)
    except (re.error, ValueError, OverflowError, RecursionError, FutureWarning) as error:  # the last where warnings are errors
        problem = f" ({shown(str(error))})"
    if problem:
        raise ConfigError(f"blocks={shown(value)}{problem}: expected a regular expression for qualified block names, or None.")


def shown(value: Any) -> str:
    """Return what stands for a value in an error: its ``repr``, but never longer than a few lines, whatever a file holds.

    Example:
        >>> shown([0.5, "half"]), len(shown("0" * 1_000_000)) < 300
        ("[0.5, 'half']", True)
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"a {type(value).__name__} too long to be written"
