"""A fixture for the C++ kernels. It is not a mark, because a mark would compile them during collection."""

from __future__ import annotations

import pytest

from bitpolicy.kernels.cpu.extension import why_unavailable


@pytest.fixture(scope="session")
def cpp_kernels() -> None:
    """Compile the C++ kernels, or skip if this machine cannot."""
    if reason := why_unavailable():
        pytest.skip(reason)
