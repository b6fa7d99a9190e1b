"""Timestep regions: find the timestep argument, its range, and the region each sample is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import TimestepError

__all__ = ["TIMESTEP_NAMES", "TimestepRegions", "at_timestep", "timestep_regions"]

_NOISE_LEVELS = ("sigma", "sigmas", "noise_level")  # they end at 1, 14.6, 80 or elsewhere: no example tells
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "time_steps", *_NOISE_LEVELS)
_HELD: ContextVar[Mapping[int, Any]] = ContextVar("diffcr_surgery_timesteps", default={})  # noqa: B039 - never mutated


@contextmanager
def at_timestep(model: torch.nn.Module, timestep: Any) -> Iterator[None]:
    """Tell a converted model its timestep, where its forward takes an embedding of it, or nothing at all.

    Args:
        model: A converted model, bare or wrapped.
        timestep: A number, or a tensor ``b``.

    Example:
        >>> model = torch.nn.Identity()
        >>> with at_timestep(model, 500):
        ...     y = model(torch.ones(1))
    """
    named = [model, *(module for module in model.modules() if hasattr(module, "diffcr"))]
    token = _HELD.set({**_HELD.get(), **{id(module): timestep for module in named}})
    try:
        yield
    finally:
        _HELD.reset(token)


@dataclass(frozen=True)
class TimestepRegions:
    """R equal parts of a timestep range; region 0 is the cleanest.

    Attributes:
        count: R.
        argument: Forward argument that holds the timestep; ``None`` leaves it to :func:`at_timestep`.
        low: Lowest timestep.
        high: Highest timestep.
    """

    count: int
    argument: str | None
    low: float
    high: float

    def __str__(self) -> str:
        if self.count == 1:
            return "one timestep region"
        source = f"argument {self.argument!r}" if self.argument else "at_timestep(...)"
        return f"{self.count} timestep regions over [{self.low:g}, {self.high:g}], from {source}"

    def region(self, timestep: float) -> int:
        """Return the region of one timestep.

        Raises:
            TimestepError: If it lies outside the range.
        """
        slack = 5e-7 * (self.high - self.low)  # in single precision, shift · 1 / (1 + (shift − 1) · 1) is more than 1 for some shifts
        if not self.low - slack <= timestep <= self.high + slack:
            raise TimestepError(
                f"Timestep {timestep:g} lies outside the range [{self.low:g}, {self.high:g}] the model was planned with; plan again with "
                "timestep_range=(lowest, highest) that your sampler stays in."
            )
        # Multiplied first: 290 / 1000 * 100 is 28.99..., and 290 begins region 29.
        return min(self.count - 1, max(0, int((timestep - self.low) * self.count / (self.high - self.low))))

    def of_call(self, model: torch.nn.Module, arguments: Mapping[str, Any]) -> list[int]:
        """Return the region of each sample of a call; one entry stands for the whole batch.

        Raises:
            TimestepError: If the call gives no timestep, or one outside the range, or several regions within one sample.
        """
        if self.count == 1:
            return [0]
        held = _HELD.get()
        value = held[id(model)] if id(model) in held else arguments.get(self.argument) if self.argument else None
        if value is None:
            where = f"argument {self.argument!r} is None" if self.argument else "its forward takes none"
            raise TimestepError(
                f"{type(model).__name__} has {self.count} timestep regions, but this call gives no timestep ({where}); pass it, or run the "
                "call inside `with at_timestep(model, t):`."
            )
        rows = _rows(value)
        regions = [sorted({self.region(entry) for entry in row}) for row in rows]
        if any(len(found) > 1 for found in regions):
            raise TimestepError(
                "One sample holds timesteps of several regions (a timestep per token); a sample has one ratio per layer. Use "
                "timestep_regions=1, or name the sample's own timestep with at_timestep(model, t)."
            )
        return [found[0] for found in regions]


def _rows(value: Any) -> list[list[float]]:
    """Return the timesteps of each sample."""
    if not isinstance(value, torch.Tensor):
        try:
            return [[float(value)]]
        except (TypeError, ValueError):
            raise TimestepError(f"The timestep is a {type(value).__name__}; expected a number or a tensor `b`.") from None
    if torch.compiler.is_exporting():
        raise TimestepError(
            "An exported program is one region's, and no timestep can be read while exporting; say it as a number: "
            "`with at_timestep(model, 500): torch.export.export(model, ...)`."
        )
    if value.numel() == 0:
        raise TimestepError(f"The timestep tensor is empty (shape {tuple(value.shape)}); expected a number or a tensor `b`.")
    return list(value.detach().double().reshape(value.shape[0] if value.ndim else 1, -1).tolist())


def timestep_regions(config: DiffCRConfig, arguments: Mapping[str, Any]) -> TimestepRegions:
    """Settle argument and range of the timestep from a configuration and example arguments.

    Raises:
        TimestepError: If the argument is unknown, or the examples leave the range open.
    """
    if config.timestep_argument != "auto" and config.timestep_argument not in arguments:
        raise TimestepError(
            f"timestep_argument={config.timestep_argument!r} is no argument of the model's forward; it has {sorted(arguments)}. Name one "
            'of them, or use timestep_argument="auto".'
        )
    if config.timestep_regions == 1:
        return TimestepRegions(1, None, 0.0, 1.0)
    argument = _argument(config, arguments)
    if config.timestep_range != "auto":
        low, high = config.timestep_range
    else:
        low, high = _guess_range(argument, arguments.get(argument) if argument else None)
    regions = TimestepRegions(config.timestep_regions, argument, low, high)
    if argument and arguments[argument] is not None:
        for row in _rows(arguments[argument]):
            for timestep in row:
                regions.region(timestep)  # a range the examples contradict is refused now, not at the first training step
    return regions


def _argument(config: DiffCRConfig, arguments: Mapping[str, Any]) -> str | None:
    if config.timestep_argument != "auto":
        return config.timestep_argument
    found = next((name for name in TIMESTEP_NAMES if arguments.get(name) is not None), None)
    if found is None and config.timestep_range == "auto":
        raise TimestepError(
            f"timestep_regions={config.timestep_regions} needs a timestep, and none of the arguments {sorted(arguments)} is known as one. "
            "Set timestep_argument to its name; or set timestep_range and run each call inside `with at_timestep(model, t):`; or use "
            "timestep_regions=1."
        )
    return found


def _guess_range(argument: str | None, value: Any) -> tuple[float, float]:
    entries = [entry for row in _rows(value) for entry in row] if value is not None else []
    if entries and min(entries) >= 0 and argument not in _NOISE_LEVELS:
        top = max(entries)
        if not _is_whole(value) and 0 < top <= 1:
            return 0.0, 1.0
        if 1 < top <= 1000:
            return 0.0, 1000.0
    raise TimestepError(
        f'timestep_range="auto" cannot tell the range from the example {argument}={sorted(set(entries))[:4] or None}: set '
        "timestep_range, such as (0, 1000) for discrete steps, (0, 1) for flow matching, or (lowest, highest) sigma."
    )


def _is_whole(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point()
    return isinstance(value, int)
