"""How dispatch chooses a kernel: by the table, by timing, or by force; and what it keeps."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_products import bias_of, input_of, weight_of

from bitpolicy.kernels import dispatch, micro_probe
from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.compute.reference import Int8Reference, Reference
from bitpolicy.kernels.dispatch import Row, choose, effective, prepared, prepared_bytes, run, use_kernels
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared, parse_compute
from bitpolicy.kernels.triton import kernels as triton_kernels
from bitpolicy.kernels.triton.kernels import TritonFp8

CALL = "linear of odd sizes"


class _OnCuda:
    """What dispatch sees of an input on a GPU."""

    is_cuda, dtype = True, torch.float16

    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index


class Slow(Reference):
    name = "slow"

    def __call__(self, *args: Any) -> torch.Tensor:
        time.sleep(0.005)
        return super().__call__(*args)


class Wrong(Reference):
    """Fast, but wrong in the last bit of one value."""

    name = "wrong"

    def __call__(self, x: torch.Tensor, weight: PackedWeight, bias: Any, prepared: Prepared) -> torch.Tensor:
        y = torch.zeros(*x.shape[:-1], weight.shape[0])
        multiply(x, weight.dequantize(x.dtype), None, bias)
        y.copy_(super().__call__(x, weight, bias, prepared))
        y.view(-1)[0] = torch.nextafter(y.view(-1)[0], torch.tensor(9.0))
        return y


class Picky(Reference):
    name = "picky"

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return "never today"


class Keeping(Reference):
    """Keeps the dequantized weight and counts how often it made it."""

    name = "keeping"
    made = 0

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        Keeping.made += 1
        return {"w": weight.dequantize(dtype), "codes": weight.tensors["weight_packed"]}

    def __call__(self, x: torch.Tensor, weight: PackedWeight, bias: Any, prepared: Prepared) -> torch.Tensor:
        return multiply(x, prepared["w"], weight.geometry, bias)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Put kernels in front of the references, with an empty cache."""
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITPOLICY_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})
    micro_probe.forget()

    def install(*kernels: Kernel, layers: str = "linear conv2d", formats: str = "*") -> None:
        rows = [Row("cpu", layers, formats, kernel) for kernel in kernels]
        every = "linear conv1d conv2d conv3d"
        references = (Row("any", every, "*", Reference()), Row("any", every, "*", Int8Reference()))
        monkeypatch.setattr(dispatch, "TABLE", (*rows, *references))
        monkeypatch.setattr(dispatch, "_chosen", {})

    yield install
    micro_probe.forget()


def chosen(format: str = "int4", shape: str = CALL, compute: Compute = Compute.EXACT) -> str:
    weight = weight_of(shape, format)
    assert weight is not None
    return choose(input_of(shape), weight, bias_of(shape), compute).name


def test_the_fastest_kernel_is_chosen(table: Any) -> None:
    table(Slow())
    assert chosen() == "reference"


def test_a_kernel_that_is_off_by_one_bit_is_never_chosen(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Wrong())
    monkeypatch.setattr(micro_probe, "_seconds", lambda multiply, device: 0.0 if "Wrong" in repr(multiply) else 1.0)
    assert chosen() == "reference"


