"""A step of the ratio optimizer that is stopped midway."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_surgery as dcs
from tests.small import LAYERS, REGIONS, converted, give


@pytest.mark.parametrize(("earlier", "settle"), [(0, 0.0), (1, 0.0), (1, 8 / 9)], ids=["first step", "second step", "table settles"])
def test_a_step_that_is_stopped_has_not_been_taken(earlier: int, settle: float) -> None:
    """Ctrl-C before any line leaves the table, the count of samples and the averages as they were; the next attempt takes the step."""
    model, gradient = converted(), torch.randn(LAYERS, REGIONS)
    optimizer = dcs.RatioOptimizer(model, total_steps=9, settle=settle)
    for _ in range(earlier):
        give(model, -gradient)
        optimizer.step()
    model.diffcr.visits = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def ready() -> tuple[dcs.RatioOptimizer, nn.Module]:
        twin = copy.deepcopy((optimizer, model))
        give(twin[1], gradient)
        return twin

    def known(optimizer: dcs.RatioOptimizer, model: nn.Module) -> list[Any]:
        own = optimizer.state_dict()["state"].items()
        inside = {(key, name): torch.as_tensor(value).tolist() for key, values in own for name, value in values.items()}
        return [dcs.ratio_table(model).tolist(), model.diffcr.visits.tolist(), model.diffcr.settled, inside]

    def step(optimizer: dcs.RatioOptimizer, line: int | None = None) -> set[int]:
        """Take a step, or stop it at a line; returns the lines of the module that were passed."""
        passed = set()

        def trace(frame: types.FrameType, event: str, _: Any) -> Any:
            if frame.f_code.co_filename != inspect.getfile(dcs.RatioOptimizer):
                return None
            if event == "line":
                passed.add(frame.f_lineno)
                if frame.f_lineno == line:
                    raise KeyboardInterrupt
            return trace

        tracer = sys.gettrace()
        sys.settrace(trace)
        try:
            optimizer.step()
        finally:
            sys.settrace(tracer)
        return passed

    taken = ready()
    for line in step(taken[0]):
        twin = ready()
        with pytest.raises(KeyboardInterrupt):
            step(twin[0], line)
        assert known(*twin) == known(optimizer, model)
        step(twin[0])
        assert known(*twin) == known(*taken) != known(optimizer, model)
