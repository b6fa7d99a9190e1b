"""What models of the zoo need around them."""

import contextlib
import re
import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.zoo.entry import Entry


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Warnings are errors here too, but for those a class gives by itself, and gradients are off where it has none."""
    entry: Entry | None = request.node.callspec.params.get("entry") if hasattr(request.node, "callspec") else None
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", ".* is deprecated and will be removed in version", FutureWarning)  # diffusers, of its own imports
        for message in entry.warns if entry else ():
            warnings.filterwarnings("ignore", re.escape(message))
        if entry and entry.flex:
            stack.enter_context(torch.no_grad())
        yield
