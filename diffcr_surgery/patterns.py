"""Declared block patterns: what a library maintainer states about a block, put to the same proof as what the search finds."""

from __future__ import annotations

import operator
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType

import torch

from diffcr_surgery.axes import parse_axes
from diffcr_surgery.config import shown
from diffcr_surgery.errors import PatternError

__all__ = ["BlockPattern", "names_class", "pattern_of", "register_pattern"]

ENTRY_POINTS = "diffcr_surgery.patterns"
OFF_SWITCH = "DIFFCR_SURGERY_NO_PLUGINS"


@dataclass(frozen=True)
class BlockPattern:
    """Which arguments of a block class move with the tokens.

    Args:
        name: Name for messages.
        target: The class as ``"package.module:Class"``; a string, so that a pattern never imports the library it describes.
        inputs: Argument path -> axis pattern (see :mod:`diffcr_surgery.axes`), the routed stream first. What is not named stays as it is.
        outputs: Axis pattern of each output, for the reader; the proof finds the one that continues the stream.

    Raises:
        PatternError: If the target or an axis pattern is malformed, or no input is a token stream.

    Example:
        >>> pattern = BlockPattern("my block", "mylib.blocks:Block", {"x": "b n c", "rope": "n d"})
        >>> sorted(pattern.inputs)
        ['rope', 'x']
    """

    name: str
    target: str
    inputs: Mapping[str, str]
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PatternError(f"The name of a pattern is a text for messages, not {shown(self.name)}.")
        name = shown(self.name)
        module, colon, cls = self.target.partition(":") if isinstance(self.target, str) else ("", "", "")
        if not (module and colon and cls):
            raise PatternError(f"Pattern {name}: target {shown(self.target)} is not of the form 'package.module:Class'.")
        if not isinstance(self.inputs, Mapping) or not self.inputs or not all(isinstance(path, str) for path in self.inputs):
            raise PatternError(f"Pattern {name}: inputs must map argument paths to axis patterns, the routed stream first.")
        if not isinstance(self.outputs, tuple | list):
            raise PatternError(f"Pattern {name}: outputs must be a tuple of axis patterns, not {shown(self.outputs)}.")
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        for axes in (*self.inputs.values(), *self.outputs):
            parse_axes(axes)
        stream = next(iter(self.inputs.values()))
        axes_of_stream = parse_axes(stream)
        if stream.split().count("n") != 1:
            raise PatternError(f"Pattern {name}: the first input is the routed stream and names 'n' once; got {stream!r}.")
        if len(axes_of_stream.words) > 2 and axes_of_stream.batch is None:
            raise PatternError(
                f"Pattern {name}: the first input is the routed stream, and one of more than two axes names its batch 'b', as in 'b n c'; "
                f"got {stream!r}."
            )

    def __reduce__(self) -> tuple[type[BlockPattern], tuple[object, ...]]:
        return BlockPattern, (self.name, self.target, dict(self.inputs), self.outputs)


_REGISTRY: dict[str, BlockPattern] = {}
_LOCK = threading.RLock()
_LOADING = threading.RLock()  # another one: a plug-in that a second thread happens to import must be able to register
_plugins_loading = False
_plugins_loaded = False


def register_pattern(pattern: BlockPattern) -> BlockPattern:
    """Declare a pattern for a block class.

    When a model with that class, or a subclass that has no pattern of its own, is planned, the pattern takes the place of the
    search and is put through the permutation proof.

    Returns:
        The pattern.

    Raises:
        PatternError: If it is no :class:`BlockPattern`, or its target has another pattern already.

    Example:
        >>> pattern = register_pattern(BlockPattern("example", "mylib.blocks:Example", {"x": "b n c"}))
        >>> pattern.target
        'mylib.blocks:Example'
    """
    if not isinstance(pattern, BlockPattern):
        raise PatternError(f"register_pattern takes a BlockPattern, not {type(pattern).__name__}.")
    with _LOCK:
        known = _REGISTRY.get(pattern.target)
        if known is not None and known != pattern:
            raise PatternError(
                f"{pattern.target} has the pattern {known.name!r} already; {pattern.name!r} was not registered. A class has one pattern: "
                "change the first one, or target a subclass."
            )
        _REGISTRY[pattern.target] = pattern
    return pattern


def _load_plugins() -> None:
    global _plugins_loading, _plugins_loaded
    if _plugins_loaded or os.environ.get(OFF_SWITCH):
        return
    with _LOADING:
        if _plugins_loaded or _plugins_loading:  # by a plug-in that asks for patterns while it is loaded
            return
        _plugins_loading = True
        try:
            _load_entry_points()
            _plugins_loaded = True
        finally:
            _plugins_loading = False


def _load_entry_points() -> None:
    entry = None
    try:
        for entry in entry_points(group=ENTRY_POINTS):
            register_pattern(entry.load())
    except (Exception, SystemExit) as error:
        where = f"The entry point {entry.name!r} = {entry.value!r}" if entry else "An entry point"
        raise PatternError(
            f"{where} of group {ENTRY_POINTS} could not be loaded: {type(error).__name__}: {error}. It must name a BlockPattern. Set "
            f"{OFF_SWITCH}=1 to go on without plug-ins."
        ) from error


def pattern_of(block: torch.nn.Module) -> BlockPattern | None:
    """Return the pattern of the most specific class of ``block`` that has one.

    Raises:
        PatternError: If two patterns are equally specific, or one class has two under different names.
    """
    _load_plugins()
    known = list(_REGISTRY.values())
    matches = [(cls, pattern) for cls in type(block).__mro__ for pattern in known if names_class(pattern.target, cls)]
    if not matches:
        return None
    best, pattern = matches[0]
    rivals = [other for cls, other in matches[1:] if cls is best or not issubclass(best, cls)]
    if rivals:
        raise PatternError(
            f"{type(block).__qualname__} is matched by the patterns {pattern.name!r} ({pattern.target}) and {rivals[0].name!r} "
            f"({rivals[0].target}), neither of which is more specific. Register one for {type(block).__qualname__} itself."
        )
    return pattern


def names_class(target: str, cls: type) -> bool:
    """Tell whether a target is ``cls``, by its own name or by one it is exported under; a module not yet imported stays so."""
    if target == f"{cls.__module__}:{cls.__qualname__}":
        return True
    module, _, name = target.partition(":")
    if name.rpartition(".")[2] != cls.__name__ or module not in sys.modules:
        return False
    try:
        return operator.attrgetter(name)(sys.modules[module]) is cls
    except (AttributeError, ImportError):
        return False
