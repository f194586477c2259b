"""The CUDA benchmark, mostly without a GPU: its cases, its options, its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def bench(scripts_importable: None) -> Any:
    import bench_cuda

    return bench_cuda


def test_the_list_needs_no_gpu_and_counts_operations(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--list", "--only", "SDXL"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == bench.UNET
    found = next(line for line in lines if line.startswith("SDXL conv 3x3 1280, 32 x 32"))
    assert found.split()[-2:] == [f"{2 * 2 * 32 * 32 * 1280 * 1280 * 9 / 1e9:.1f}", "GFLOP"]


def test_operations_agree_with_torchs_count(bench: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for case in bench.CASES:
        out, channels, *kernel = case.weight
        with torch.device("meta"):
            pads = tuple(k // 2 for k in kernel)
            layer = torch.nn.Conv2d(channels, out, tuple(kernel), case.stride, pads) if kernel else None
            layer = layer or torch.nn.Linear(channels, out)
            x = torch.empty(case.input)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == case.operations, case.name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--contenders", "fp16,w3a8", "--list"], "unknown contender w3a8"),
        (["--rounds", "1", "--list"], "at least 2"),
        (["--only", "nothing like it", "--list"], "no case contains"),
    ],
)
def test_invalid_arguments_are_explained(
    bench: Any, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_reported(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse([])
    assert "no CUDA device" in capsys.readouterr().err


def test_our_own_contenders_name_existing_kernels_and_formats(bench: Any) -> None:
    from bitpolicy.kernels.dispatch import TABLE
    from bitpolicy.kernels.formats.named import format_named

    kernels = {row.kernel.name: row.kernel for row in TABLE}
    for format, compute, kernel in bench.OURS.values():
        assert kernels[kernel].compute == compute
        assert format_named(format).name == format


def test_the_float8_ceiling_measures_a_product(bench: Any) -> None:
    a = torch.randn(64, 64).to(torch.float8_e4m3fn)
    torch.testing.assert_close(bench.float8_product(a).float(), a.float() @ a.float().T, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False)])
def test_float8_is_refused_on_gpus_that_cannot_multiply_it(
    bench: Any, capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    layer = torch.nn.Linear(64, 8)
    if refused:
        with pytest.raises(ValueError, match="does not multiply float8"):
            bench.contender("w8a8-float8", layer)
    else:
        assert bench.contender("w8a8-float8", layer)[1] == "triton-fp8"


def test_a_packed_contender_computes_like_its_layer(bench: Any) -> None:
    layer = torch.nn.Conv2d(32, 8, 3, padding=1)
    x = torch.randn(1, 32, 6, 6)
    with torch.no_grad():
        expected, found = layer(x), bench.packed(layer, "int8", "int8")(x)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_table_gives_ratios_to_fp16_and_lists_unavailable_contenders(bench: Any) -> None:
    times = {"fp16": [2.0, 2.0, 2.0], "w8a8": [1.0, 1.0, 4.0]}
    result = {"case": "a", "times_ms": times, "unavailable": {"sdnq-int8": "no"}, "relative_error": {"w8a8": 0.01}}
    table = bench.described(result, 10**9, {"float": 1e12, "integer": 2e12})
    assert "2.00 x fp16" in table[2]
    assert "50% of ceiling" in table[1]
    assert "50% of ceiling" in table[2]
    assert table[3].split() == ["sdnq-int8", "unavailable:", "no"]


@pytest.mark.gpu
def test_a_case_runs(bench: Any, tmp_path: Path) -> None:
    bench.main(["--only", "154 rows", "--rounds", "2", "--json", str(tmp_path / "found.json")])
    assert (tmp_path / "found.json").exists()
