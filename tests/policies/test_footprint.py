"""Bytes of a pipeline's parts against the files that are written, and allocations against calculated ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toy_pipelines import TOYS, every

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.components import to_text
from bitpolicy.policies.footprint import Span, loaded_bytes, measured_peak, metered, stored_others
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import LayerSettings, ModelReference
from bitpolicy.policies.target import Target

CPU = torch.device("cpu")
N = 2**18  # values in the tensors of the tests
MIB = 4 * N  # bytes of so many float32


def fresh() -> torch.Tensor:
    """A new tensor of one MiB."""
    return torch.ones(N)


def most(run: Callable[[], object], device: torch.device = CPU) -> int:
    """Peak bytes while `run` runs."""
    with metered(device) as meter:
        run()
    return max(span.most for span in meter.spans)


def chain() -> None:
    """Three tensors, two of them at a time."""
    first = fresh()
    second = first.exp()
    del first
    second.exp()


def test_allocations_that_live_at_once_are_added_up() -> None:
    assert most(lambda: [fresh() for _ in range(5)]) == 5 * MIB


def test_released_memory_is_not_counted() -> None:
    assert most(lambda: [fresh().sum() for _ in range(5)]) < 1.01 * MIB
    assert most(chain) == 2 * MIB


def test_a_view_is_not_counted_again() -> None:
    def views() -> list[torch.Tensor]:
        whole = fresh()
        return [whole.view(2, -1), whole[1:], whole.expand(9, -1), whole.view(512, 512).T, whole.detach()]

    assert most(views) == MIB


def test_operations_in_place_allocate_nothing() -> None:
    assert most(lambda: fresh().exp_().neg_().sigmoid_()) == MIB


def test_earlier_tensors_count_neither_when_used_nor_when_released() -> None:
    before = [fresh()]
    assert most(lambda: before[0].exp()) == MIB

    def replace() -> None:
        before.clear()
        before.append(fresh())

    assert most(replace) == MIB


def test_an_empty_run_allocates_nothing() -> None:
    assert most(lambda: None) == 0


def test_allocations_inside_an_operator_count() -> None:
    """Sorting gives values, and indices of twice their size: three times the input together, plus scratch memory."""
    values = torch.rand(N)
    assert most(lambda: values.sort()) >= 3 * MIB


def test_marks_divide_a_run_into_spans() -> None:
    with metered(CPU) as meter:
        first = fresh()
        meter.mark("two more")
        pair = [fresh(), fresh()]
        pair.clear()
        meter.mark("nothing")
        meter.mark("")
        del first
        meter.mark("after")
    assert meter.spans == [
        Span("", 0, MIB),
        Span("two more", MIB, 3 * MIB),
        Span("nothing", MIB, MIB),
        Span("", MIB, MIB),
        Span("after", 0, 0),
    ]


def test_a_run_that_fails_fails_and_the_next_is_counted_from_zero() -> None:
    def fail() -> None:
        fresh().view(3, 5)

    with pytest.raises(RuntimeError, match="invalid for input"):
        most(fail)
    assert most(fresh) == MIB


def test_counting_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    most(fresh)
    assert capfd.readouterr() == ("", "")


def test_another_device_is_refused() -> None:
    with (
        pytest.raises(BitPolicyError, match="on the CPU and on CUDA, not on meta"),
        metered(torch.device("meta")),
    ):
        pass


@pytest.mark.gpu
def test_cuda_counts_the_same() -> None:
    cuda = torch.device("cuda")

    def chain_there() -> None:
        first = torch.ones(N, device=cuda)
        second = first.exp()
        del first
        second.neg_().view(2, -1).exp()

    before = torch.ones(N, device=cuda)
    assert most(chain_there, cuda) == 2 * MIB
    assert most(lambda: before.exp(), cuda) == MIB


# Pipelines


def two_models() -> Any:
    """A pipeline of two linear layers without bias, 6 and 20 values, and something that is not a model."""
    parts = {"unet": nn.Linear(2, 3, bias=False), "vae": nn.Linear(4, 5, bias=False), "scheduler": object()}
    return SimpleNamespace(components=parts, device=CPU)


def test_the_bytes_in_memory_follow_the_dtype_in_memory() -> None:
    pipe = two_models()
    pipe.components["vae"].half()
    assert loaded_bytes(pipe) == 6 * 4 + 20 * 2


def test_shared_tensors_count_once_and_buffers_count_too() -> None:
    pipe = two_models()
    pipe.components["unet"].weight = nn.Parameter(pipe.components["vae"].weight.detach())
    pipe.components["vae"].register_buffer("steps", torch.zeros(7, dtype=torch.int64), persistent=False)
    assert loaded_bytes(pipe) == 20 * 4 + 7 * 8


def test_a_measured_peak_is_the_models_plus_the_allocations() -> None:
    assert measured_peak(two_models(), chain) == 26 * 4 + 2 * MIB


@pytest.mark.parametrize("name", every(TOYS))
def test_the_other_models_have_the_bytes_that_their_files_have(name: str, tmp_path: Path) -> None:
    pipe: Any = TOYS[name].new()
    components = Target.chosen(pipe).names
    component = to_text(components)
    model = ModelReference(id="toy", component=component, class_name=component, sha256=component)  # an entry for each
    policy = Policy(
        model=model,
        formats={"int8": format_named("int8").parameters()},
        defaults=LayerSettings(format="int8"),
        storage_dtype="bfloat16",
    )
    export_pipeline(pipe, components, policy, Calibration(), tmp_path / "exported")
    folders = {path.name for path in (tmp_path / "exported").iterdir() if [*path.glob("*.safetensors")]}
    on_disk = {name: checkpoint_bytes(tmp_path / "exported" / name) for name in folders - set(components)}
    assert stored_others(pipe, components, torch.bfloat16) == on_disk
