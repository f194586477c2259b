"""Every test runs offline, on one thread for each worker, and without a display."""

from __future__ import annotations

import os

# Read by these libraries when they are imported, so set before any test module is.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two workers with a thread for each core would wait for each other; and one thread adds in one order."""
    import torch

    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
