"""Plug-ins that break: an error by name, and everything as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffcr_surgery import patterns
from tests.launch import TEST_ENVIRONMENT

GOOD = """
from diffcr_surgery import BlockPattern
pattern = BlockPattern("from a plug-in", "nowhere.blocks:Block", {"x": "b n c"})
"""
VALUE = "diffcr_plug_in:pattern"


def install(folder: Path, source: str, value: str = VALUE, *, name: str = "diffcr_plug_in", text: bytes | None = None) -> Path:
    """Install a distribution as pip would: a module, and metadata that names an entry point."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(f"[{patterns.ENTRY_POINTS}]\nentry_of_{name} = {value}\n".encode() if text is None else text)
    return folder


SCRIPT = """
import os, sys
import diffcr_surgery as dcs
from diffcr_surgery import patterns
from tests.models import snapshot
from tests.small import Denoiser, inputs

def attempt(head):
    model = Denoiser()
    before = snapshot(model)
    try:
        routed = dcs.plan(model, inputs(100.0, 900.0)).routed_sites
        outcome = f"routes {len(routed)}, knows {sorted(pattern.name for pattern in patterns._REGISTRY.values())}"
    except dcs.errors.PatternError as error:
        outcome = f"PatternError {error}"
    except KeyboardInterrupt as error:
        outcome = f"KeyboardInterrupt {error}"
    print(head, outcome.replace("\\n", " "), snapshot(model) == before, sep="\\t", flush=True)

for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    os.environ[patterns.OFF_SWITCH] = "1"
    attempt("before")
    assert not any(name.startswith("diffcr_plug") for name in sys.modules)
    del os.environ[patterns.OFF_SWITCH]
    attempt("on")
    attempt("again")
    os.environ[patterns.OFF_SWITCH] = "1"
    attempt("off")
    del os.environ[patterns.OFF_SWITCH]
    sys.path.remove(folder)
    attempt("gone")
    patterns._plugins_loaded = False
    patterns._REGISTRY.clear()
    for name in [name for name in sys.modules if name.startswith("diffcr_plug")]:
        del sys.modules[name]
"""

ERRORS = {
    "ImportError": ("import no_such_library", "no_such_library"),
    "SyntaxError": ("pattern = (", "never closed"),
    "RuntimeError": ("raise RuntimeError('on fire')", "on fire"),
    "SystemExit": ("import sys; sys.exit('no licence')", "no licence"),
    "SystemExit without words": ("raise SystemExit", "SystemExit"),
    "MemoryError": ("raise MemoryError", "MemoryError"),
    "RecursionError": ("def f(): f()\nf()", "recursion"),
    "UnicodeError": ("raise UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'no text')", "no text"),
    "nothing": ("", "no attribute 'pattern'"),
    "None": ("pattern = None", "takes a BlockPattern, not NoneType"),
    "a class": ("from diffcr_surgery import BlockPattern as pattern", "takes a BlockPattern, not type"),
    "a dict": ("pattern = {'x': 'b n c'}", "takes a BlockPattern, not dict"),
    "a list of patterns": (GOOD + "pattern = [pattern]", "takes a BlockPattern, not list"),
    "a wrong pattern": (GOOD + "pattern = BlockPattern('x', 'nowhere', {})", "not of the form"),
    "an attribute that breaks": ("def __getattr__(name): raise ZeroDivisionError(name)", "ZeroDivisionError: pattern"),
    "one that plans while it is loaded": (
        GOOD + "import diffcr_surgery.patterns as p, torch\np.pattern_of(torch.nn.Linear(1, 1))\n1 / 0",
        "division",
    ),
}
MALFORMED = {
    "no module": ":pattern", "no attribute": "diffcr_plug_in:", "spaces": "diffcr plug in : pattern", "a path": "../../x:y",
    "code": "os:system('exit')", "empty": "", "colons": "a:b:c", "extras": "diffcr_plug_in:missing [extra]",
}  # fmt: skip
BROKEN = {
    "no equals sign": f"[{patterns.ENTRY_POINTS}]\nnonsense\n".encode(),
    "no text": f"[{patterns.ENTRY_POINTS}]\n".encode() + b"\xff\xfe = \xff\n",
}


STOPPED = """
import os
if os.environ.setdefault("STOPPED_ONCE", "no") == "no":
    os.environ["STOPPED_ONCE"] = "yes"
    raise KeyboardInterrupt("stop")
"""


