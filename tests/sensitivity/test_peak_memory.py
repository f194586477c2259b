"""The predicted peak: against a calculation by hand, brute force and the memory that reloaded checkpoints take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toy_pipelines import TOYS

from bitpolicy import load_pipeline
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format, Shape, TensorSpec
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.pipelines.loading import BUNDLED_FOLDER, open_pipeline
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.components import to_text
from bitpolicy.policies.footprint import loaded_bytes, measured_peak
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.cost.peak_memory import LayerCall, PeakMemory, observe, unpacking_bytes
from bitpolicy.sensitivity.samples import Sample

CPU = torch.device("cpu")
CANDIDATES = (format_named("int4"), format_named("int8"), FP16)
SLACK = 20_000  # bytes for random states and other small tensors that the calculation leaves out


@dataclass(frozen=True)
class Hungry(Format):
    """One byte per weight, and `times` more floats per weight while it is unpacked, besides the weight itself."""

    times: int

    def parameters(self) -> dict[str, Any]:
        return {"kind": "hungry"}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {"weight_packed": TensorSpec(torch.int8, tuple(shape))}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight_packed": weight.to(torch.int8)}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        eaten = torch.empty(self.times * prod(shape))
        weight = tensors["weight_packed"].to(dtype)
        del eaten
        return weight


# By hand


class PaperPipeline:
    """Draws with known bytes. A is 1 MiB for each sample of the batch. One step is

    x: A | first(x): 2A | second(first): 3A | widened: 3A + `widened` A, outside of all layers

    and then first(1 row), which takes almost nothing.
    """

    rows, width = 512, 512

    def __init__(self, widened: int) -> None:
        first, second = (nn.Linear(self.width, self.width) for _ in range(2))
        self.unet = nn.ModuleDict({"first": first, "second": second, "never": nn.Linear(3, 3)}).requires_grad_(False)
        self.vae = nn.Linear(10, 10, bias=False)
        self.components = {"unet": self.unet, "vae": self.vae}
        self.scheduler = SimpleNamespace(step=lambda sample: (sample,))
        self.device, self.widened = CPU, widened

    def set_progress_bar_config(self, disable: bool) -> None:
        pass

    def __call__(self, batch_size: int = 1, generator: Any = None, output_type: str = "pt") -> tuple[torch.Tensor]:
        x = torch.ones(batch_size * self.rows, self.width)
        first = self.unet["first"](x)
        second = self.unet["second"](first)
        second.repeat(1, self.widened)
        del x, first, second
        self.unet["first"](torch.ones(1, self.width))
        self.scheduler.step(torch.zeros(batch_size, 1))
        return (torch.zeros(batch_size, 1, 2, 3),)


MIB = 4 * PaperPipeline.rows * PaperPipeline.width
assert MIB == 2**20  # of a sample, and of a layer's weight


def on_paper(widened: int, batch_size: int = 1, hungry: Sequence[Format] = ()) -> PeakMemory:
    pipe: Any = PaperPipeline(widened)
    return observe(pipe, ["unet"], {}, Sample("", 0), [*hungry, FP16], batch_size)


@pytest.mark.parametrize(("widened", "batch_size"), [(1, 1), (4, 1), (4, 3)])
def test_activations_agree_with_a_calculation_by_hand(widened: int, batch_size: int) -> None:
    peak = on_paper(widened, batch_size)
    unit = batch_size * MIB
    assert (3 + widened) * unit <= peak.unpacked <= (3 + widened) * unit + SLACK
    assert set(peak.calls) == {"first", "second"}
    for name, live in (("first", 1), ("second", 2)):
        call = peak.calls[name]
        assert live * unit <= call.before <= live * unit + SLACK
        assert call.inside - call.before == unit


def test_a_packed_layer_adds_its_weight_and_the_memory_of_unpacking() -> None:
    hungry, modest = Hungry("hungry", 5), Hungry("modest", 0)
    peak = on_paper(0, hungry=[hungry, modest])
    unpacked = {"first": FP16, "second": FP16, "never": FP16}
    for formats, units in (
        ({}, 3),
        ({"first": modest}, 3),  # 2 and its weight
        ({"second": modest}, 4),  # 3 and its weight
        ({"second": hungry}, 8),  # 2 before, 5, and the weight
        ({"first": hungry, "second": hungry}, 8),  # one after the other
        ({"first": hungry, "second": modest}, 7),
        ({"never": hungry}, 3),
    ):
        activations = peak.activations({**unpacked, **formats})
        assert units * MIB <= activations <= units * MIB + SLACK, formats


def test_the_peak_is_resident_memory_plus_activations() -> None:
    hungry = Hungry("hungry", 5)
    peak = on_paper(0, hungry=[hungry])
    biases, never, vae = 2 * 512 * 4, 12 * 4, 100 * 4
    assert peak.others == vae
    formats = {"first": hungry, "second": FP16, "never": FP16}
    assert peak.peak(formats) - peak.activations(formats) == MIB // 4 + MIB + biases + never + vae
    assert peak.reference - peak.unpacked == 2 * MIB + biases + never + vae
    assert (peak.height, peak.width, peak.batch_size, peak.device) == (2, 3, 1, "cpu")


def test_observing_leaves_no_hook_behind() -> None:
    pipe: Any = PaperPipeline(1)
    observe(pipe, ["unet"], {}, Sample("", 0), CANDIDATES)
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in pipe.unet.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unpacking_is_measured_for_each_format_and_shape(dtype: torch.dtype) -> None:
    shapes = [(64, 48), (16, 8, 3, 3), (64, 48)]
    hungry = Hungry("hungry", 5)
    found = unpacking_bytes(shapes, [hungry, FP16], dtype, CPU)
    assert found == {(hungry, shape): prod(shape) * (5 * 4 + dtype.itemsize) for shape in dict.fromkeys(shapes)}


# The room


def made_up(seed: int) -> tuple[PeakMemory, list[Format]]:
    """Four layers with random sizes and activations, and four formats with random needs."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    shapes = {f"layer {i}": (number(1, 40), number(1, 40)) for i in range(4)}
    calls = {name: LayerCall(before, before + number(0, 3000)) for name in shapes for before in [number(0, 9000)]}
    formats: list[Format] = [*CANDIDATES[:2], Hungry("hungry", 3), FP16]
    unpacking = {(f, shape): number(4, 30) * prod(shape) for f in formats if f.packed for shape in set(shapes.values())}
    account = ByteAccount(torch.float32, shapes, number(0, 1000), 1)
    return PeakMemory(account, number(0, 5000), number(0, 9000), calls, unpacking, 64, 64, 1, "cpu"), formats


