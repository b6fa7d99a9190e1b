"""Many experiments: those whose records are there are left out, the others run in processes of one thread each."""

import json
import multiprocessing
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from study.arms import Experiment
from study.experiment import Place, Record, key_of, prepare, run

__all__ = ["read_records", "run_all"]


def read_records(path: Path) -> list[Record]:
    """Return the records of a file of JSON lines; a line that a stopped run left unfinished is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_all(experiments: Sequence[Experiment], place: Place, records: Path, jobs: int) -> None:
    """Run the experiments that have no record yet, seed by seed, and add their records as they come.

    Args:
        experiments: Which to run.
        place: How large, where to keep weights, and on which device.
        records: File of JSON lines.
        jobs: Processes.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    text = records.read_text(encoding="utf-8") if records.exists() else ""
    if text and not text.endswith("\n"):  # a run was stopped while it wrote
        records.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    done = {record["key"] for record in read_records(records)}
    missing = [experiment for experiment in experiments if key_of(experiment, place.size) not in done]
    console = Console()
    console.print(f"{len(experiments) - len(missing)} of {len(experiments)} experiments have a record; {len(missing)} to run.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    failed: list[Experiment] = []
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    with Progress(*columns, console=console) as progress, records.open("a", encoding="utf-8") as file, ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # at Ctrl-C, what waits is not begun
        bar = progress.add_task("experiments", total=len(missing))
        for seed in sorted({experiment.seed for experiment in missing}):
            own = [experiment for experiment in missing if experiment.seed == seed]
            progress.update(bar, description=f"seed {seed}: dense models")
            tasks = sorted({experiment.task for experiment in own})
            list(pool.map(prepare, tasks, repeat(seed), repeat(place)))  # what all arms start from
            progress.update(bar, description=f"seed {seed}: arms")
            running = {pool.submit(run, experiment, place): experiment for experiment in own}
            for future in as_completed(running):
                progress.advance(bar)
                if (error := future.exception()) is not None:
                    failed.append(running[future])
                    console.print(f"{running[future]} failed:\n{''.join(traceback.format_exception(error))}", markup=False)
                    continue
                record = future.result()
                file.write(json.dumps(record) + "\n")
                file.flush()
                console.print(
                    f"{running[future]}: loss {record['loss']:.4f}, FID "
                    f"{record['distances']['fid']:.3f}, {record['flops_share']:.3f} of FLOPs, {record['seconds']:.0f} s"
                )
    if failed:
        raise SystemExit(f"{len(failed)} experiments failed: {', '.join(map(str, failed))}. Started again, this runs them alone.")
