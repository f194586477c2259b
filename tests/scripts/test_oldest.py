"""The oldest versions that .ci/run installs are the lower bounds in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def oldest(scripts_importable: None) -> Any:
    import oldest

    return oldest


def small(dependencies: list[str], **extras: list[str]) -> dict[str, Any]:
    return {"name": "small", "dependencies": dependencies, "optional-dependencies": {"test": [], **extras}}


def test_every_dependency_is_pinned_to_its_bound_as_packaging_reads_it(oldest: Any) -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [
        Requirement(text) for text in (*PROJECT["dependencies"], *extras["test"], *extras["exporters"], *extras["gguf"])
    ]
    expected = {r.name: s.version for r in wanted for s in r.specifier}
    assert oldest.constraints(PROJECT) == [f"{name}=={bound}" for name, bound in sorted(expected.items())]
    assert {Requirement(text).name for text in PROJECT["dependencies"]} <= expected.keys()


def test_extras_are_followed_and_packages_without_a_bound_are_left_to_pip(oldest: Any) -> None:
    project = small(["torch>=2.11", "tqdm"], test=["small[one,two]", "pytest>=8"], one=["a[x]>=1.2.3"], two=["b>=2"])
    assert oldest.constraints(project) == ["a==1.2.3", "b==2", "pytest==8", "torch==2.11"]


@pytest.mark.parametrize("requirement", ["torch<3", "torch>=2,<3", "torch~=2.1", "torch>=2; os_name == 'nt'"])
def test_an_unreadable_bound_is_refused(oldest: Any, requirement: str) -> None:
    with pytest.raises(ValueError, match="no single lower bound"):
        oldest.constraints(small([requirement]))


def test_two_bounds_for_one_package_are_refused(oldest: Any) -> None:
    with pytest.raises(ValueError, match=r"torch has the lower bounds 2\.1 and 2\.2"):
        oldest.constraints(small(["torch>=2.1"], test=["torch>=2.2"]))