class Settled(Slow):
    name = "settled"
    settled = True

    def scratch(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        return 12 * dtype.itemsize


def test_a_settled_kernel_is_chosen_without_timing(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_probe, "fastest", lambda *_: pytest.fail("tried"))
    table(Settled(), Keeping())
    assert chosen() == "settled"
    weight: Any = weight_of(CALL, "int4")
    assert dispatch.scratch_kept(weight, torch.float16) == 24
    table(Picky(), Settled())
    assert chosen() == "settled"
    with use_kernels("reference"):
        assert chosen() == "reference"
        assert dispatch.scratch_kept(weight, torch.float16) == 0


def test_the_next_process_reads_stored_results(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Slow())
    assert chosen() == "reference"
    micro_probe.forget()
    table(Slow())
    monkeypatch.setattr(micro_probe, "_times", lambda *_: pytest.fail("tried again"))
    assert chosen() == "reference"


def test_a_new_kernel_is_timed(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Slow())
    chosen()
    table(Keeping(), Slow())
    monkeypatch.setattr(micro_probe, "_seconds", lambda multiply, device: 0.0 if "Keeping" in repr(multiply) else 1.0)
    assert chosen() == "keeping"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fastest": 3}', '{"fastest": {"a": {}}}', "\x00"])
def test_a_damaged_file_counts_as_empty(table: Any, damage: str) -> None:
    table(Slow())
    chosen()
    micro_probe._file().write_text(damage)
    micro_probe.forget()
    table(Slow())
    assert chosen() == "reference"
    assert json.loads(micro_probe._file().read_text())["fastest"]


def test_an_unwritable_folder_is_harmless(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPOLICY_CACHE", "/proc/nowhere")
    micro_probe.forget()
    table(Slow())
    assert chosen() == "reference"


def test_different_calls_are_timed_separately(table: Any) -> None:
    table(Slow())
    weight, x = weight_of(CALL, "int4"), input_of(CALL)
    assert weight is not None
    calls = {
        dispatch._described(x, weight, None, Compute.EXACT),
        dispatch._described(x, weight, bias_of(CALL), Compute.EXACT),
        dispatch._described(x, weight, None, Compute.FLOAT),
        dispatch._described(x.half(), weight, None, Compute.EXACT),
        dispatch._described(x[:1], weight, None, Compute.EXACT),
        dispatch._described(x.transpose(0, 1), weight, None, Compute.EXACT),
    }
    assert len(calls) == 6


def test_table_rows_apply_only_to_their_layers_and_formats(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Keeping(), layers="linear", formats="int4* nf4")
    monkeypatch.setattr(micro_probe, "_seconds", lambda multiply, device: 0.0 if "Keeping" in repr(multiply) else 1.0)
    assert [chosen(f) for f in ("int4", "int4-g32", "nf4", "int8")] == ["keeping"] * 3 + ["reference"]
    assert chosen("int4", "conv2d 3x3") == "reference"
    weight = weight_of(CALL, "int8")
    assert weight is not None
    assert dispatch.TABLE[0].refuses(input_of(CALL), weight) == "for int4*, nf4"


def test_a_refusal_is_respected_and_reported(table: Any) -> None:
    table(Picky())
    assert chosen() == "reference"
    weight = weight_of(CALL, "int4")
    assert weight is not None
    told = {row.kernel.name: why for row, why in dispatch.explained(input_of(CALL), weight, Compute.EXACT)}
    assert told == {"picky": "never today", "reference": None}


@pytest.mark.parametrize("by", ["environment", "block"])
def test_a_kernel_can_be_forced(table: Any, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    table(Slow(), Picky())
    if by == "environment":
        monkeypatch.setenv("BITPOLICY_KERNELS", "slow")
        assert chosen() == "slow"
        monkeypatch.setenv("BITPOLICY_KERNELS", "picky")
        assert chosen() == "reference"
    else:
        with use_kernels("slow"):
            assert chosen() == "slow"
            with use_kernels("picky"):
                assert chosen() == "reference"
            assert chosen() == "slow"
        assert chosen() == "reference"


def test_the_references_can_be_forced(table: Any) -> None:
    table(Keeping())
    with use_kernels("reference"):
        assert chosen() == "reference"
        assert chosen(compute=Compute.INT8) == "int8-reference"


UNKNOWN = r"unknown kernel 'quick'; write any of auto, reference, slow"


def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Slow())
    with pytest.raises(BitPolicyError, match=UNKNOWN), use_kernels("quick"):
        chosen()
    monkeypatch.setenv("BITPOLICY_KERNELS", "quick")
    with pytest.raises(BitPolicyError, match=UNKNOWN):
        chosen()


def test_float_compute_may_use_exact_kernels(table: Any) -> None:
    table()
    assert chosen(compute=Compute.FLOAT) == "reference"


def test_a_compute_mode_without_kernels_is_an_error(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table()
    monkeypatch.setattr(dispatch, "TABLE", dispatch.TABLE[:1])
    with pytest.raises(BitPolicyError, match=r"no kernel .* int8 on cpu; .* another compute"):
        chosen(compute=Compute.INT8)


def test_layouts_are_prepared_once_per_dtype_and_again_when_the_weight_changes(table: Any) -> None:
    kernel, weight = Keeping(), weight_of(CALL, "int4")
    assert weight is not None
    Keeping.made = 0
    for dtype in (torch.float32, torch.float32, torch.float16, torch.float32):
        prepared(kernel, weight, dtype)
    assert Keeping.made == 2
    weight.tensors["weight_scale"].mul_(2)
    doubled = run(kernel, input_of(CALL), weight, None)
    assert Keeping.made == 3
    assert torch.equal(doubled, run(Reference(), input_of(CALL), weight, None))


def test_layouts_are_freed_with_the_weight(table: Any) -> None:
    weight: Any = weight_of(CALL, "int4")
    gc.collect()
    before = len(dispatch._layouts)
    run(Keeping(), input_of(CALL), weight, None)
    stored = weight.tensors["weight_packed"]
    assert prepared_bytes(stored) == 4 * 5 * 67
    assert len(dispatch._layouts) == before + 1
    del weight, stored
    gc.collect()
    assert len(dispatch._layouts) == before


def test_counting_layout_bytes_adds_no_entry() -> None:
    weight: Any = weight_of(CALL, "int4")
    gc.collect()
    before = len(dispatch._layouts)
    assert prepared_bytes(weight.tensors["weight_packed"]) == 0
    assert len(dispatch._layouts) == before


def test_low_memory_keeps_no_layouts(table: Any) -> None:
    weight = weight_of(CALL, "int4", low_memory=True)
    assert weight is not None
    run(Keeping(), input_of(CALL), weight, None)
    assert prepared_bytes(weight.tensors["weight_packed"]) == 0


def test_threads_can_call_concurrently(table: Any) -> None:
    table(Keeping())
    weight, x = weight_of("linear of many rows", "int4"), input_of("linear of many rows")
    assert weight is not None
    right, found = run(Reference(), x, weight, None), []

    def work() -> None:
        for _ in range(20):
            found.append(run(choose(x, weight, None, Compute.EXACT), x, weight, None))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(y, right) for y in found)


@pytest.mark.parametrize(
    ("shape", "compute"),
    [
        ("conv2d in groups", Compute.EXACT),
        ("conv2d of a channel each", Compute.EXACT),
        ("conv2d 3x3", Compute.INT8),
        ("linear of odd sizes", Compute.INT8),
    ],
)
def test_layers_unsuited_to_8_bit_inputs_stay_exact(shape: str, compute: Compute) -> None:
    weight = weight_of(shape, "int4")
    assert weight is not None
    assert effective(Compute.INT8, weight) is compute


@pytest.mark.parametrize(
    ("shape", "format", "compute"),
    [
        ("conv2d 3x3", "fp8", Compute.FP8),
        ("conv2d 3x3", "int8", Compute.FLOAT),
        ("conv2d in groups", "fp8", Compute.FLOAT),
    ],
)
def test_layers_unsuited_to_float8_compute_as_float(shape: str, format: str, compute: Compute) -> None:
    weight = weight_of(shape, format)
    assert weight is not None
    assert effective(Compute.FP8, weight) is compute


@pytest.mark.parametrize(
    ("capability", "refusal"),
    [((8, 0), "this machine's GPU does not multiply float8"), ((8, 6), "this machine's GPU"), ((8, 9), None)],
)
def test_float8_is_refused_on_gpus_before_ada(
    capability: tuple[int, int], refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(triton_kernels, "_missing", lambda _device: None)
    weight = weight_of("linear of whole groups", "fp8")
    assert weight is not None
    on_a_gpu: Any = SimpleNamespace(
        is_cuda=True, is_meta=False, device=torch.device("cuda"), dtype=torch.float16, numel=lambda: 1
    )
    found = TritonFp8().refuses(on_a_gpu, weight)
    assert found is None if refusal is None else str(found).startswith(refusal)


def test_compute_modes_have_names() -> None:
    assert parse_compute(" INT8 ") is Compute.INT8
    with pytest.raises(BitPolicyError, match="unknown compute 'int4'; write any of exact, float, int8, fp8"):
        parse_compute("int4")


def test_a_product_runs_on_the_gpu_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whichever GPU a tensor is on."""
    current = [0]

    @contextmanager
    def on(x: _OnCuda) -> Iterator[None]:
        current.append(x.index)
        yield
        current.pop()

    class Noting(Reference):
        def __call__(self, *_: Any) -> torch.Tensor:
            return torch.tensor(current[-1])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device_of", on)
    weight: Any = None
    for index in (1, 0, 3):
        x: Any = _OnCuda(index)
        assert run(Noting(), x, weight, None) == index
    assert current == [0]
