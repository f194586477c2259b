"""The benchmark against other projects: its figures for layers small enough to check by hand, and its options."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def bench(scripts_importable: None) -> Any:
    import bench_rivals

    return bench_rivals


def measured(bench: Any, layer: nn.Module, x: torch.Tensor, *contenders: str) -> dict[str, dict[str, Any]]:
    options = bench.parse(["--budget", "0.01", "--contenders", *contenders])
    with torch.no_grad():
        return {row.pop("contender"): row for row in bench.measure(lambda: (layer, (x,)), options)}


def test_rows_give_error_bytes_and_ratio_relative_to_the_layer_itself(bench: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(8, 64)
    rows = measured(bench, layer, x, "int4 weights", "int8 weights")
    assert list(rows) == ["torch", "int4 weights", "int8 weights"]
    assert rows["torch"]["ratio"] == 1
    assert rows["torch"]["error"] == 0
    assert rows["torch"]["bytes"] == 4 * (64 * 32 + 32)
    assert rows["int8 weights"]["bytes"] == 64 * 32 + 4 * 32 + 4 * 32  # codes, scales, the bias
    assert 0 < rows["int8 weights"]["error"] < rows["int4 weights"]["error"] < 0.2


def test_layouts_kept_by_kernels_are_counted(bench: Any) -> None:
    layer, x = nn.Linear(64, 32), torch.randn(8, 64)
    rows = measured(bench, layer, x, "int8 weights", "int8 compute, int8")
    extra = rows["int8 compute, int8"]["bytes"] - rows["int8 weights"]["bytes"]
    assert extra == 0 or extra >= 64 * 32  # without an int8 kernel, no layout is kept


def test_a_failing_contender_is_reported_and_the_others_are_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: nn.Module) -> nn.Module:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(bench.CONTENDERS, "SDNQ int8 compute", fails)
    layer, x = nn.Conv2d(32, 8, 3), torch.randn(1, 32, 5, 5)
    rows = measured(bench, layer, x, "SDNQ int8 compute", "int8 weights")
    assert rows["SDNQ int8 compute"] == {"unavailable": "RuntimeError: no such kernel"}
    assert rows["int8 weights"]["ms"] > 0
    shown = [bench.shown({"contender": name, **row}) for name, row in rows.items()]
    assert shown[1].split() == ["SDNQ", "int8", "compute", "unavailable:", "RuntimeError:", "no", "such", "kernel"]


@pytest.mark.parametrize(("package", "contender"), [("comfy_kitchen", "by_comfy"), ("torchao", "by_torchao")])
def test_tools_for_linear_layers_refuse_a_convolution_and_leave_the_model_unchanged(
    bench: Any, package: str, contender: str
) -> None:
    pytest.importorskip(package)
    make = getattr(bench, contender)
    with pytest.raises(ValueError, match="linear layers only"):
        make(nn.Conv2d(8, 8, 1))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(4, 64)
    expected, found = model(x), make(model)(x)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_sdnq_quantizes_a_lone_layer_and_a_model(bench: Any) -> None:
    pytest.importorskip("sdnq")
    layer, x = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False), torch.randn(1, 32, 6, 6)
    make = partial(bench.by_sdnq, matmul=False)
    alone, inside = make(layer)(x), make(nn.Sequential(layer))(x)
    torch.testing.assert_close(alone, inside)
    assert 0 < (alone - layer(x)).norm() < 0.05 * layer(x).norm()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--contenders", "torch", "int3"], "unknown contender int3"), (["--only", "nowhere"], "no case contains")],
)
def test_invalid_arguments_are_explained(
    bench: Any, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert complaint in capsys.readouterr().err
