"""Plants bugs in a copy of the package, one at a time, and shows which law catches each.

    python tests/mutation/plant.py                      # all of them: a table, and exit status 1 if one is not caught
    python tests/mutation/plant.py "k rounded down"     # one

A bug is a piece of the source and what stands there in its place; the copy lies in a temporary folder, and every law runs on it in a
process of its own, on models that hypothesis draws, until it fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "diffcr_surgery"
LAWS = (
    "check_conversion", "check_bypass", "check_mixed_timesteps", "check_gradients", "check_round_trip", "check_specialization",
    "check_pattern",
)  # fmt: skip
EXAMPLES = 200


@dataclass(frozen=True)
class Bug:
    """A planted bug: in this file of the package, this text is exchanged for that."""

    name: str
    file: str
    text: str
    planted: str


BUGS = (
    Bug(
        "rotary table not gathered", "rewrite/emit.py",  # the first rows, whichever tokens are kept
        "(leaf, kept, pattern, call.tokens)",
        "(leaf, graph.call_method('argsort', (kept,)) if each else kept, pattern, call.tokens)",
    ),
    Bug("off-by-one prefix", "detect.py", "found = tuple(_runs(row) for row", "found = tuple(_runs([*row[1:], False]) for row"),
    Bug(
        "scores gathered in another order", "rewrite/ops.py",
        "return factor.gather(1, kept)", "return factor.gather(1, kept.sort(dim=1, descending=True).values)",
    ),
    Bug(
        "blend weights swapped", "rewrite/ops.py",
        "return torch.lerp(lower, upper.to(lower.dtype)", "return torch.lerp(upper.to(lower.dtype), lower",
    ),
    Bug(
        "region edges off by one", "timesteps.py",
        "int((timestep - self.low) * self.count / (self.high - self.low))",
        "max(0, math.ceil((timestep - self.low) * self.count / (self.high - self.low)) - 1)",
    ),
    Bug("k rounded down", "tokens.py", "math.ceil((1.0 - ratio) * moving - _ROUNDING)", "math.floor((1.0 - ratio) * moving + _ROUNDING)"),
    Bug("stale graph answered", "runtime/execute.py", "key = (decisions, fixed, in_place)", "key = (len(decisions), fixed, in_place)"),
    Bug(
        "in-place scatter where a skip reads", "rewrite/passes.py",
        "own and all(reader < node for reader in readers)", "True",
    ),
)  # fmt: skip


def one_law(law: str) -> int:
    """Run a law on drawn models until it fails; returns which example that was, 0 if none, -1 if it broke in another way than by a law."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from diffcr_surgery import SurgeryError
    from diffcr_surgery import testing as dt

    torch.set_num_threads(1)
    count, failed = 0, 0

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count, failed
        if law == "check_pattern":
            given_ = data.draw(dt.blocks_with_pattern())
        else:
            model = data.draw(dt.denoisers())
            given_ = (model, data.draw(dt.inputs_for(model)), data.draw(dt.configs(model)))
        count += 1
        try:
            getattr(dt, law)(*given_)
        except Exception:
            failed = failed or count  # hypothesis runs the failing example once more
            raise

    try:
        run()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return failed if isinstance(error, (dt.LawError, SurgeryError)) else -1  # the library's own checks are laws too
    return 0


def plant(bug: Bug | None, folder: Path) -> None:
    """Copy the package to a folder, with the bug in it."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    if bug is None:
        return
    path = folder / PACKAGE.name / bug.file
    source = path.read_text(encoding="utf-8")
    if source.count(bug.text) != 1:
        raise SystemExit(f"{bug.name}: {bug.file} holds {bug.text!r} {source.count(bug.text)} times; bring the bug up to date.")
    path.write_text(source.replace(bug.text, bug.planted), encoding="utf-8")


def caught_by(bug: Bug | None, laws: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return law -> at which example it failed (0: it held), and how."""
    with tempfile.TemporaryDirectory() as folder:
        plant(bug, Path(folder))
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        found = {}
        for law in laws:
            command = [sys.executable, __file__, "--law", law]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
            lines = done.stderr.strip().splitlines()
            found[law] = (int(done.stdout.split()[-1]) if done.returncode == 0 else -1, lines[-1] if lines else "")
        return found


def main() -> int:
    """Print a table of bugs and laws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bug", nargs="?", choices=[bug.name for bug in BUGS], help="only this one")
    parser.add_argument("--law", choices=LAWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.law:
        print(one_law(options.law))
        return 0
    missed = []
    sound = caught_by(None, LAWS) if options.bug is None else {}
    if sound:
        print("| planted bug | " + " | ".join(LAWS) + " |\n|---|" + "---|" * len(LAWS))
        print("| none | " + " | ".join("holds" if not at else f"fails at {at}: {how}" for at, how in sound.values()) + " |", flush=True)
        missed += ["none"] * any(at for at, _ in sound.values())
    for bug in BUGS if options.bug is None else [bug for bug in BUGS if bug.name == options.bug]:
        found = caught_by(bug, LAWS)
        print(
            f"| {bug.name} | " + " | ".join(f"example {at}" if at > 0 else "–" if not at else "crash" for at, _ in found.values()) + " |",
            flush=True,
        )
        print(*(f"    {law}: {how}" for law, (at, how) in found.items() if at), sep="\n", file=sys.stderr, flush=True)
        if not any(at > 0 for at, _ in found.values()):
            missed.append(bug.name)
    print(f"not caught: {', '.join(missed)}" if missed else "all caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
