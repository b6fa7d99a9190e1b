"""The outcome of a bench: the rows compared, the table and `latency.png`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from diffcr_surgery.bench.sides import DENSE, LIMIT, MERGING, ROUTED

__all__ = ["Row", "compare", "draw_latency", "median_speed_up", "results_table"]

IDEAL = "ideal"  # the speed-up if time went with the routed model's FLOPs


@dataclass(frozen=True)
class Row:
    """What was measured of one side, and how it compares. Times are in milliseconds.

    Attributes:
        side: Its name.
        ratio: The ratio asked for.
        achieved: The share of tokens that really entered no routed block.
        latencies_ms: Of every round.
        flops: Of one call.
        peak_bytes: Of one call, beyond the weights.
        speed_up: Over dense: the median of the rounds' own quotients.
        share_of_limit: Its speed-up over the limit's at the same ratio.
        share_of_ideal: Its speed-up over the ideal one at the same ratio.
    """

    side: str
    ratio: float
    achieved: float
    latencies_ms: list[float]
    flops: int
    peak_bytes: int
    speed_up: float = 1.0
    share_of_limit: float | None = None
    share_of_ideal: float | None = None

    @property
    def latency_ms(self) -> float:
        """Median latency."""
        return statistics.median(self.latencies_ms)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range of the latencies; 0 for a single round."""
        if len(self.latencies_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.latencies_ms, n=4, method="inclusive")
        return high - low


def median_speed_up(dense: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the rounds' own quotients: what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(dense, other, strict=True))


def compare(rows: Sequence[Row]) -> tuple[list[Row], dict[float, float]]:
    """Work out the speed-ups of rows that were measured in turns, dense first.

    Returns:
        The rows with their speed-ups, and the ideal speed-up at each ratio.
    """
    dense = rows[0]
    ideal = {row.ratio: dense.flops / row.flops for row in rows if row.side == ROUTED}
    sped = [dataclasses.replace(row, speed_up=median_speed_up(dense.latencies_ms, row.latencies_ms)) for row in rows]
    limits = {row.ratio: row.speed_up for row in sped if row.side == LIMIT}
    shared = [
        dataclasses.replace(
            row,
            share_of_limit=row.speed_up / limits[row.ratio] if row.ratio in limits else None,
            share_of_ideal=row.speed_up / ideal[row.ratio],
        )
        for row in sped[1:]
    ]
    return [sped[0], *shared], ideal


def results_table(rows: Sequence[Row], ideal: dict[float, float]) -> str:
    """Return the table in Markdown, the ideal of each ratio after its sides."""
    lines = [
        "| side | ratio requested | achieved | latency ms (median) | IQR ms | speed-up over dense | share of the limit's speed-up | "
        "share of the FLOPs ideal | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio in sorted({row.ratio for row in rows}):
        for row in (row for row in rows if row.ratio == ratio):
            asked = "–" if row.side == DENSE else f"{ratio:g}"
            shares = f"{_percent(row.share_of_limit)} | {_percent(row.share_of_ideal)}"
            lines.append(
                f"| {row.side} | {asked} | {row.achieved:.3f} | {row.latency_ms:.2f} | {row.iqr_ms:.2f} | {row.speed_up:.3f}× | {shares} | "
                f"{row.peak_bytes / 2**20:.1f} |"
            )
        if ratio > 0:
            latency = f"{rows[0].latency_ms / ideal[ratio]:.2f}"
            lines.append(f"| {IDEAL} | {ratio:g} | – | {latency} | – | {ideal[ratio]:.3f}× | – | 100.0 % | – |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}".replace("%", " %")


def draw_latency(path: Path, rows: Sequence[Row], ideal: dict[float, float], title: str) -> None:
    """Draw latency against the ratio asked for, with the interquartile range as bars.

    Args:
        path: The file to write.
        rows: What was measured, dense first.
        ideal: The ideal speed-up at each ratio.
        title: Of the picture.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(rows[0].latency_ms, color="tab:gray", label=DENSE)
    for name, marker in ((ROUTED, "o"), (LIMIT, "v"), (MERGING, "s")):
        line = sorted((row for row in rows if row.side == name), key=lambda row: row.ratio)
        if line:
            spread = [row.iqr_ms / 2 for row in line]
            axes.errorbar([r.ratio for r in line], [r.latency_ms for r in line], spread, marker=marker, capsize=3, label=name)
    ratios = sorted(ideal)
    axes.plot(ratios, [rows[0].latency_ms / ideal[ratio] for ratio in ratios], "k:", label=f"{IDEAL}, by FLOPs")
    axes.set(xlabel="compression ratio asked for", ylabel="latency, ms", title=title)
    axes.set_ylim(bottom=0)
    axes.title.set_fontsize(9)
    axes.legend()
    figure.savefig(path, dpi=150)
