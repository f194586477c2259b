"""What the C++ kernels need. A fixture, as a mark would have them compiled while tests are collected."""

from __future__ import annotations

import pytest

from bitpolicy.kernels.cpu.extension import why_unavailable


@pytest.fixture(scope="session")
def cpp_kernels() -> None:
    """Compiles them, or skips where the machine cannot."""
    if reason := why_unavailable():
        pytest.skip(reason)
