"""What the tests of scripts/ share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def scripts_importable() -> Iterator[None]:
    """The scripts import each other by the folder that they lie in."""
    folder = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
