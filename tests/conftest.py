"""What every test gets: hypothesis profiles, a seed, one thread per worker, no downloads, GPU tests only with a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face import: a test that would download fails at once

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples build and run models, so neither their time nor the machine's load says anything about correctness.
COMMON = settings(
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", COMMON, max_examples=20)
settings.register_profile("thorough", COMMON, max_examples=10_000)
settings.load_profile("quick")  # `--hypothesis-profile=thorough` overrides it

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # the workers share the cores already


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collectstart() -> None:
    """Seeds torch before each file is imported, so that what it draws for its tests is the same whichever files are."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds torch, so that a test passes or fails alike whatever ran before it."""
    torch.manual_seed(0)