@pytest.mark.parametrize("seed", range(12))
def test_the_room_allows_the_smallest_peak_and_bars_only_choices_beyond_it(seed: int) -> None:
    peak, formats = made_up(seed)
    room = peak.room(formats)
    names = list(peak.account.shapes)
    policies = [dict(zip(names, p, strict=True)) for p in itertools.product(formats, repeat=len(names))]
    allowed = [p for p in policies if not room.barred & set(p.items())]
    assert [p for p in policies if peak.activations(p) <= room.activations] == allowed
    least = min(peak.peak(p) for p in policies)
    assert peak.others + room.activations + min(map(peak.account.total, allowed)) == least


def test_nothing_is_barred_if_no_choice_needs_more_than_the_rest_of_the_call() -> None:
    peak = on_paper(9, hungry=[Hungry("hungry", 5)])
    assert peak.room([Hungry("hungry", 5), FP16]).barred == frozenset()
    assert peak.room([Hungry("hungry", 5), FP16]).activations == peak.unpacked


# Against measurements

ASKED: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a red heart"},
    "class_labels": {"class_labels": [207]},
    "nothing": {},
}
SAMPLE = {"prompt": "a red heart", "class_labels": "207", "nothing": ""}


def in_turn(target: Target, formats: Sequence[Format] = CANDIDATES) -> dict[str, Format]:
    layers = target.layers.items()
    return {name: format for (name, _), format in zip(layers, itertools.cycle(formats), strict=False)}


