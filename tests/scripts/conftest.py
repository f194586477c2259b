"""Fixtures for the tests of scripts/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def scripts_importable() -> Iterator[None]:
    """Put scripts/ on the path, because the scripts import each other by plain names."""
    folder = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
