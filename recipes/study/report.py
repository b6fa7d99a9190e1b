"""Tables, curves, heat maps and routing maps from the records of a study.

Arms of a seed start from one dense model and see the same data, so what is compared are differences within seeds: their mean over the seeds
comes with its standard error.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from study.arms import ARMS, TARGETS, VARIANT_TARGET, Experiment, chosen
from study.experiment import SIZES, Record, key_of
from study.runner import read_records
from study.tasks import PARTS, TASKS, TIMESTEPS, task_named

__all__ = ["Spread", "difference", "write_report"]

REFERENCE, OURS = "uniform", "regions-4"
COMPARED = tuple((task, target) for task in TASKS for target in TARGETS)
CLAIMS = (  # at every target
    (OURS, REFERENCE), (OURS, "uniform-ramped"), ("layers", REFERENCE), (OURS, "layers"), (OURS, "shallow"), ("layers", "shallow"),
    (OURS, "dense"), ("regions-10", OURS), ("relative", OURS),
)  # fmt: skip
COLORS = {name: f"C{i}" for i, name in enumerate(name for name, arm in ARMS.items() if arm.against is None and arm.trained)}
FINDINGS = re.compile(r"<!-- findings -->\n(.*?)<!-- end of findings -->", re.DOTALL)  # written by hand, and kept


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its standard error.

    Attributes:
        mean: The mean.
        error: Standard deviation over the square root of the number of seeds; not a number for one seed.
        seeds: Number of seeds.
    """

    mean: float
    error: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one value a seed."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(statistics.fmean(values), error, len(values))

    def beyond(self, errors: float) -> bool:
        """Return whether the mean is more than so many standard errors from 0; never so for one seed."""
        return abs(self.mean) > errors * self.error

    @property
    def sure(self) -> bool:
        """Whether the mean differs from 0 at the 5 % level, by Student's t."""
        return self.beyond(needed(self.seeds))


def needed(seeds: int) -> float:
    """Return how many standard errors a difference has to be from 0 at the 5 % level, by Student's t.

    Example:
        >>> round(needed(3), 1)
        4.3
    """
    return float(scipy.stats.t.ppf(0.975, seeds - 1))


@dataclass(frozen=True)
class Metric:
    """A column of the tables.

    Attributes:
        title: Its head.
        read: Takes it from a record; `None` where the task has none.
        digits: Behind the point.
        scale: It is multiplied by this.
    """

    title: str
    read: Callable[[Record], float | None]
    digits: int
    scale: float = 1.0

    def shown(self, spread: Spread | None, sign: str = "") -> str:
        """Return a cell."""
        if spread is None:
            return "–"
        mean = f"{self.scale * spread.mean:{sign}.{self.digits}f}"
        return mean if spread.seeds == 1 else f"{mean} ± {self.scale * spread.error:.{self.digits}f}"


LOSS = Metric("held-out loss", lambda record: record["loss"], 4)
LOG_LOSS = Metric("log of the loss", lambda record: statistics.fmean(map(math.log, record["losses"])), 3)  # all timesteps alike
FID = Metric("FID", lambda record: record["distances"]["fid"], 3)
KID = Metric("KID × 1000", lambda record: record["distances"]["kid"] if record["psnr"] is None else None, 2, 1000)
READ = Metric("recognised", lambda record: record["accuracy"], 3)
PSNR = Metric("masked PSNR, dB", lambda record: record["psnr"], 2)
RATIO = Metric("ratio", lambda record: record["ratio"], 3)
FLOPS = Metric("FLOPs", lambda record: record["flops_share"], 3)
LATENCY = Metric("latency", lambda record: record["latency_share"], 3)
COLUMNS = (RATIO, FLOPS, LATENCY, LOSS, FID, KID, READ, PSNR)


