"""The command line: `diffcr-surgery demo --out DIR`, or `python -m diffcr_surgery demo --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_EXTRAS = ("diffusers", "matplotlib", "rich", "sklearn", "timm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; `None` takes it from the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    return _demo(options)


def _parser() -> argparse.ArgumentParser:
    about = "Turn any transformer denoiser into a DiffCR model."
    parser = argparse.ArgumentParser(prog="diffcr-surgery", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train, convert, fine-tune and sample on scanned digits",
        description="Train a small DiT on scikit-learn's digits, convert it, fine-tune it towards ratio 0.3, and "
        "compare it with the dense model and a uniform ratio. About six minutes on two cores; nothing is downloaded.",
    )
    demo.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures, adapter and report")
    demo.add_argument("--quick", action="store_true", help="under a minute; trains too little for legible digits")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything that is random (default: 0)")
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        # Imported here, so that `--help` neither waits for these libraries nor needs them.
        from diffcr_surgery.demo.run import run_demo
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        return _fail(f"the demo needs {library}, which is not installed. Run: pip install 'diffcr_surgery[all]'")
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before the minutes of training, not after
    except OSError as error:
        return _fail(f"cannot write to --out {options.out}: {error.strerror}. Name a folder, or a path that is free.")
    run_demo(options.out, quick=options.quick, seed=options.seed)
    return 0


def _fail(message: str) -> int:
    print(f"diffcr-surgery: {message}", file=sys.stderr)
    return 2
