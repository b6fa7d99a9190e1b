"""Train and measure what is compared, and make a report of it.

    python recipes/study run --out study-out                        # everything that has no record in study-out/records.jsonl yet
    python recipes/study run --out study-out --only 'digits/*/0.3/*'
    python recipes/study run --out large-out --size large --device cuda --jobs 1
    python recipes/study report study-out/records.jsonl --out report   # RESULTS.md with its pictures

An experiment is `task/arm/target/seed`, such as `digits/uniform/0.3/11`; `--only` takes shell patterns, and `--list` shows what there is.
Each trains one arm from the dense model of its seed, measures it, and adds a line of JSON to the records. One that has a record is not run
again unless its settings have changed; so a run that was stopped goes on, and one that is started with the records of another adds to them.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # `recipes`, where this folder and `parts` lie

import torch  # noqa: E402

from study.arms import ARMS, SEEDS, chosen  # noqa: E402
from study.experiment import SIZES, Place  # noqa: E402
from study.report import write_report  # noqa: E402
from study.runner import run_all  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run experiments", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run.add_argument("--out", type=Path, required=True, help="folder for records.jsonl and weights")
    run.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="experiments to run, such as 'digits/uniform/*'")
    run.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the dense models and everything after them")
    run.add_argument("--size", choices=SIZES, default="small", help="how large models are, and how long they train")
    run.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="processes, each of one thread")
    run.add_argument("--device", default="cpu", help="what all run on; with cuda, one job is best")
    run.add_argument("--list", action="store_true", help="show the experiments, and run none")
    report = commands.add_parser("report", help="make tables and pictures of records")
    report.add_argument("records", type=Path, help="records.jsonl of a run")
    report.add_argument("--out", type=Path, required=True, help="folder for RESULTS.md and its pictures")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.command == "report":
        write_report(given.records, given.out)
        return
    experiments = chosen(given.only, given.seeds)
    if given.list or not experiments:
        print("\n".join(f"{experiment}  {ARMS[experiment.arm].title}" for experiment in experiments) or f"none matches {given.only}")
        return
    run_all(experiments, Place(given.size, given.out / "weights", given.device), given.out / "records.jsonl", given.jobs)


if __name__ == "__main__":
    main()
