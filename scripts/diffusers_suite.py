"""Run diffusers' own tests of quantized models on packed models and print which pass.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    pip install requests
    python scripts/diffusers_suite.py --diffusers diffusers [--device cpu|cuda] [-k EXPRESSION]

The cases are those of `tests/models/testing_utils/` in the checkout, which diffusers runs on bitsandbytes, quanto,
torchao and others. scripts/diffusers_cases.py passes them our models. The checkout must have the installed version of
diffusers. Prints a Markdown table with a row for each case, and a line for each reason. Exits with 1 if a case fails
unexpectedly, or passes although it is known to fail.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest

CASES = Path(__file__).with_name("diffusers_cases.py")
_FLOAT8 = "expects every layer's weight in the float8 of layerwise casting; packed weights keep their storage layout"
KNOWN: dict[str, tuple[str, type[BaseException]]] = {  # a case that is known to fail -> the reason and the exception
    "quantization_dtype_assignment": (
        "expects a ValueError; a packed model accepts .to(dtype) and .half()",
        pytest.fail.Exception,
    ),
    "lora_layerwise_casting_inference": (_FLOAT8, AssertionError),
    "lora_layerwise_casting_peft_input_autocast": (_FLOAT8, AssertionError),
}


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Outcomes:
    """A pytest plugin that records the outcome of each case.

    Attributes:
        cells: (case, model) -> number of parameter sets per outcome: passed, failed and so on.
        reasons: (outcome, reason) -> the cases with that outcome and reason.
    """

    cells: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: defaultdict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            case = _named(item.nodeid)[2]
            if case in KNOWN:
                reason, error = KNOWN[case]
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason, raises=error))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        model, kind, case, parameters = _named(report.nodeid)
        name = f"{kind}: {case}"
        outcome = "known" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        self.cells[name, model][outcome] += 1
        if outcome != "passed":
            where = f"{name} ({', '.join(filter(None, (model, parameters)))})"
            self.reasons[outcome, _reason(report)].add(where)

    def table(self) -> Iterator[str]:
        models = list(dict.fromkeys(model for _, model in self.cells))
        yield f"| case | {' | '.join(models)} |"
        yield "| --- |" + " --- |" * len(models)
        for name in dict.fromkeys(case for case, _ in self.cells):
            cells = (self.cells.get((name, model), Counter()) for model in models)
            shown = (", ".join(f"{count} {outcome}" for outcome, count in cell.items()) for cell in cells)
            yield f"| {name} | {' | '.join(shown)} |"
        yield ""
        for (outcome, reason), cases in sorted(self.reasons.items()):
            yield f"* {outcome}: {reason}: {', '.join(sorted(cases))}"


def _named(nodeid: str) -> tuple[str, str, str, str]:
    """Model, mixin, case and parameters of `...::Test<model>_<mixin>::test_<case>[<parameters>]`."""
    group, test = nodeid.split("::")[1:3]
    model, kind = group.removeprefix("Test").split("_")
    case, _, parameters = test.removeprefix("test_").removesuffix("]").partition("[")
    if case == "case":  # one test for all cases of a mixin
        case, _, parameters = parameters.rpartition("-")
    return model, kind, case, parameters


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).splitlines()[0]


def require_same_version(checkout: Path) -> None:
    """Exit if the checkout is not diffusers, or not the installed version of it."""
    source = checkout / "src" / "diffusers" / "__init__.py"
    if not source.exists():
        sys.exit(f"{checkout} has no src/diffusers/__init__.py; give the folder of a diffusers checkout")
    found = re.search(r'__version__ = "(.*)"', source.read_text(encoding="utf-8"))
    version = found[1] if found else "unknown"
    if version != diffusers.__version__:
        sys.exit(
            f"the checkout is diffusers {version}, the installed version is {diffusers.__version__}; "
            f"check out v{diffusers.__version__}, or pip install diffusers=={version}"
        )


@contextmanager
def own_configuration() -> Iterator[list[str]]:
    """Options of pytest that keep the configuration of this project, and of the checkout, out of the run."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "pytest.ini"
        empty.write_text("[pytest]\n")
        yield ["-c", str(empty), "-p", "no:cacheprovider", "--import-mode=importlib"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--diffusers", type=Path, required=True, metavar="PATH", help="a checkout of diffusers of the installed version"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="selects cases, like pytest's -k")
    given = parser.parse_args()
    require_same_version(given.diffusers)
    os.environ.update(DIFFUSERS_TEST_DEVICE=given.device, HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(given.diffusers.resolve()))
    outcomes = Outcomes()
    with own_configuration() as options:
        options += ["--rootdir", str(CASES.parent), "-W", "ignore", "-q", "--tb=short", "-k", given.k]
        code = pytest.main([*options, str(CASES)], plugins=[outcomes])
    print(f"\ndiffusers {diffusers.__version__}, {given.device}\n", *outcomes.table(), sep="\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
