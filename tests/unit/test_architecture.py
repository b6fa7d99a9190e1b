"""The package's shape: imports point one way along the line of stages, and importing it loads nothing optional."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "diffcr_surgery"

# A file or folder of the package imports from itself and from what stands before it.
ORDER = (
    "errors",
    "caches",
    "config",
    "_tree",
    "_shards",
    "atomic",
    "axes",
    "patterns",
    "tokens",
    "ratios",
    "router",
    "trace",
    "capture",
    "detect",
    "align",
    "sites",
    "rewrite",
    "flops",
    "costs",
    "timesteps",
    "split",
    "samples",
    "plan",
    "runtime",
    "training",
    "optimizer",
    "specialize",
    "save",
    "testing",
    "__init__",  # the public names; what follows is written with them
    "demo",
    "bench",
    "cli",
    "__main__",
)

OPTIONAL = (
    "accelerate", "datasets", "diffusers", "hypothesis", "matplotlib", "peft", "rich", "skimage", "sklearn", "tensorboard", "timm",
    "torchao", "torchmetrics", "torchvision", "transformers", "yaml",
)  # fmt: skip


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and stage of every import inside the package, wherever in the file it stands."""
    parent = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), parent)
            names = [f"{base}.{name}" for name in names]
        for first, *rest in (name.split(".") for name in names):
            if first == PACKAGE.name:
                yield node.lineno, rest[0] if rest and rest[0] in ORDER else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    place = ORDER.index(stage_of(path))
    backwards = [(line, stage) for line, stage in imported_stages(path) if ORDER.index(stage) > place]
    assert not backwards, f"{path.name} belongs to {stage_of(path)!r}, which comes before what it imports: {backwards}"


def test_order_names_every_stage_once():
    assert sorted(ORDER) == sorted({stage_of(path) for path in FILES})


def test_import_loads_nothing_optional():
    code = f"""
import sys, torch
import diffcr_surgery
loaded = [name for name in {OPTIONAL} if name in sys.modules]
sys.exit(f"importing diffcr_surgery loads {{loaded}}" if loaded else torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