class Records:
    """Records by task, arm, target and seed; of two with the same, the later one counts."""

    def __init__(self, records: Sequence[Record]) -> None:
        sizes = sorted({record["size"] for record in records})
        if len(sizes) > 1:
            raise SystemExit(f"The records are of sizes {', '.join(sizes)}, and a report is on one: run them into different folders.")
        self._all = {(r["task"], r["arm"], r["target"], r["seed"]): r for r in records}
        bases: dict[tuple[str, int], set[str]] = {}
        for record in self._all.values():
            bases.setdefault((record["task"], record["seed"]), set()).add(record["base"])
        mixed = sorted(key for key, found in bases.items() if len(found) > 1)
        if mixed:
            raise SystemExit(f"Arms of {mixed} start from different dense models, so they cannot be compared; run these seeds in one go.")

    def __iter__(self) -> Any:
        return iter(self._all.values())

    @property
    def seeds(self) -> list[int]:
        """All seeds that have a record."""
        return sorted({record["seed"] for record in self._all.values()})

    def of(self, task: str, arm: str, target: float) -> dict[int, Record]:
        """Return the records of an arm by seed; the dense model has no target."""
        target = 0.0 if arm == "dense" else target
        return {seed: r for (own, name, aim, seed), r in sorted(self._all.items()) if (own, name, aim) == (task, arm, target)}

    def spread(self, task: str, arm: str, target: float, metric: Metric) -> Spread | None:
        """Return a metric of an arm over its seeds."""
        values = [metric.read(record) for record in self.of(task, arm, target).values()]
        return Spread.of([v for v in values if v is not None]) if values and None not in values else None


def difference(records: Records, metric: Metric, task: str, target: float, arm: str, other: str) -> Spread | None:
    """Return by how much an arm's metric is above another's, over the seeds that have both; `None` if none has."""
    own, others = records.of(task, arm, target), records.of(task, other, target)
    pairs = [(metric.read(own[seed]), metric.read(others[seed])) for seed in own if seed in others]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    return Spread.of(values) if values else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main_table(records: Records, task: str, target: float) -> str:
    """Return the arms of a target, all metrics, and the loss and FID against the uniform ratio's within seeds."""
    metrics = [metric for metric in COLUMNS if any(metric.read(r) is not None for r in records if r["task"] == task)]
    rows = []
    for name, arm in ARMS.items():
        if arm.against or not records.of(task, name, target):
            continue
        cells = [metric.shown(records.spread(task, name, target, metric)) for metric in metrics]
        against = [metric.shown(difference(records, metric, task, target, name, REFERENCE), "+") for metric in (LOSS, FID)]
        rows.append([arm.title, *cells, *(against if name != REFERENCE else ["", ""])])
    return _table(["arm", *(metric.title for metric in metrics), "loss − uniform", "FID − uniform"], rows)


def summary_table(records: Records) -> str:
    """Return the held-out loss of the main arms, all tasks and targets in one table."""
    return _summary(LOSS.title, lambda task, name, target: LOSS.shown(records.spread(task, name, target, LOSS)))


def log_table(records: Records) -> str:
    """Return the logarithm of the main arms' losses over the dense model's, a mean over timesteps."""
    return _summary(
        "log of the loss over dense",
        lambda task, name, target: LOG_LOSS.shown(difference(records, LOG_LOSS, task, target, name, "dense"), "+"),
    )


def fid_table(records: Records) -> str:
    """Return the main arms' FID."""
    return _summary(FID.title, lambda task, name, target: FID.shown(records.spread(task, name, target, FID)))


def _summary(title: str, cell: Callable[[str, str, float], str]) -> str:
    rows = []
    for name, arm in ARMS.items():
        cells = [cell(task, name, target) for task, target in COMPARED]
        if arm.against is None and set(cells) != {"–"}:
            rows.append([arm.title, *cells])
    return _table([title, *(f"{task}, {target:g}" for task, target in COMPARED)], rows)


def claims_table(records: Records, metric: Metric) -> str:
    """Return the differences that the claims are about, within seeds."""
    rows = []
    for arm, other in CLAIMS:
        found = [difference(records, metric, task, target, arm, other) for task, target in COMPARED]
        cells = [_marked(metric.shown(each, "+"), each) for each in found]
        if set(cells) != {"–"}:
            rows.append([f"{ARMS[arm].title} − {ARMS[other].title}", *cells])
    return _table([f"{metric.title}, difference", *(f"{task}, {target:g}" for task, target in COMPARED)], rows)


def _marked(cell: str, apart: Spread | None) -> str:
    """Put a difference in bold if it is unlikely to be chance, and give it a dagger if it is beyond two standard errors alone."""
    if apart is None or not apart.beyond(2):
        return cell
    return f"**{cell}**" if apart.sure else f"{cell}†"


