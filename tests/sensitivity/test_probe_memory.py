"""Sums of gradients: the same scores as products at each call, within the given memory, and to the bit on resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.kernels.formats import row_chunks
from bitpolicy.kernels.formats.named import format_named, parse_formats
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.footprint import most_allocated
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes import probe
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.probes.stepwise import LocalSketches
from bitpolicy.sensitivity.records import Records
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches import probe_memory
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.probe_memory import BY_STEP, ProbeMemory, default_memory
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
SAMPLES = (Sample("a red heart", 11), Sample("pizza", 3))
WANTED = candidates(parse_formats("int4,int8,int4-g32-rot"))


def weight_bytes(trajectories: Trajectories) -> int:
    """Bytes of the sums of all layers."""
    return sum(4 * layer.weight.numel() for layer in trajectories.target.layers.values())


def adjoint(
    trajectories: Trajectories, memory: ProbeMemory, means: Any = None, compute: Compute = Compute.EXACT
) -> list[Sketch]:
    quantization = Quantization(calibration=Calibration(means or {}), compute=compute)
    maker = AdjointSketches(trajectories, WANTED, quantization=quantization, memory=memory)
    return list(maker.sketches(SAMPLES[0], [Random(0), Random(1)]))


def assert_equal_sums(whole: Sketch, steps: Sketch) -> None:
    """The sketch of a trajectory is the sum of those of its steps, up to the rounding of float32."""
    for part in ("weight", "bias", "inputs"):
        found, expected = getattr(whole, part), getattr(steps, part)
        if expected is None:
            assert found is None
            continue
        size = expected.double().square().sum(0).sqrt()  # steps may cancel, as may the terms of a product
        assert found.shape == (1, *expected.shape[1:])
        excess = (found[0] - expected.double().sum(0)).abs() - 5e-6 * size - 1e-6 * size.max()
        assert float(excess.max()) <= 0, part
    assert whole.along == steps.along


@pytest.mark.parametrize("compute", [Compute.EXACT, Compute.INT8])
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["no sums", "some sums", "all sums"])
def test_a_sketch_of_the_trajectory_is_the_sum_of_its_steps(
    new_trajectories: NewTrajectories, random_calibration: Any, compute: Compute, share: float
) -> None:
    trajectories = new_trajectories()
    means, layers = random_calibration(trajectories.target), trajectories.target.layers
    memory = ProbeMemory.summing(layers, int(share * weight_bytes(trajectories)))
    assert memory.summed is not None
    assert {0: 0, 1: len(layers)}.get(share, len(memory.summed)) == len(memory.summed)
    assert share in (0, 1) or 0 < len(memory.summed) < len(layers)
    expected = adjoint(trajectories, BY_STEP, means, compute)
    for whole, steps in zip(adjoint(trajectories, memory, means, compute), expected, strict=True):
        assert_equal_sums(whole, steps)


def test_a_local_sketch_of_the_trajectory_is_the_sum_of_its_steps(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()
    memory = ProbeMemory.summing(trajectories.target.layers, weight_bytes(trajectories))
    whole, steps = (
        next(LocalSketches(trajectories, WANTED, quantization=Quantization(), memory=each).sketches(SAMPLES[0], [4]))
        for each in (memory, BY_STEP)
    )
    assert_equal_sums(whole.sketch, steps.sketch)
    assert torch.equal(whole.power, steps.power)


def test_half_precision_is_summed_in_single_precision(new_trajectories: NewTrajectories) -> None:
    """Of 30 gradients, a bfloat16 sum would be wrong by about one percent."""
    trajectories = new_trajectories(dtype=torch.bfloat16, num_inference_steps=30)
    memory = ProbeMemory.summing(trajectories.target.layers, weight_bytes(trajectories))
    for whole, steps in zip(adjoint(trajectories, memory), adjoint(trajectories, BY_STEP), strict=True):
        assert_equal_sums(whole, steps)


def test_sums_take_no_more_than_the_given_memory(new_trajectories: NewTrajectories) -> None:
    layers = new_trajectories().target.layers
    for nbytes in (0, 1000, 100_000, 2**40):
        memory = ProbeMemory.summing(layers, nbytes)
        assert memory.summed is not None
        used = sum(4 * layers[name].weight.numel() for name in memory.summed)
        assert used + memory.packed == nbytes
        left = [4 * layer.weight.numel() for name, layer in layers.items() if name not in memory.summed]
        assert not left or min(left) > memory.packed


def test_a_sketch_holds_the_sums_and_nothing_else_that_grows(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()
    most = {}
    for name, memory in (
        ("by step", BY_STEP),
        ("sums", ProbeMemory.summing(trajectories.target.layers, weight_bytes(trajectories))),
    ):
        adjoint(trajectories, memory)
        most[name] = most_allocated(torch.device("cpu"), lambda memory=memory: adjoint(trajectories, memory))
    assert weight_bytes(trajectories) < most["sums"] <= most["by step"] + weight_bytes(trajectories)


@pytest.mark.parametrize("compute", [Compute.EXACT, Compute.INT8])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(70, 33, bias=False), nn.Conv2d(12, 18, 3, groups=3), nn.Conv2d(40, 9, 3), nn.Conv1d(64, 5, 1)],
    ids=["linear", "grouped", "conv", "conv1d"],
)
def test_products_do_not_depend_on_the_rows_taken_at_a_time(
    monkeypatch: pytest.MonkeyPatch, layer: Any, compute: Compute
) -> None:
    to_storage(layer, torch.float16)
    gradient, formats = torch.randn_like(layer.weight), parse_formats("int4,int8,int5-channel-sym,nf4,int4-g32-rot")
    wanted = candidates(formats)
    inputs = layer.weight.shape[1] * getattr(layer, "groups", 1)
    mean = {"layer": torch.randn(inputs, *layer.weight.shape[2:])}
    found = []
    for chunk in (2**20, 100):
        monkeypatch.setattr(row_chunks, "_CHUNK", chunk)
        changes = WeightChanges(
            {"layer": layer},
            wanted,
            quantization=Quantization(calibration=Calibration(mean), compute=compute),
            room=2**20,
        )
        along = torch.ones(len(layer.weight))
        found.append((changes.weight_products("layer", gradient), changes.bias_products("layer", along)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if compute is Compute.EXACT:
        for column, candidate in enumerate(wanted):
            format, weight = candidate.format, layer.weight.detach()
            if format.fits(weight.shape):
                delta = format.dequantize(format.quantize(weight.half()), weight.shape, torch.float32) - weight
                expected = float((delta.double() * gradient.double()).sum())
                assert float(found[0][0][column]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
            else:
                assert float(found[0][0][column]) == 0


# A whole probe


def table_of(
    trajectories: Trajectories, folder: Path, memory: int | None = None, kind: str = "adjoint"
) -> SensitivityTable:
    settings = ProbeSettings(kind, SAMPLES, vectors=2, memory=memory)
    layers, formats = inventory(trajectories.target), parse_formats("int4,int8")
    run = ProbeRun(trajectories, layers, formats, torch.float16, "toy", settings, folder, Stages(quiet=True))
    return run.table(run.reference())


@pytest.mark.parametrize("kind", ["adjoint", "stepwise"])
def test_less_memory_gives_the_same_scores(new_trajectories: NewTrajectories, tmp_path: Path, kind: str) -> None:
    trajectories = new_trajectories(num_inference_steps=2)
    half = weight_bytes(trajectories) // 2
    tables = [table_of(trajectories, tmp_path / str(memory), memory, kind) for memory in (0, half, 2**40)]
    for table in tables[1:]:
        torch.testing.assert_close(table.error, tables[0].error, rtol=1e-5, atol=0)
        assert torch.equal(table.corrected, tables[0].corrected)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_probe_is_the_same_to_the_bit_with_other_memory_free(
    new_trajectories: NewTrajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Only a probe that had not yet chosen the layers to sum may choose others."""
    trajectories = new_trajectories(num_inference_steps=2)
    half = weight_bytes(trajectories) // 2
    monkeypatch.setattr(probe, "default_memory", lambda _: half)
    whole = table_of(trajectories, tmp_path / "whole")
    put = Records.put

    def put_until(records: Records, name: str, tensors: Any) -> None:
        put(records, name, tensors)
        if len(list((tmp_path / "stopped").glob("*/*.safetensors"))) == done + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Records, "put", put_until)
        with pytest.raises(KeyboardInterrupt):
            table_of(trajectories, tmp_path / "stopped")
    monkeypatch.setattr(probe, "default_memory", lambda _: 0)
    resumed = table_of(trajectories, tmp_path / "stopped")
    assert whole.sketches is not None
    assert resumed.sketches is not None
    assert torch.equal(resumed.sketches, whole.sketches)
    assert not torch.equal(table_of(trajectories, tmp_path / "other").sketches, whole.sketches)  # type: ignore[arg-type]


def test_the_default_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe_memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    monkeypatch.setattr(probe_memory, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu = torch.device("cpu")
    assert default_memory(cpu) == 500
    for name, text in (("max", "700\n"), ("current", "400\n"), ("stat", "anon 300\ninactive_file 60\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert default_memory(cpu) == (700 - 400 + 60) // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_memory(cpu) == (700 - 400 + 60) // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert default_memory(cpu) == 250


def test_formats_that_do_not_fit_have_no_product() -> None:
    layer = nn.Linear(33, 5)
    changes = WeightChanges(
        {"layer": layer}, candidates([format_named("int4-g32-rot")]), quantization=Quantization(), room=2**20
    )
    assert changes.weight_products("layer", torch.ones(5, 33)).tolist() == [0]
