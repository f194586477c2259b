"""scripts/mutate.py, on a small tree: it draws by seed, kills what a test notices, and continues where it stopped."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the trials are forks that Linux ends")

CODE = '''"""× in a docstring, 1 + 2."""

from __future__ import annotations

__all__ = ["area", "unused", "spin"][0:3]
EDGE = 2


def area(width: int | None, height: int = 3) -> int | None:
    if width is None: raise ValueError(f"× {1 + 2}")
    return (width *
            height)


def unused(n: int) -> int:
    return n + 1


def spin(n: int) -> int:
    while n > 0:
        n -= EDGE
    return n
'''
TESTS = """
import pytest
from bitpolicy.shapes import area, spin


@pytest.fixture(scope="module")
def five_by_three():
    return area(5)


def test_area():
    assert area(2, 2) == 4


def test_more_than_zero(five_by_three):
    assert five_by_three > 0


def test_fifteen(five_by_three):
    assert five_by_three == 15


def test_nothing_has_no_area():
    with pytest.raises(ValueError):
        area(None)


def test_spin():
    assert spin(4) == 0
"""
# Runs trial() in a process that has not imported bitpolicy: root, then texts and chosen tests on stdin.
DRIVER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import mutation.trial

mutation.trial._SILENT, mutation.trial._UNKNOWN = 2.0, 0.0
for text, tests, limit in json.load(sys.stdin):
    print(json.dumps(asdict(mutation.trial.trial(Path(sys.argv[1]), "bitpolicy/shapes.py", text, tests, limit))))
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    root = tmp_path / "small"
    for name, text in {
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = ['-n=2']\n",
        "bitpolicy/__init__.py": "",
        "bitpolicy/shapes.py": CODE,
        "tests/test_shapes.py": TESTS,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def mutants(scripts_importable: None) -> Any:
    pytest.importorskip("cosmic_ray", reason="pip install cosmic-ray coverage")
    from mutation import mutants

    return mutants


def trials(root: Path, cases: Sequence[tuple[str, dict[str, float], float]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root)],
        input=json.dumps(cases),
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(*tests: str) -> dict[str, float]:
    return {f"tests/test_shapes.py::test_{test}": 0.0 for test in tests}


def test_a_mutant_is_killed_by_the_first_chosen_test_that_notices_it(small: Path) -> None:
    wrong = CODE.replace("(width *", "(width +")
    plain, by_fifteen, uncovered, slow, broken, endless = trials(
        small,
        [
            (wrong, names("area", "more_than_zero"), 60.0),
            (wrong, names("more_than_zero", "fifteen", "area"), 60.0),
            (wrong, {}, 60.0),
            (wrong, names("area", "fifteen"), 0.0),
            (CODE.replace("EDGE = 2", "EDGE = 2 / 0"), names("area"), 60.0),
            (CODE.replace("n -= EDGE", "n += EDGE"), names("spin"), 60.0),
        ],
    )
    assert (plain["status"], plain["ran"], plain["of"]) == ("survived", 2, 2)  # 2 + 2 is 2 * 2
    assert (by_fifteen["status"], by_fifteen["by"]) == ("killed", "tests/test_shapes.py::test_fifteen")
    assert by_fifteen["ran"] == 1
    assert by_fifteen["why"].endswith("assert 8 == 15")
    assert uncovered["status"] == "not covered"
    assert (slow["status"], slow["ran"], slow["of"]) == ("survived", 1, 2)
    assert (broken["status"], broken["by"]) == ("killed", "import")
    assert (endless["status"], endless["by"]) == ("timeout", "tests/test_shapes.py::test_spin")
    assert (small / "bitpolicy" / "shapes.py").read_text(encoding="utf-8") == CODE


def test_a_draw_depends_on_its_seed_alone_and_leaves_out_what_no_test_should_notice(mutants: Any, small: Path) -> None:
    drawn = mutants.draw(small, ["bitpolicy/shapes.py"], 1000, seed=3)
    assert mutants.draw(small, ["bitpolicy/shapes.py"], 1000, seed=3) == drawn
    assert mutants.draw(small, ["bitpolicy/shapes.py"], 4, seed=3) == drawn[:4]
    assert mutants.draw(small, ["bitpolicy/shapes.py"], 4, seed=4) != drawn[:4]
    changed = [set(_changed_lines(CODE, mutant.source(small))) for mutant in drawn]
    lines = CODE.splitlines()
    assert [{mutant.line} for mutant in drawn] == changed
    text = {lines[line - 1].strip() for found in changed for line in found}
    # The default of height is in the signature; the annotations are as well, and have no mutants of their own.
    assert text == {
        "EDGE = 2",
        "def area(width: int | None, height: int = 3) -> int | None:",
        'if width is None: raise ValueError(f"× {1 + 2}")',
        "return (width *",
        "return n + 1",
        "while n > 0:",
    }
    assert sum("def area" in lines[mutant.line - 1] for mutant in drawn) == 1
    assert all("{1 + 2}" in mutant.source(small) for mutant in drawn)
    (small / "bitpolicy" / "shapes.py").write_text(CODE + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="changed since the mutants were drawn"):
        drawn[0].source(small)


def _changed_lines(before: str, after: str) -> Iterator[int]:
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    for tag, first, last, _, _ in matcher.get_opcodes():
        if tag != "equal":
            yield from range(first + 1, last + 1)


def test_a_line_gets_the_tests_that_run_its_statement_and_a_constant_those_of_its_module(
    scripts_importable: None, small: Path
) -> None:
    from mutation.covering import Covering, Measured

    known = Covering(small)
    seconds = {"a.py::slow": 3.0, "a.py::quick": 0.1, "b.py::other": 2.0, "b.py::too_slow": 99.0}
    lines = {"": [5, 6, 9, 15, 19], "a.py::slow": [11], "a.py::quick": [10, 11], "b.py::other": [20, 21]}
    lines["b.py::too_slow"] = [11]
    known.add(Measured(seconds, {"bitpolicy/shapes.py": lines}, [], False), slowest=10.0)
    find = lambda line: known.tests("bitpolicy/shapes.py", line)  # noqa: E731
    assert find(12) == ["a.py::quick", "a.py::slow"]  # the second line of the statement
    assert find(16) == []
    assert find(20) == ["b.py::other"]
    assert find(9) == ["a.py::quick", "a.py::slow", "b.py::other"]  # a default: its function first, then the module
    assert find(6) == ["a.py::quick", "b.py::other", "a.py::slow"]


def test_the_command_measures_tries_and_continues(mutants: Any, small: Path) -> None:
    pytest.importorskip("coverage", reason="pip install cosmic-ray coverage")
    command = [sys.executable, str(ROOT / "scripts" / "mutate.py"), "tests", "--root", str(small)]
    command += ["--folders", "bitpolicy", "--seed", "1"]

    def run(*more: str) -> str:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    results = small / "build" / "mutation" / "results.jsonl"
    first = run()
    counts = {status: int(n) for n, status in re.findall(r"^ +(\d+) ([a-z ]+)", first, re.MULTILINE)}
    assert counts["killed"] >= 3
    whole = results.read_text(encoding="utf-8")
    assert len(whole.splitlines()) == sum(counts.values()) >= 8
    kept = whole.splitlines(keepends=True)[:5]
    results.write_text("".join(kept) + '{"mutant": ["half a l', encoding="utf-8")  # as a kill may leave it
    again = run()
    assert "/1 tests/" not in again  # nothing is measured twice
    assert again.splitlines()[-5:] == first.splitlines()[-5:]
    assert results.read_text(encoding="utf-8").startswith("".join(kept))
    unnoticed = run("--show", "not covered")
    assert set(re.findall(r"^-.*", unnoticed, re.MULTILINE)) == {"-    return n + 1"}
    assert unnoticed.count("@@") == 2 * counts["not covered"]