def variant_table(records: Records, task: str) -> str:
    """Return arms with one thing changed, against those that they change, within seeds."""
    rows = []
    quality = (LOSS, FID, READ) if task == "digits" else (LOSS, FID, PSNR)
    for name, arm in ARMS.items():
        if arm.against is None or difference(records, LOSS, task, VARIANT_TARGET, name, arm.against) is None:
            continue
        own, other = records.of(task, name, VARIANT_TARGET), records.of(task, arm.against, VARIANT_TARGET)
        slower = statistics.fmean(own[seed]["train_seconds"] / other[seed]["train_seconds"] for seed in own if seed in other)
        ended = Spread.of([record["trained_share"] for record in own.values()])
        cells = [metric.shown(difference(records, metric, task, VARIANT_TARGET, name, arm.against), "+") for metric in quality]
        rows.append([arm.title, ARMS[arm.against].title, f"{slower:.2f}×", FLOPS.shown(ended), *cells])
    return _table(
        ["changed", "against", "training time", "FLOPs it ended at", *(f"{metric.title}, difference" for metric in quality)], rows
    )


def region_table(records: Records, task: str, target: float) -> str:
    """Return the held-out loss of the main arms in quarters of the timestep range, clean to noisy."""
    rows = []
    for name, arm in ARMS.items():
        own = list(records.of(task, name, target).values())
        if arm.against is None and own:
            losses = torch.tensor([record["losses"] for record in own]).mean(0).reshape(4, -1).mean(1)
            rows.append([arm.title, *(f"{loss:.4f}" for loss in losses.tolist())])
    return _table(["arm", "cleanest quarter", "second", "third", "noisiest"], rows)


def draw_trade_off(records: Records, task: str) -> Figure:
    """Draw quality against cost, counted and measured."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for row, quality in zip(figure.subplots(2, 2), (LOSS, FID), strict=True):
        for axes, cost in zip(row, (FLOPS, LATENCY), strict=True):
            _draw_curves(axes, records, task, quality, cost)
    _legend(figure)
    return figure


def draw_overview(records: Records) -> Figure:
    """Draw the held-out loss of both tasks against FLOPs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        _draw_curves(axes, records, task, LOSS, FLOPS)
        axes.set_title(task)
    _legend(figure)
    return figure


def _draw_curves(axes: Axes, records: Records, task: str, quality: Metric, cost: Metric) -> None:
    """Draw one line an arm, through its targets; arms without training would flatten all others, and are in the tables alone."""
    for name, arm in ARMS.items():
        if arm.against is not None or not arm.trained:
            continue
        points = [(records.spread(task, name, target, cost), records.spread(task, name, target, quality)) for target in TARGETS]
        found = [(x, y) for x, y in points if x is not None and y is not None]
        if found:
            x, y = ([spread.mean for spread in side] for side in zip(*found, strict=True))
            errors = [0.0 if spread.seeds == 1 else spread.error for _, spread in found]
            axes.errorbar(x, y, errors, marker="o", capsize=3, color=COLORS[name], label=arm.title)
    axes.set(xlabel=f"{cost.title}, share of the dense model's", ylabel=quality.title)


def _legend(figure: Figure) -> None:
    """Name the arms of all axes below them."""
    named = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    titles = [arm.title for arm in ARMS.values() if arm.title in named]
    figure.legend([named[title] for title in titles], titles, loc="outside lower center", ncols=4)


def draw_timesteps(records: Records) -> Figure:
    """Draw each fine-tuned arm's held-out loss over the dense model's by timestep, a mean over seeds: tasks down, targets across."""
    figure = Figure(figsize=(4.2 * len(TARGETS), 3.2 * len(TASKS) + 0.8), layout="constrained")
    for line, task in zip(figure.subplots(len(TASKS), len(TARGETS), sharey="row"), TASKS, strict=True):
        for axes, target in zip(line, TARGETS, strict=True):
            dense = records.of(task, "dense", target)
            for name, arm in ARMS.items():
                own = records.of(task, name, target)
                both = [(own[seed]["losses"], dense[seed]["losses"]) for seed in own if seed in dense]
                if arm.against is None and arm.trained and name != "dense" and both:
                    ours, theirs = torch.tensor(both).unbind(1)
                    middles = [(part + 0.5) * TIMESTEPS / PARTS for part in range(PARTS)]
                    axes.semilogy(middles, (ours / theirs).mean(0), color=COLORS[name], label=arm.title)
            axes.set(title=f"{task}, {target:g}", xlabel="timestep")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
        line[0].set_ylabel("held-out loss over dense")
    _legend(figure)
    return figure


