"""What the demo shows while it works: one progress bar per stage, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Stages"]


class Stages:
    """Progress bars, one per stage.

    Attributes:
        progress: the bars; a context manager.
        seconds: name of each finished stage to how long it took.
    """

    def __init__(self, console: Console) -> None:
        """Prepare the bars on a console."""
        self.progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Open a stage of `total` steps; yield what to call after each of them, with its loss if it has one."""
        task = self.progress.add_task(name, total=total, note="")
        started = time.perf_counter()
        average = 0.0

        def advance(loss: float | None = None) -> None:
            nonlocal average
            if loss is None:
                self.progress.advance(task)
                return
            average = 0.98 * average + 0.02 * loss if average else loss  # single steps are too noisy to read
            self.progress.update(task, advance=1, note=f"loss {average:.4f}")

        yield advance
        self.seconds[name] = round(time.perf_counter() - started, 2)
        if not self.progress.console.is_terminal:  # a log shows no bars before the end
            self.progress.console.print(f"{name}: {self.seconds[name]:.0f} s", highlight=False)