def reloaded(pipe: Any, target: Target, formats: Mapping[str, Format], folder: Path) -> Any:
    """`pipe` exported under a policy and read back, in float32."""
    component = to_text(target)
    model = ModelReference(id="toy", component=component, class_name=component, sha256=component)  # an entry for each
    policy = Policy.of({name: Choice(format) for name, format in formats.items()}, model=model)
    export_pipeline(pipe, target.names, policy, Calibration(), folder / "exported")
    loaded = open_pipeline(folder / "exported", torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(
    "name",
    "DDPMPipeline StableDiffusionPipeline StableDiffusionXLPipeline StableDiffusionControlNetPipeline DiTPipeline "
    "FluxPipeline StableVideoDiffusionPipeline CogVideoXPipeline WanPipeline-2.2".split(),
)
def test_every_kind_of_pipeline_takes_the_predicted_memory(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    pipe: Any = toy.new()
    target = Target.chosen(pipe)
    formats = in_turn(target)
    peak = observe(pipe, target.names, toy.call, Sample(SAMPLE[toy.takes], 1, toy.extra), CANDIDATES)
    packed = reloaded(pipe, target, formats, tmp_path)
    call = {**ASKED[toy.takes], **toy.call, **toy.extra}
    assert peak.others + peak.account.total(formats) == loaded_bytes(packed)
    for subject, policy in ((packed, formats), (pipe, dict.fromkeys(formats, FP16))):
        measured = measured_peak(subject, lambda subject=subject: subject(**call))
        assert peak.peak(policy) == pytest.approx(measured, rel=0.03)


@pytest.fixture(scope="module")
def new_bundled() -> Callable[[], Any]:
    def new() -> Any:
        pipe = open_pipeline(BUNDLED_FOLDER, torch.float32)
        pipe.set_progress_bar_config(disable=True)
        to_storage(pipe.unet, torch.float16)
        return pipe

    return new


@pytest.mark.parametrize(("size", "batch_size"), [(32, 1), (32, 4), (96, 1), (96, 2)])
def test_the_bundled_pipeline_takes_the_predicted_memory_at_any_size(
    size: int, batch_size: int, new_bundled: Callable[[], Any], tmp_path: Path
) -> None:
    pipe = new_bundled()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": size, "width": size}
    peak = observe(pipe, ["unet"], call, Sample("pizza", 1), CANDIDATES, batch_size)
    assert (peak.height, peak.width, peak.batch_size) == (size, size, batch_size)
    formats = in_turn(Target.of(pipe, ["unet"]))
    packed = reloaded(pipe, Target.of(pipe, ["unet"]), formats, tmp_path)
    measured = measured_peak(packed, lambda: packed(["pizza"] * batch_size, **call))
    assert peak.peak(formats) == pytest.approx(measured, rel=0.03)


def test_a_policy_without_barred_choices_stays_within_the_budget_when_measured(
    new_bundled: Callable[[], Any], tmp_path: Path
) -> None:
    pipe = new_bundled()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    peak = observe(pipe, ["unet"], call, Sample("pizza", 1), CANDIDATES)
    room = peak.room(CANDIDATES)
    allowed = {n: [f for f in CANDIDATES if (n, f) not in room.barred] for n in peak.account.shapes}
    smallest = {n: min(fs, key=lambda f, n=n: peak.account.layer(n, f)) for n, fs in allowed.items()}
    packed = reloaded(pipe, Target.of(pipe, ["unet"]), smallest, tmp_path)
    budget = peak.others + peak.account.total(smallest) + room.activations
    measured = measured_peak(packed, lambda: packed("pizza", **call))
    assert 0.97 * budget <= measured <= budget


def test_a_pipeline_without_a_height_argument_refuses_one() -> None:
    toy = TOYS["DiTPipeline"]
    with pytest.raises(BitPolicyError, match="DiTPipeline does not take height"):
        observe(toy.new(), ["transformer"], {**toy.call, "height": 64}, Sample("207", 0), CANDIDATES)


def test_a_batch_of_a_request_with_its_own_arguments_is_refused() -> None:
    toy = TOYS["StableVideoDiffusionPipeline"]
    with pytest.raises(BitPolicyError, match=r"--batch-size 2: .* image .*; leave --batch-size out"):
        observe(toy.new(), ["unet"], toy.call, Sample("", 0, toy.extra), CANDIDATES, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "batch_size"), [(64, 1), (256, 2)])
def test_the_prediction_agrees_with_the_counters_of_cuda(
    size: int, batch_size: int, new_bundled: Callable[[], Any], tmp_path: Path
) -> None:
    cuda = torch.device("cuda")
    pipe = new_bundled()
    formats = in_turn(Target.of(pipe, ["unet"]))
    pipe.to(cuda, torch.float16)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": size, "width": size}
    peak = observe(pipe, ["unet"], call, Sample("pizza", 1), CANDIDATES, batch_size)
    pipe.to("cpu", torch.float32)
    reloaded(pipe, Target.of(pipe, ["unet"]), formats, tmp_path)
    del pipe
    packed = load_pipeline(tmp_path / "exported", dtype=torch.float16, device="cuda")
    measured = measured_peak(packed, lambda: packed(["pizza"] * batch_size, **call))
    assert measured == pytest.approx(torch.cuda.max_memory_allocated(cuda), rel=0.05)
    assert peak.peak(formats) == pytest.approx(measured, rel=0.1)
