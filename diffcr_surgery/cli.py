"""The command line: `diffcr-surgery demo --out DIR` or `diffcr-surgery bench ...`; `python -m diffcr_surgery` does the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from diffcr_surgery.errors import ConfigError

__all__ = ["main"]

_EXTRAS = ("diffusers", "matplotlib", "rich", "sklearn", "timm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; `None` takes it from the process.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        try:
            run = options.prepare(options)
        except ConfigError as error:  # of an option; one that comes later is not the user's
            return _fail(str(error))
        run()
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        return _fail(f"the {options.command} needs {library}, which is not installed. Run: pip install 'diffcr_surgery[all]'")
    return 0


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
    demo.set_defaults(prepare=_demo)
    bench = commands.add_parser(
        "bench",
        help="measure what routing gains on a model of real size",
        description="Time a published denoiser with random weights, in turns: dense, routed, the limit of routing (blocks on fewer tokens, "
        "without router, gather or scatter) and token merging. Nothing is downloaded.",
    )
    bench.add_argument("--model", required=True, metavar="NAME", help="dit-xl-2, pixart-sigma, sd3-medium or flux-dev")
    bench.add_argument("--tokens", type=int, required=True, metavar="N", help="image tokens, a square number such as 1024")
    bench.add_argument("--ratio", type=float, nargs="+", required=True, metavar="R", help="shares of tokens that bypass, up to 0.9")
    bench.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for table.md, report.json and latency.png")
    bench.add_argument("--layers", type=int, metavar="L", help="shorten the model (flux-dev: L double and L single blocks)")
    bench.add_argument("--batch", type=int, default=1, metavar="B", help="samples of a call (default: 1)")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    bench.add_argument("--compile", action="store_true", help="compile all sides with torch.compile")
    bench.add_argument("--rounds", type=int, default=9, metavar="K", help="how often each side is timed (default: 9)")
    bench.add_argument("--break-even", action="store_true", help="look for the number of tokens from which routing pays")
    bench.add_argument("--baseline", type=Path, metavar="PATH", help="where recipes/baselines/token_merging.py is")
    bench.set_defaults(prepare=_bench)
    return parser


def _demo(options: argparse.Namespace) -> Callable[[], object]:
    # Imported here, so that `--help` neither waits for these libraries nor needs them.
    from diffcr_surgery.demo.run import run_demo

    _make_folder(options.out)  # before the minutes of training, not after
    return partial(run_demo, options.out, quick=options.quick, seed=options.seed)


def _bench(options: argparse.Namespace) -> Callable[[], object]:
    from diffcr_surgery.bench.run import BASELINE, Settings, run_bench

    settings = Settings(
        model=options.model,
        tokens=options.tokens,
        ratios=tuple(options.ratio),
        layers=options.layers,
        batch=options.batch,
        device=options.device,
        dtype=options.dtype,
        compile=options.compile,
        rounds=options.rounds,
        break_even=options.break_even,
        baseline=options.baseline or BASELINE,
    )
    _make_folder(options.out)
    return partial(run_bench, settings, options.out)


def _make_folder(out: Path) -> None:
    """Make the folder and try to write into it.

    Raises:
        ConfigError: If that cannot be done.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        why = f"cannot write to --out {out}: {error.strerror}. Name a folder that takes files, or a path that is free."
        raise ConfigError(why) from error


def _fail(message: str) -> int:
    print(f"diffcr-surgery: {message}", file=sys.stderr)
    return 2
