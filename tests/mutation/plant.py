"""Plants bugs in a copy of the package, one at a time, and shows which law catches each.

    python tests/mutation/plant.py                      # all of them: a table, and exit status 1 if one is not caught by the law it is for
    python tests/mutation/plant.py "k rounded down"     # one

A bug is a piece of the source and what stands there in its place; the copy lies in a temporary folder, and every law runs on it in a
process of its own, on models that hypothesis draws, until it fails. Of the laws that a bug breaks, the one it is for should be the first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "diffcr_surgery"
LAWS = (
    "check_conversion", "check_bypass", "check_mixed_timesteps", "check_gradients", "check_round_trip", "check_specialization",
    "check_pattern",
)  # fmt: skip
EXAMPLES = 200
OWN_EXAMPLES = 1000  # of the law that a bug is for: some show in one drawn model of hundreds
LEGEND = f"""
12: the law said so at example 12; 12!: it never did, and at example 12 something else was raised; –: {EXAMPLES} examples passed
({OWN_EXAMPLES} where bold). Bold is the law that the bug is for.
"""


@dataclass(frozen=True)
class Bug:
    """A planted bug: in this file of the package, this text is exchanged for that, and this law has to say so."""

    name: str
    file: str
    text: str
    planted: str
    caught_by: str


@dataclass(frozen=True)
class Outcome:
    """What a law had to say.

    Attributes:
        law: The example at which it raised `LawError`; 0 if it never did.
        other: The first example at which anything else was raised; 0 if none was.
        how: The text of the last error.
    """

    law: int = 0
    other: int = 0
    how: str = ""

    def __str__(self) -> str:
        return str(self.law or (f"{self.other}!" if self.other else "–"))


BUGS = (
    Bug(
        "rotary table not gathered", "rewrite/emit.py",  # the first rows, whichever tokens are kept
        "(leaf, kept, pattern, call.tokens)",
        "(leaf, graph.call_method('argsort', (kept,)) if each else kept, pattern, call.tokens)",
        "check_bypass",
    ),
    Bug(
        "off-by-one prefix", "detect.py",
        "found = tuple(_runs(row) for row", "found = tuple(_runs([*row[1:], False]) for row", "check_bypass",
    ),
    Bug(
        "scores gathered in another order", "rewrite/ops.py",
        "return factor.gather(1, kept)", "return factor.gather(1, kept.sort(dim=1, descending=True).values)", "check_bypass",
    ),
    Bug(
        "blend weights swapped", "rewrite/ops.py",
        "return torch.lerp(lower, upper.to(lower.dtype)", "return torch.lerp(upper.to(lower.dtype), lower", "check_mixed_timesteps",
    ),
    Bug(
        "region edges off by one", "timesteps.py",
        "int((timestep - self.low) * self.count / (self.high - self.low))",
        "max(0, -int((self.low - timestep) * self.count // (self.high - self.low)) - 1)",
        "check_mixed_timesteps",
    ),
    Bug(
        "k rounded down", "tokens.py",
        "math.ceil((1.0 - ratio) * moving - _ROUNDING)", "math.floor((1.0 - ratio) * moving + _ROUNDING)", "check_specialization",
    ),
    Bug(
        "stale graph answered", "runtime/execute.py",
        "key = (decisions, fixed, in_place)", "key = (len(decisions), fixed, in_place)", "check_mixed_timesteps",
    ),
    Bug(
        "in-place scatter where a skip reads", "rewrite/passes.py",
        "own and all(reader < node for reader in readers)", "True", "check_specialization",
    ),
    Bug(
        "attribute left behind by restore_", "runtime/convert.py",
        'model._modules.pop("diffcr", None)', 'vars(model)["former"] = model._modules.pop("diffcr", None)', "check_conversion",
    ),
    Bug(
        "mixed batch in the order it ran", "split.py",  # and not in the order it was given
        "order = sorted(range(len(rows)), key=rows.__getitem__)", "order = list(range(len(rows)))", "check_mixed_timesteps",
    ),
    Bug(
        "slope of a ratio with the other sign", "rewrite/ops.py",  # and the same blend weight
        "return weight + (weight.clamp(0.0, 1.0) - weight).detach()",
        "return weight.clamp(0.0, 1.0).detach() - (weight - weight.detach())",
        "check_gradients",
    ),
    Bug(
        "routers not loaded", "save.py",
        "state.load_state_dict(tensors)",
        "state.load_state_dict({name: t for name, t in tensors.items() if not name.startswith('routers')}, strict=False)",
        "check_round_trip",
    ),
    Bug(
        "declared tables not permuted along", "align/__init__.py",  # cosine and sine of a tuple, say
        "for name, axes in hint.items() if name in self.raw and",
        "for name, axes in hint.items() if name in self.raw and '.' not in name and",
        "check_pattern",
    ),
)  # fmt: skip


def one_law(law: str, examples: int) -> Outcome:
    """Run a law on drawn models until it fails; other errors are noted, and do not stop it."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from diffcr_surgery import testing as dt

    torch.set_num_threads(1)
    count, found = 0, Outcome()

    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count, found
        if law == "check_pattern":
            given_ = data.draw(dt.blocks_with_pattern())
        else:
            model = data.draw(dt.denoisers())
            given_ = (model, data.draw(dt.inputs_for(model)), data.draw(dt.configs(model)))
        count += 1
        try:
            getattr(dt, law)(*given_)
        except dt.LawError as error:
            if not found.law:  # hypothesis runs the failing example once more
                found = replace(found, law=count, how=shown(error))
            raise
        except Exception as error:
            if not found.other:
                found = replace(found, other=count, how=shown(error))

    with suppress(dt.LawError):
        run()
    return found


def shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


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


def outcomes(bug: Bug | None, laws: Sequence[str]) -> dict[str, Outcome]:
    """Return what each law has to say of a bug, or of the package without one."""
    with tempfile.TemporaryDirectory() as folder:
        plant(bug, Path(folder))
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        found = {}
        for law in laws:
            own = bug is not None and law == bug.caught_by
            command = [sys.executable, __file__, "--law", law, "--examples", str(OWN_EXAMPLES if own else EXAMPLES)]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{law} could not be run on {bug.name if bug else 'the package'}: {done.stderr}")
            found[law] = Outcome(**json.loads(done.stdout.splitlines()[-1]))
        return found


def row(name: str, found: dict[str, Outcome], law: str = "") -> str:
    """Return a line of the table, with the entry of one law in bold."""
    return f"| {name} | " + " | ".join(f"**{outcome}**" if each == law else str(outcome) for each, outcome in found.items()) + " |"


def main() -> int:
    """Print a table of bugs and laws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bug", nargs="?", choices=[bug.name for bug in BUGS], help="only this one")
    parser.add_argument("--law", choices=LAWS, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.law:
        print(json.dumps(asdict(one_law(options.law, options.examples))))
        return 0
    missed = []
    print("| planted bug | " + " | ".join(LAWS) + " |\n|---|" + "---|" * len(LAWS))
    for bug in (None, *BUGS) if options.bug is None else [bug for bug in BUGS if bug.name == options.bug]:
        name, law = ("none", "") if bug is None else (bug.name, bug.caught_by)
        found = outcomes(bug, LAWS)
        print(row(name, found, law), flush=True)
        print(*(f"    {each}: {outcome.how}" for each, outcome in found.items() if outcome.how), sep="\n", file=sys.stderr, flush=True)
        if any(outcome.how for outcome in found.values()) if bug is None else not found[law].law:
            missed.append(name)
    print(LEGEND)
    print(f"not as it should be: {', '.join(missed)}" if missed else "all caught, and without a bug every law holds")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
