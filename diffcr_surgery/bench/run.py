"""One run of the bench, from the settings to the files."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffcr_surgery.bench.measure import achieved_ratio, peak_bytes, routing_share, seconds_in_turns
from diffcr_surgery.bench.models import FAMILIES, build
from diffcr_surgery.bench.report import Row, compare, draw_latency, median_speed_up, results_table
from diffcr_surgery.bench.sides import ROUTED, Merging, Side, build_sides, load_merging
from diffcr_surgery.demo.report import processor_name
from diffcr_surgery.errors import ConfigError
from diffcr_surgery.flops import count_flops

__all__ = ["BASELINE", "Settings", "run_bench"]

BASELINE = Path(__file__).parents[2] / "recipes" / "baselines" / "token_merging.py"

_READING = (
    "Speed-up: the median over the rounds of dense / side. Limit: the same blocks on as many tokens, without router, gather or scatter. "
    "Ideal: FLOPs of dense / FLOPs of routed. Shares: a side's speed-up / that of the limit or the ideal. Peak: memory beyond the weights."
)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: Name of the family.
        tokens: Image tokens, a square number.
        ratios: Compression ratios; 0 is always measured.
        layers: Length of a shortened model; `None` for the model's own.
        batch: Samples of a call.
        device: `"cpu"` or `"cuda"`.
        dtype: Name of a floating-point type of torch.
        compile: Whether to compile all sides.
        rounds: How often each side is timed.
        break_even: Whether to look for the number of tokens from which routing pays.
        baseline: Where token merging stands.

    Raises:
        ConfigError: If a value is out of range; the text names the option.
    """

    model: str
    tokens: int
    ratios: tuple[float, ...]
    layers: int | None = None
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    rounds: int = 9
    break_even: bool = False
    baseline: Path = BASELINE

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(sorted({*self.ratios} - {0.0})))
        if self.model not in FAMILIES:
            raise ConfigError(f"--model {self.model}: expected one of {', '.join(FAMILIES)}.")
        if self.tokens < 4 or math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ConfigError(
                f"--tokens {self.tokens}: the image is square, so expected a square number of at least 4, such as 256 or 1024."
            )
        for ratio in self.ratios:
            if not 0.0 < ratio <= 0.9:
                raise ConfigError(f"--ratio {ratio:g}: expected shares of tokens that bypass, between 0 and 0.9.")
        for name in ("layers", "batch", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: expected at least 1.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu.")

    @property
    def title(self) -> str:
        """What is measured, in a line."""
        length = "" if self.layers is None else f" (shortened: {self.layers} of {FAMILIES[self.model].layers} layers)"
        mode = "compiled" if self.compile else "eager"
        return f"{self.model}{length}, {self.tokens} tokens, batch {self.batch}, {self.dtype}, {mode}"


@torch.no_grad()
def run_bench(settings: Settings, out: Path) -> None:
    """Measure, print the table, and write `table.md`, `report.json` and `latency.png`.

    Args:
        settings: What to measure.
        out: An existing folder.
    """
    torch.manual_seed(0)
    merging, notes = load_merging(settings.baseline)
    rows, routing, identical, missing = _measure(settings, merging)
    notes += missing
    rows, ideal = compare(rows)
    device = torch.cuda.get_device_name() if settings.device == "cuda" else processor_name()
    machine = f"{device}, threads: {torch.get_num_threads()}, torch {torch.__version__}; {settings.rounds} rounds"
    lines = [f"{settings.title}; {machine}.", "", results_table(rows, ideal), ""]
    lines += [_READING, ""]
    if routing:
        shares = ", ".join(f"{share:.1%} at {ratio:g}".replace("%", " %") for ratio, share in routing.items())
        lines.append(f"Router, choice, gathers, gate and scatter, node by node in eager mode, against the time of their blocks: {shares}.")
    lines.append(f"Routed at 0 gives what dense gives, bit for bit: {'yes' if identical else 'NO'}.")
    lines += notes
    ladder = _break_even(settings, rows) if settings.break_even and settings.ratios else {}
    lines += [_break_even_line(ratio, speed_ups) for ratio, speed_ups in ladder.items()]
    text = "\n".join(lines)
    print(text)
    for note in notes:
        print(f"diffcr-surgery: {note}", file=sys.stderr)
    (out / "table.md").write_text(f"{text}\n", encoding="utf-8")
    report = {
        **{name: value for name, value in asdict(settings).items() if name != "baseline"},
        "layers": settings.layers or FAMILIES[settings.model].layers,
        "shortened": settings.layers is not None,
        "device_name": device,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "identical_at_0": identical,
        "routing_share": {f"{ratio:g}": share for ratio, share in routing.items()},
        "ideal_speed_up": {f"{ratio:g}": value for ratio, value in ideal.items()},
        "sides": [{**asdict(row), "latency_ms": row.latency_ms, "iqr_ms": row.iqr_ms} for row in rows],
        "break_even": {f"{ratio:g}": {"tokens": _smallest(ups), "speed_ups": ups} for ratio, ups in ladder.items()},
        "notes": notes,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    draw_latency(out / "latency.png", rows, ideal, f"{settings.title}\n{machine}")


def _measure(settings: Settings, merging: Merging | None) -> tuple[list[Row], dict[float, float], bool, list[str]]:
    """Measure all sides; return their rows, what routing takes of blocks, whether routed at 0 is dense bit for bit, and what is missing."""
    cuda = settings.device == "cuda"
    dense, inputs = _build(settings, settings.tokens)
    sides, plan, notes = build_sides(dense, inputs, settings.ratios, merging)
    outputs, achieved, flops = [], [], []
    for side in sides:  # before anything is compiled: hooks and counters see the operations of eager mode alone
        call = partial(side.model, **inputs, return_dict=False)
        outputs.append(call()[0])  # a routed model's first call records its graph
        achieved.append(achieved_ratio(side.model, plan, call))
        flops.append(count_flops(call))
    routed = [side for side in sides if side.name == ROUTED and side.ratio > 0]
    routing = {side.ratio: routing_share(side.model, {**inputs, "return_dict": False}, settings.rounds, cuda) for side in routed}
    identical = torch.equal(*outputs[:2])
    del outputs
    with _calls(settings, sides, inputs) as calls:
        seconds = seconds_in_turns(calls, settings.rounds, cuda)
        peaks = [peak_bytes(call, cuda) for call in calls]
    rows = [
        Row(side.name, side.ratio, share, [1000 * s for s in column], count, peak)
        for side, share, column, count, peak in zip(sides, achieved, seconds, flops, peaks, strict=True)
    ]
    return rows, routing, identical, notes


def _build(settings: Settings, tokens: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return build(settings.model, math.isqrt(tokens), settings.layers, settings.batch, settings.device, dtype)


@contextlib.contextmanager
def _calls(settings: Settings, sides: Sequence[Side], inputs: dict[str, Any]) -> Iterator[list[Callable[[], Any]]]:
    """Give the calls to be timed, of compiled models if that is asked for."""
    if not settings.compile:
        yield [partial(side.model, **inputs, return_dict=False) for side in sides]
        return
    import torch._dynamo  # takes 2 s

    # The sides share the code of their class. Of that the compiler keeps 8 graphs, and the sides beyond would silently run eagerly; as it
    # overlooks hooks, limit and token merging would be given the graph of dense; and at the second ratio it would make the token count a
    # variable, which costs speed (dynamic=False).
    limits = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096, "skip_nnmodule_hook_guards": False}
    with torch._dynamo.config.patch(limits):
        yield [partial(torch.compile(side.model, dynamic=False), **inputs, return_dict=False) for side in sides]


def _break_even(settings: Settings, rows: Sequence[Row]) -> dict[float, dict[int, float]]:
    """Return ratio -> tokens -> speed-up of routed, for images of 4, 8, 16, ... tokens a side up to the one measured already."""
    ladder: dict[float, dict[int, float]] = {ratio: {} for ratio in settings.ratios}
    tokens = 16
    while tokens < settings.tokens:
        gc.collect()  # hooks and graphs hold on to their models in circles, and two of the largest would not fit
        for ratio, speed_up in _routed_speed_ups(settings, tokens).items():
            ladder[ratio][tokens] = speed_up
        tokens *= 4
    for row in rows:
        if row.side == ROUTED and row.ratio > 0:
            ladder[row.ratio][settings.tokens] = row.speed_up
    return ladder


def _routed_speed_ups(settings: Settings, tokens: int) -> dict[float, float]:
    dense, inputs = _build(settings, tokens)
    sides = build_sides(dense, inputs, settings.ratios, None, limit=False)[0]
    for side in sides:
        side.model(**inputs, return_dict=False)  # a routed model's first call records its graph, and is none to compile
    with _calls(settings, sides, inputs) as calls:
        seconds = seconds_in_turns(calls, settings.rounds, settings.device == "cuda")
    return {side.ratio: median_speed_up(seconds[0], column) for side, column in zip(sides, seconds, strict=True) if side.ratio > 0}


def _smallest(speed_ups: dict[int, float]) -> int | None:
    """Return the smallest number of tokens at which routed was faster than dense."""
    return next((tokens for tokens, speed_up in speed_ups.items() if speed_up > 1.0), None)


def _break_even_line(ratio: float, speed_ups: dict[int, float]) -> str:
    found = _smallest(speed_ups)
    answer = f"none up to {max(speed_ups)}" if found is None else f"{found} tokens"
    return f"Break-even at ratio {ratio:g}: {answer} ({', '.join(f'{n}: {value:.3f}×' for n, value in speed_ups.items())})."
