"""The Triton kernels in Triton's interpreter. It must be selected before the import, so tests run in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy
import pytest

from bitpolicy.kernels.dispatch import TABLE

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TYPICAL = "right_product or accepts_exactly"
AWKWARD = "huge or nan or zeros or any_strides"


def _version(package: ModuleType) -> tuple[int, ...]:
    return tuple(int(number) for number in package.__version__.split(".")[:2])


def passed(tmp_path: Path, *arguments: str) -> int:
    """The number of tests passed in an interpreting process. Fails unless all others were skipped."""
    report = tmp_path / "report.xml"
    paths = [str(HERE.parents[1]), str(HERE.parent / "toys"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run([*command, *arguments], env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    counts = {
        k: int(v) for suite in ElementTree.parse(report).iter("testsuite") for k, v in suite.items() if v.isdigit()
    }
    return counts["tests"] - counts["skipped"]


in_interpreter = pytest.mark.skipif(
    _version(triton) < (3, 8) and _version(numpy) >= (2, 4),
    reason="that interpreter turns arrays of one value into numbers, which this NumPy forbids",
)


@in_interpreter
def test_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    assert passed(tmp_path, "triton_interpreted.py", "triton_inputs.py") >= 350


@in_interpreter
@pytest.mark.parametrize("selection", [TYPICAL, AWKWARD], ids=["typical calls", "awkward calls"])
def test_triton_kernels_pass_the_kernel_tests(tmp_path: Path, selection: str) -> None:
    """Only a selection, since all tests take minutes. To run all, leave out -k, with PYTHONPATH=tests/toys."""
    found = passed(
        tmp_path, "-p", "interpreted_triton", "test_every_kernel.py", "-k", f"({selection}) and not references"
    )
    assert found >= 4


def test_a_quotient_by_reciprocal_and_two_corrections_is_correctly_rounded() -> None:
    """`triton_tiles.quotient` uses fused multiply-adds, which the interpreter lacks; for all steps of 4-bit codes."""
    import torch

    def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (a.double() * b.double() + c.double()).float()

    scales = torch.rand(400, generator=torch.Generator().manual_seed(0)).add(0.01).half().float()
    p = torch.arange(-15, 16).view(-1, 1, 1) * scales
    for top in range(1, 16):
        s = top * scales[:60].view(-1, 1) / 127  # ties are common: half of the largest code is 63.5
        reciprocal = 1 / s
        q = p * reciprocal
        uncorrected = q
        for _ in range(2):
            q = fused(fused(-q, s, p), reciprocal, q)
        assert torch.equal(q, p / s)
        assert not torch.equal(uncorrected, q)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    import torch

    from bitpolicy.kernels.formats.named import FP8, INT8
    from bitpolicy.kernels.kernel import PackedWeight

    kernels = [row.kernel for row in TABLE if row.kernel.name.startswith("triton-")]
    assert len(kernels) == 4
    for kernel in kernels:
        format = FP8 if kernel.name == "triton-fp8" else INT8
        weight = PackedWeight(format, (4, 32), format.quantize(torch.ones(4, 32)))
        assert kernel.refuses(torch.ones(2, 32, dtype=torch.float16), weight) == "for cuda"


def test_without_triton_the_kernels_can_be_named_and_explain_their_refusal() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from bitpolicy.kernels.dispatch import TABLE
from bitpolicy.kernels.formats.named import FP8, INT8
from bitpolicy.kernels.kernel import PackedWeight
weights = [PackedWeight(f, (4, 32), f.quantize(torch.ones(4, 32))) for f in (INT8, FP8)]
x = torch.ones(2, 32, dtype=torch.float16, device="meta")
rows = [row for row in TABLE if row.kernel.name.startswith("triton-")]
print(*{row.kernel.refuses(x, weights[row.kernel.name == "triton-fp8"]) for row in rows}, sep=";")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "triton is not installed on this machine", done.stderr[-2000:]


def test_kernels_are_refused_if_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler; here, without a GPU to compile for."""
    import torch

    from bitpolicy.kernels.triton import kernels as triton_kernels

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_kernels._missing.cache_clear()
    found = triton_kernels._missing(torch.device("cuda:0"))
    triton_kernels._missing.cache_clear()
    assert str(found).startswith("triton does not work on this machine: ")
