"""Print the oldest versions that pyproject.toml allows, as constraints for pip. `.ci/run` tests with them too.

    python scripts/oldest.py > oldest.txt && pip install -c oldest.txt '.[test]'

For each dependency and everything in the `test` extra, the constraint is its lower bound, `name==bound`. pip chooses
the versions of packages without a bound, and of indirect dependencies.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?(>=(?P<bound>\d[\d.]*))?")


def constraints(project: Mapping[str, Any], extra: str = "test") -> list[str]:
    """`name==bound` of everything that installing a project with an extra requires, sorted.

    Args:
        project: the `project` table of a pyproject.toml.

    Raises:
        ValueError: a requirement is more than a name and a lower bound, or one package has two bounds.
    """
    found: dict[str, str] = {}
    for name, bound in _bounds(project, [*project["dependencies"], f"{project['name']}[{extra}]"]):
        if found.setdefault(name, bound) != bound:
            raise ValueError(f"{name} has the lower bounds {found[name]} and {bound}; keep one of them")
    return [f"{name}=={bound}" for name, bound in sorted(found.items())]


def _bounds(project: Mapping[str, Any], requirements: Sequence[str]) -> Iterator[tuple[str, str]]:
    for requirement in requirements:
        parts = _REQUIREMENT.fullmatch(requirement)
        if parts is None:
            raise ValueError(f"{requirement!r} has no single lower bound; write it as name>=version")
        if parts["name"] == project["name"]:
            for extra in parts["extras"].split(","):
                yield from _bounds(project, project["optional-dependencies"][extra])
        elif parts["bound"]:
            yield parts["name"], parts["bound"]


if __name__ == "__main__":
    print("\n".join(constraints(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])))
