"""What the documentation says is true: its code runs, its names exist, its commands are the ones that are checked."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import diffcr_surgery as dcs
import diffcr_surgery.testing

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUBMODULES = {"errors", "testing"}  # public by their own name, not by __all__
SHOWN_ELSEWHERE = {  # in the README's test file; an architecture in the example of `Denoiser`
    "check_conversion", "check_bypass", "check_mixed_timesteps", "check_gradients", "check_round_trip", "check_specialization",
    "Architecture",
}  # fmt: skip
MODULES = ["diffcr_surgery", *(m.name for m in pkgutil.walk_packages(dcs.__path__, "diffcr_surgery."))]
MODULES = [name for name in MODULES if not name.endswith(".__main__")]


def blocks(language: str) -> list[tuple[int, str]]:
    """First line and text of every fenced block of the README in one language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [(README.count("\n", 0, match.start(1)), match.group(1)) for match in found]


def examples(module: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    story, tests = {"__name__": "readme"}, []
    code = blocks("python")
    assert code
    for line, text in code:
        # The parts of one story, in which a test file is a file of its own.
        namespace = {"__name__": "test_readme"} if "\ndef test_" in text else story
        # Blank lines in front, so that a traceback shows the README's own line numbers.
        exec(compile("\n" * line + text, "README.md", "exec"), namespace)
        tests += [value for name, value in namespace.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(module):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_public_names_have_examples():
    shown = {test.name.removeprefix(f"{module}.").split(".")[0] for module in MODULES for test in examples(module)}
    public = {name for part in (dcs, dcs.testing) for name in part.__all__ if not name.endswith("Error") and callable(getattr(part, name))}
    assert public - shown == SHOWN_ELSEWHERE, "public names whose docstring has no example"


def test_the_readme_shows_the_laws():
    called = {name for _, text in blocks("python") for name in re.findall(r"\bdt\.(\w+)\(", text)}
    assert called >= SHOWN_ELSEWHERE - {"Architecture"}


def test_readme_names_exist():
    used = set(re.findall(r"\bdcs\.(\w+)", README))
    assert used <= set(dcs.__all__) | SUBMODULES


def test_readme_table_lists_the_public_names():
    section = README.split("## Public names\n")[1].split("\n## ")[0]
    first_cells = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    listed = re.findall(r"`(\w+)`", first_cells)
    assert sorted(listed) == sorted(name for name in dcs.__all__ if not name.startswith("_"))


def test_ci_runs_the_readme_test_command():
    commands = [line for _, text in blocks("bash") for line in text.splitlines() if "pytest" in line]
    assert len(commands) == 1, "the README shows one command that installs and passes the tests"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert commands[0] in [line.strip() for line in script.splitlines()]
