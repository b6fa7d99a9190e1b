"""Everything that is measured of inference, by the bench command: the tables of RESULTS.md.

    python recipes/benchmarks/inference.py --out DIR                  about half an hour on two CPU cores
    python recipes/benchmarks/inference.py --device cuda --out DIR    whole models, bfloat16, eager and compiled, batch 1 and 8

On a CPU the large models are shortened to a few layers, which the tables say. Each run is a process of its own.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RATIOS = ("0.1", "0.2", "0.3", "0.5", "0.7")
CPU = [
    "--model dit-xl-2 --layers 4 --tokens 1024 --batch 2 --rounds 7",
    "--model dit-xl-2 --tokens 256 --rounds 5 --break-even",
    "--model pixart-sigma --layers 2 --tokens 1024 --batch 2 --rounds 7",
    "--model pixart-sigma --layers 2 --tokens 4096 --rounds 5",
    "--model sd3-medium --layers 2 --tokens 1024 --rounds 5",
    "--model sd3-medium --layers 2 --tokens 4096 --rounds 3",
    "--model flux-dev --layers 1 --tokens 256 --batch 2 --rounds 3",
    "--model dit-xl-2 --layers 4 --tokens 256 --rounds 7 --compile",
]
MODELS = {"dit-xl-2": (256, 1024), "pixart-sigma": (1024, 4096), "sd3-medium": (1024, 4096), "flux-dev": (4096,)}
CUDA = [
    f"--model {model} --tokens {count} --batch {batch} --rounds 15 --device cuda --dtype bfloat16 {mode}"
    for model, tokens in MODELS.items()
    for count in tokens
    for batch in (1, 8)
    for mode in ("", "--compile")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose command holds this text alone")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in (CPU if given.device == "cpu" else CUDA) if given.only in run]
    for number, run in enumerate(chosen):
        out = given.out / str(number)
        command = [sys.executable, "-m", "diffcr_surgery", "bench", *run.split(), "--ratio", *RATIOS, "--out", str(out)]
        done = subprocess.run(command, check=False)
        lines = (out / "table.md").read_text(encoding="utf-8") if done.returncode == 0 else f"failed with status {done.returncode}\n"
        with (given.out / "tables.md").open("a", encoding="utf-8") as tables:
            tables.write(f"`python -m diffcr_surgery bench {run} --ratio {' '.join(RATIOS)}`\n\n{lines}\n")


if __name__ == "__main__":
    main()
