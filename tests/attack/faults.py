"""An error planted inside: at a call, or between two lines of the package's code, wherever it is passed.

What is not survived is an error inside code that cleans up after an error. It is passed over by name, see `CLEANING`, `AT_THE_END`
and `WAY_OUT`.
"""

from __future__ import annotations

import ast
import linecache
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import diffcr_surgery as dcs
from diffcr_surgery.errors import SurgeryError

PACKAGE = str(Path(dcs.__file__).parent)

# What puts things back; nothing can follow an error in here. `restore_` stopped inside `_take_back` has a test of its own.
CLEANING = frozenset({"_take_back"})
# Whose `finally` and `except` put things back. What they call there is called midway too, and has to stand an error then.
AT_THE_END = frozenset({"undisturbed"})
# Torch's own way out of `no_grad`: stopped before this call, it leaves gradients off, here as in any program.
WAY_OUT = ("__exit__", "_set_grad_enabled")

Place = tuple[Any, ...]


class Faults(TorchFunctionMode):
    """Notes the calls made while it is active, and raises at one of them.

    Attributes:
        passed: Place -> how often it was passed.
        fired: Whether the error was raised.
    """

    def __init__(self, error: BaseException | None = None, place: Place | None = None, passage: int = 0, *, lines: bool = False) -> None:
        super().__init__()
        self.error, self.place, self.passage, self.lines = error, place, passage, lines
        self.passed: dict[Place, int] = {}
        self.fired = False
        self.latest: dict[int, int] = {}  # line, by frame

    def __enter__(self) -> Faults:
        super().__enter__()
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self.before)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        caller: types.FrameType | None = sys._getframe(1)
        name, through = getattr(func, "__name__", str(func)), set[tuple[str, str]]()
        while caller is not None and not _own(caller):
            through.add((caller.f_code.co_name, name))
            caller = caller.f_back
        if caller is not None and WAY_OUT not in through:
            self._note(("torch", name, *_where(caller)), caller)
        return func(*args, **(kwargs or {}))

    def _trace(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if not _own(frame):
            return None
        if self.lines:
            before, self.latest[id(frame)] = self.latest.get(id(frame), 0), frame.f_lineno
            if event == "line" and not frame.f_lineno < before <= _contexts(frame.f_code.co_filename).get(frame.f_lineno, 0):
                self._note(("line", *_where(frame)), frame)
            return self._trace
        # A generator is called once; what wakes it up later may be the end of its life, and no one hears of an error then.
        if frame.f_code.co_name != "<genexpr>" and frame.f_lineno == frame.f_code.co_firstlineno and frame.f_back is not None:
            self._note((frame.f_code.co_name, *_where(frame.f_back)), frame)
        return None

    def _note(self, place: Place, frame: types.FrameType) -> None:
        if self.fired or _cleans_up(frame):
            return
        self.passed[place] = self.passed.get(place, 0) + 1
        if place == self.place and self.passed[place] > self.passage:
            self.fired = True
            raise self.error


def _own(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename == "<diffcr_surgery graph>"


@cache
def _contexts(filename: str) -> dict[int, int]:
    """Return first line -> last line of each `with`. Python goes back there to call `__exit__`, and hears of Ctrl-C only after that."""
    nodes = ast.walk(ast.parse("".join(linecache.getlines(filename))))
    return {node.lineno: node.end_lineno or 0 for node in nodes if isinstance(node, ast.With)}


def _where(frame: types.FrameType) -> Place:
    """Return file, function and line."""
    return Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno


@cache
def _ends(filename: str) -> frozenset[int]:
    """Return the lines of `finally` and `except` in the functions of `AT_THE_END`."""
    nodes = ast.walk(ast.parse("".join(linecache.getlines(filename))))
    inside = [node for function in nodes if getattr(function, "name", "") in AT_THE_END for node in ast.walk(function)]
    ends = [part for node in inside if isinstance(node, ast.Try) for part in (*node.handlers, *node.finalbody)]
    return frozenset(line for part in ends for line in range(part.lineno, (part.end_lineno or 0) + 1))


def _cleans_up(frame: types.FrameType | None) -> bool:
    while frame is not None:
        name, code = frame.f_code.co_name, frame.f_code
        if _own(frame) and (name in CLEANING or (name in AT_THE_END and frame.f_lineno in _ends(code.co_filename))):
            return True
        frame = frame.f_back
    return False


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def surroundings() -> Any:
    """What a context that was never left would have changed."""
    return (
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), len(nn.modules.module._global_forward_pre_hooks),
        len(nn.modules.module._global_forward_hooks), raw(torch.get_rng_state()),
    )  # fmt: skip


def comes_from(raised: BaseException | None, error: BaseException) -> bool:
    """Tell whether an error is the injected one, or one of the package's with it as the cause."""
    if raised is error:
        return True
    return isinstance(raised, SurgeryError) and raised.__cause__ is error
