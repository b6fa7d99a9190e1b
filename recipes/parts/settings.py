"""What the training recipes take from the command line: flags, a YAML file of the same names, and the settings of DiffCR."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import diffcr_surgery as dcs

__all__ = ["add_diffcr_flags", "diffcr_config", "new_parser", "read_arguments"]


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows the description as written, and every default."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    parser.add_argument("--config", type=Path, metavar="YAML", help="file of flags, such as `target-ratio: 0.2`; the command line wins")
    return parser


def add_diffcr_flags(parser: argparse.ArgumentParser, *, target_ratio: float, regions: int) -> None:
    """Add the settings of the conversion."""
    flags = parser.add_argument_group("DiffCR")
    flags.add_argument("--target-ratio", type=float, default=target_ratio, help="mean share of tokens that bypass a block")
    flags.add_argument("--regions", type=int, default=regions, help="parts of the timestep range with ratios of their own")
    flags.add_argument(
        "--branches", choices=("boundary", "two"), default="boundary", help="one run of a block in training, or two (the paper's way)"
    )
    flags.add_argument(
        "--gate", choices=("doubled_sigmoid", "straight_through", "sigmoid"), default="doubled_sigmoid", help="how scores scale updates"
    )
    flags.add_argument("--cost", choices=("tokens", "flops", "latency"), default="tokens", help="what the target counts")
    flags.add_argument("--uniform", action="store_true", help="fix every ratio at the target and train routers only (Mixture-of-Depths)")
    flags.add_argument("--router-lr", type=float, default=1e-3, help="learning rate of the routers")


def read_arguments(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, behind the flags of the YAML file if one is named.

    The file's entries are parsed as flags, so a wrong name or value in it is the same error as on the command line.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    file, rest = before.parse_known_args(given)
    if file.config is None:
        return parser.parse_args(rest)
    entries = yaml.safe_load(file.config.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        parser.error(f"{file.config} holds {type(entries).__name__}; expected flags and their values, such as `target-ratio: 0.2`")
    return parser.parse_args([word for name, value in entries.items() for word in _words(name, value)] + rest)


def _words(name: str, value: Any) -> list[str]:
    """Return an entry of the file as words of the command line."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return [flag] if value else []
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def diffcr_config(given: argparse.Namespace, **settings: Any) -> dcs.DiffCRConfig:
    """Return the configuration the flags ask for; `settings` are those the recipe knows best."""
    if given.uniform:
        ratio = given.target_ratio
        return dcs.DiffCRConfig(target_ratio=ratio, initial_ratio=ratio, learn_ratios=False, gate=given.gate)
    return dcs.DiffCRConfig(
        target_ratio=given.target_ratio,
        timestep_regions=given.regions,
        branches=given.branches,
        gate=given.gate,
        cost=given.cost,
        **settings,
    )