def next_to_each_other(folder: Path, bad: str) -> Path:
    """A plug-in that works, and one of another name that does not."""
    install(folder, "raise OSError('torn cable')", f"diffcr_plug_{bad}:pattern", name=f"diffcr_plug_{bad}")
    return install(folder, GOOD, "diffcr_plug_good:pattern", name="diffcr_plug_good")


Outcomes = dict[str, dict[str, tuple[str, bool]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What planning did with each plug-in in turn, in one fresh process; and whether the model was as before."""
    root = tmp_path_factory.mktemp("plug-ins")
    cases = {name: install(root / name, source) for name, (source, _) in ERRORS.items()}
    cases |= {name: install(root / name, GOOD, value) for name, value in MALFORMED.items()}
    cases |= {name: install(root / name, GOOD, text=text) for name, text in BROKEN.items()}
    cases |= {"good": install(root / "good", GOOD), "interrupted": install(root / "interrupted", STOPPED + GOOD)}
    cases |= {f"good next to {bad}": next_to_each_other(root / f"good next to {bad}", bad) for bad in "az"}
    command = [sys.executable, "-c", SCRIPT, *map(str, cases.values())]
    done = subprocess.run(command, env=TEST_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 5 * len(cases), done.stdout
    return {name: {head: (outcome, same == "True") for head, outcome, same in lines[5 * i : 5 * i + 5]} for i, name in enumerate(cases)}


NOTHING = ("routes 3, knows []", True)
FOUND = ("routes 3, knows ['from a plug-in']", True)


@pytest.mark.parametrize("name", [*ERRORS, *MALFORMED, *BROKEN])
def test_a_plugin_that_breaks_is_an_error_by_name(name: str, outcomes: Outcomes) -> None:
    """Asked again it breaks again; off or gone it is no more. Off from the start, it is not even imported."""
    found = outcomes[name]
    assert found["before"] == NOTHING
    assert found["on"] == found["again"] and found["on"][1]
    error = found["on"][0]
    named = "An entry point" if name in BROKEN else "The entry point 'entry_of_diffcr_plug_in'"
    cause = ERRORS[name][1] if name in ERRORS else "could not be loaded"
    value = "" if name in BROKEN else MALFORMED.get(name, VALUE)
    for words in (f"PatternError {named}", f"of group {patterns.ENTRY_POINTS}", f"{patterns.OFF_SWITCH}=1", cause, value):
        assert words in error
    assert found["off"] == found["gone"] == NOTHING


def test_a_good_plugin(outcomes: Outcomes) -> None:
    """What the others are measured against; what it registered stays."""
    assert list(outcomes["good"].values()) == [NOTHING, *[FOUND] * 4]


def test_an_interrupt_passes_and_the_plugins_are_asked_again(outcomes: Outcomes) -> None:
    found = outcomes["interrupted"]
    assert found["on"] == ("KeyboardInterrupt stop", True)
    assert found["again"] == FOUND


@pytest.mark.parametrize("bad", ["a", "z"])
def test_a_good_plugin_next_to_a_bad_one(bad: str, outcomes: Outcomes) -> None:
    """The bad one is named wherever it stands, and without it all goes on."""
    found = outcomes[f"good next to {bad}"]
    assert found["on"] == found["again"]
    assert found["on"][0].startswith(f"PatternError The entry point 'entry_of_diffcr_plug_{bad}'") and "torn cable" in found["on"][0]
    assert found["off"][0].startswith("routes 3") and found["gone"][0].startswith("routes 3")


WAITS = """
import sys, threading, torch
from diffcr_surgery.patterns import pattern_of

loading, found = threading.Event(), []
sys.path.insert(0, sys.argv[1])
first = threading.Thread(target=lambda: found.append(pattern_of(torch.nn.Linear(2, 2))))
first.start()
loading.wait()
found.append(pattern_of(torch.nn.Linear(2, 2)))
first.join()
print([getattr(pattern, "name", None) for pattern in found])
"""
SLOW = """
import sys, time, torch
from diffcr_surgery.patterns import pattern_of
assert pattern_of(torch.nn.Linear(2, 2)) is None
sys.modules["__main__"].loading.set()
time.sleep(0.5)
"""


def test_a_thread_that_comes_second_waits_for_the_plugins(tmp_path: Path) -> None:
    """And a plug-in that asks for patterns while it is loaded gets those there are."""
    install(tmp_path, SLOW + GOOD.replace("nowhere.blocks:Block", "torch.nn.modules.linear:Linear"))
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    done = subprocess.run(command, env=TEST_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "['from a plug-in', 'from a plug-in']", done.stderr
