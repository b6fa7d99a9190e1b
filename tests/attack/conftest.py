"""What tests of adapters share beside `adapters`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.adapters import saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the sound adapter."""
    saved().write(tmp_path)
    return tmp_path