def draw_tables(records: Records, task: str, arms: Sequence[str]) -> Figure:
    """Draw the ratios that were executed: blocks down, regions from clean to noisy across; an arm a row, targets and seeds in columns."""
    columns, scale = [(target, seed) for target in TARGETS for seed in records.seeds], Normalize(0, 0.9)
    figure = Figure(figsize=(1.3 * len(columns) + 1.5, 1.7 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), len(columns), squeeze=False, sharex="row", sharey=True)
    for line, arm in zip(grid, arms, strict=True):
        line[0].set_ylabel(f"{ARMS[arm].title.removeprefix('DiffCR-')}\nblock", fontsize=8)
        for axes, (target, seed) in zip(line, columns, strict=True):
            axes.set_title(f"{target:g}, seed {seed}", fontsize=8)
            axes.tick_params(labelsize=6)
            found = records.of(task, arm, target).get(seed)
            if found:
                table = torch.tensor(found["executed"])
                axes.imshow(table.numpy(), norm=scale, cmap="viridis", aspect="auto")
                axes.set(xticks=range(table.shape[1]), yticks=range(table.shape[0]))
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=figure.axes, label="share that bypasses")
    return figure


def draw_routing(records: Records, task: str, target: float) -> Figure | None:
    """Draw through how many blocks each token of some held-out images goes, noisy to clean; `None` without a record."""
    found = next(iter(records.of(task, OURS, target).values()), None)
    if found is None:
        return None
    maps = [torch.tensor([[int(digit, 36) for digit in image] for image in region]) for region in reversed(found["routing"])]
    images = task_named(task).pictures(len(maps[0]))
    side, scale = round(maps[0].shape[1] ** 0.5), Normalize(0, len(found["table"]))
    figure = Figure(figsize=(1.4 * (len(maps) + 1) + 1, 1.4 * len(images) + 0.4), layout="constrained")
    grid = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    for row, image in zip(range(len(images)), images, strict=True):
        grid[row, 0].imshow(rearrange(image, "c h w -> h w c").numpy(), cmap="gray", vmin=0, vmax=1)
        for column, passed in enumerate(maps, start=1):
            grid[row, column].imshow(passed[row].reshape(side, side).numpy(), norm=scale, cmap="magma")
    grid[0, 0].set_title("image", fontsize=9)
    grid[0, 1].set_title("noisiest", fontsize=9)
    grid[0, -1].set_title("cleanest", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.colorbar(ScalarMappable(scale, "magma"), ax=grid, label="blocks a token goes through")
    return figure


def current(records: Sequence[Record]) -> list[Record]:
    """Return the records of experiments as they would be run now."""

    def key(record: Record) -> str | None:
        experiment = Experiment(record["task"], record["arm"], record["target"], record["seed"])
        return key_of(experiment, record["size"]) if experiment.arm in ARMS else None

    return [record for record in records if record["key"] == key(record)]


def about(records: Records) -> str:
    """Return on what the records were made, and how long that took."""
    found = list(records)
    devices, versions = (sorted({record[name] for record in found}) for name in ("device", "torch"))
    planned = chosen(["*"], records.seeds)
    missing = Counter(each.arm for each in planned if each.seed not in records.of(each.task, each.arm, each.target))
    gaps = f" Missing are {', '.join(f'{count} of `{arm}`' for arm, count in missing.items())}." if missing else ""
    hours = sum(record["seconds"] for record in found) / 3600
    size = SIZES[found[0]["size"]]
    return "\n\n".join(
        [
            f"{len(found)} of {len(planned)} experiments of size {found[0]['size']}, seeds {', '.join(map(str, records.seeds))}, on "
            f"{'; '.join(devices)}, torch {', '.join(versions)}: {hours:.1f} hours of one process, besides the training of dense "
            f"models.{gaps}",
            f"Denoisers are adaLN-zero DiTs of {size.depth} blocks, {size.width} wide, on 256 tokens. For each seed and task a dense one "
            f"is trained for {size.base_steps:,} steps. All arms start from it and are fine-tuned for {size.steps:,} more, with the same "
            f"images, timesteps and noise in the same order: batch {size.batch}, AdamW, learning rates that fall along a cosine from "
            f"{size.base_lr:g} and {size.lr:g}. Samples take {size.sample_steps} steps of DDIM without guidance, from the same noise. A "
            "target is a saving of FLOPs: what this compression ratio would save in every block. All arms are brought to it, whatever mean "
            f"ratio that takes them; the FLOPs of trained ones differ by up to {_unequal(records):.1%}.",
            "± is the standard error over the seeds, that is, over trainings: images, held-out ones too, are the same for all of them. A "
            "figure without it is of one seed. Differences are taken within seeds. FLOPs and latency are shares of the dense model's; "
            "latencies are medians, in turns with it, beside whatever else the machine did: the two uniform arms, which run the same "
            "kernels, show how far to trust them. "
            "Settings of the library and of the study's training were chosen on other seeds of these tasks by held-out losses on the "
            "same images, and for learned ratios, not for what they are compared with.",
        ]
    )


def _unequal(records: Records) -> float:
    """Return by what share, at most, the FLOPs of a trained arm differ from the uniform one's of its target."""
    pairs = [(r, records.of(r["task"], REFERENCE, r["target"]).get(r["seed"])) for r in records if ARMS[r["arm"]].trained]
    return max((abs(own["flops_share"] / other["flops_share"] - 1) for own, other in pairs if other), default=0.0)


def write_report(path: Path, out: Path) -> None:
    """Write `RESULTS.md` and its pictures; findings that stand in an earlier one are kept.

    Args:
        path: File of records.
        out: Folder to write to.
    """
    every = read_records(path)
    records = Records(current(every))
    if not list(records):
        raise SystemExit(f"{path} holds no record of experiments as they would be run now.")
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    results = out / "RESULTS.md"
    kept = FINDINGS.search(results.read_text(encoding="utf-8")) if results.exists() else None
    parts = ["# Does it pay?", f"<!-- findings -->\n{kept[1] if kept else ''}<!-- end of findings -->", "## What was run", about(records)]
    if others := len(every) - len(list(records)):
        parts.append(f"{others} records of other settings, or of experiments run again, are left out.")
    draw_timesteps(records).savefig(pictures / "timesteps.png", dpi=110)
    draw_overview(records).savefig(pictures / "overview.png", dpi=110)
    parts += ["## The claims, in figures", "![Held-out loss against FLOPs](pictures/overview.png)", summary_table(records)]
    parts += ["The same as a mean over timesteps of the logarithm, so that a hundredth of its loss counts alike at each of them:"]
    parts += [log_table(records), "![Held-out loss over dense by timestep](pictures/timesteps.png)"]
    parts += ["How far samples are from real images:", fid_table(records)]
    parts += [
        "The claims one by one: in bold what differs from 0 at the 5 % level by Student's t, which takes "
        + ", ".join(f"{needed(count):.1f} standard errors for {count} seeds" for count in range(len(records.seeds), 1, -1))
        + "; with † what is more than two standard errors from 0 and no more than that. Of so many differences, some get there by chance."
    ]
    parts += [claims_table(records, metric) for metric in (LOSS, LOG_LOSS, FID)]
    for task in TASKS:
        parts += [f"## {task.capitalize()}", task_named(task).about()]
        for target in TARGETS:
            if records.of(task, REFERENCE, target):
                parts += [f"### Target {target:g}", main_table(records, task, target)]
                parts += ["Held-out loss by timestep:", region_table(records, task, target)]
        if records.of(task, OURS, VARIANT_TARGET):
            parts += [f"### One setting at a time, target {VARIANT_TARGET:g}", variant_table(records, task)]
        draw_trade_off(records, task).savefig(pictures / f"{task}_trade_off.png", dpi=110)
        parts.append(f"![Quality against cost](pictures/{task}_trade_off.png)")
        parts.append("Arms without training are left out of the picture: they would flatten the others.")
        draw_tables(records, task, ("layers", OURS, "regions-10")).savefig(pictures / f"{task}_tables.png", dpi=110)
        parts.append(f"![Learned ratios](pictures/{task}_tables.png)")
        routing = draw_routing(records, task, VARIANT_TARGET)
        if routing is not None:
            routing.savefig(pictures / f"{task}_routing.png", dpi=110)
            parts.append(f"![Blocks that each token goes through](pictures/{task}_routing.png)")
    results.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
