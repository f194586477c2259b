"""The effect of 8-bit inputs in the probes, against finite differences and against ablation.

A layer's input x becomes x + a (Q(x) - x). The tests do this themselves with a small a of either sign, run the sampler
twice and divide. With a = 1 this is INT8 compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from scipy.stats import spearmanr
from torch import nn

from bitpolicy.kernels.formats.named import format_named, parse_formats
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.kernels.quantizers.bias_correction import bias_shift
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.rounded_layers import seen_input
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.measurement import References, ablate
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.probes.stepwise import LocalSketches
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.sketches.directions import Random, stream
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
INT4, INT8, ROTATED = (format_named(name) for name in ("int4", "int8", "int4-rot"))
SAMPLE, SEED = Sample("a red heart", 11), 4
SAMPLES = tuple(split_samples(["a red heart", "pizza", "cat face"], 3, seed=0))
FIRST = "conv_in"  # its input has no gradient in the first step
SHARING = tuple(f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}" for part in "qkv")
OTHERS = ("time_embedding.linear_2", "mid_block.resnets.0.time_emb_proj", "up_blocks.1.resnets.1.conv1", "conv_out")


def sketch(trajectories: Trajectories, *formats: Any, inside: bool = False) -> Sketch:
    probe = AdjointSketches(
        trajectories,
        candidates(formats or [INT4]),
        recompute_inside=inside,
        quantization=Quantization(compute=Compute.INT8),
    )
    (found,) = probe.sketches(SAMPLE, [Random(SEED)])
    return found


def of_inputs(found: Sketch) -> torch.Tensor:
    """The sketch's part from inputs, shape (rows, layers)."""
    assert found.inputs is not None
    return found.inputs[..., 0]


def names_of(trajectories: Trajectories) -> list[str]:
    return [name for name, _ in quantizable_layers(trajectories.target)]


def rounding(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Q(x) - x by definition: 255 steps from the smallest to the largest value of a row, a pixel or a sample."""
    one_tap = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1)
    dims = -1 if isinstance(layer, nn.Linear) else 1 if one_tap else tuple(range(1, x.ndim))
    wide = x.float()
    low, high = wide.amin(dims, keepdim=True).clamp(max=0), wide.amax(dims, keepdim=True).clamp(min=0)
    step = high / 255 - low / 255
    zero = torch.round(-low / step)
    return ((torch.round(wide / step) + zero).clamp(0, 255) - zero) * step - x


@dataclass
class PartlyRounded:
    """A layer whose inputs are partly rounded, in call number `only` alone if that is given."""

    trajectories: Trajectories
    name: str
    only: int | None = None

    @contextmanager
    def by(self, amount: float) -> Iterator[None]:
        calls = iter(range(1000))
        layer = self.trajectories.pipe.unet.get_submodule(self.name)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            here = amount if self.only in (None, next(calls)) else 0.0
            return (args[0] + here * rounding(args[0], layer).to(args[0]), *args[1:])

        handle = layer.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def slope(self, value: Callable[[], float], amount: float) -> float:
        """(value(a) - value(-a)) / 2a."""
        ends = []
        for sign in (1, -1):
            with self.by(sign * amount):
                ends.append(value())
        return (ends[0] - ends[1]) / (2 * amount)


def projected(trajectories: Trajectories) -> float:
    """<v, x_0>, in float64."""
    seeded = torch.Generator().manual_seed(SAMPLE.seed)
    latent = trajectories.pipe(SAMPLE.prompt, generator=seeded, output_type="latent", **trajectories.call).images
    return float((Random(SEED).vector(latent, SAMPLE).double() * latent.double()).sum())


LOOPS: dict[str, tuple[dict[str, Any], float, float]] = {  # arguments, size of the step, accuracy
    "DDIM": ({}, 1e-5, 1e-3),
    "DDIM without guidance": ({"guidance_scale": 1.0}, 1e-5, 1e-3),
    "Euler": ({"scheduler": EulerDiscreteScheduler}, 1e-2, 2e-2),  # rounds the sample to float32 in each step
}


@pytest.mark.parametrize("inside", [False, True], ids=["calls", "blocks"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_input_part_of_a_sketch_is_the_slope_that_finite_differences_find(
    new_trajectories: NewTrajectories, loop: str, inside: bool
) -> None:
    call, amount, accuracy = LOOPS[loop]
    trajectories = new_trajectories(dtype=torch.float64, **call)
    found = of_inputs(sketch(trajectories, inside=inside)).sum(0)
    by_name = dict(zip(names_of(trajectories), found.tolist(), strict=True))
    for name in (FIRST, *SHARING, *OTHERS):
        expected = PartlyRounded(trajectories, name).slope(lambda: projected(trajectories), amount)
        assert by_name[name] == pytest.approx(expected, rel=accuracy, abs=accuracy * found.std().item()), name


@pytest.mark.parametrize("name", [FIRST, "mid_block.resnets.0.conv1"])
def test_each_step_has_the_slope_of_rounding_in_that_step_alone(new_trajectories: NewTrajectories, name: str) -> None:
    trajectories = new_trajectories(dtype=torch.float64)
    found = of_inputs(sketch(trajectories))[:, names_of(trajectories).index(name)]
    for step in range(3):
        expected = PartlyRounded(trajectories, name, only=step).slope(lambda: projected(trajectories), 1e-3)
        assert found[step].item() == pytest.approx(expected, rel=2e-3), step


def test_inputs_of_short_rows_are_not_rounded_nor_are_any_under_exact_compute(
    new_trajectories: NewTrajectories,
) -> None:
    trajectories = new_trajectories()
    short = torch.tensor([layer.weight[0].numel() < 32 for _, layer in quantizable_layers(trajectories.target)])
    assert 0 < int(short.sum()) < len(short)
    assert torch.equal(of_inputs(sketch(trajectories)).abs().sum(0) == 0, short)
    exact = AdjointSketches(trajectories, candidates([INT4]), quantization=Quantization())
    (without,) = exact.sketches(SAMPLE, [Random(SEED)])
    assert without.inputs is None
    assert torch.equal(without.plain, without.weight)


def test_all_candidates_that_fit_have_the_same_error_from_inputs(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()
    found = sketch(trajectories, INT4, INT8, ROTATED).inputs
    assert found is not None
    assert torch.equal(found[..., 0], found[..., 1])
    fits = torch.tensor([ROTATED.fits(layer.weight.shape) for _, layer in quantizable_layers(trajectories.target)])
    assert 0 < int(fits.sum()) < len(fits)
    assert torch.equal(found[:, fits, 2], found[:, fits, 0])
    assert not found[:, ~fits, 2].any()


@pytest.mark.parametrize("shape", [(5, 33), (6, 4, 3, 3), (7, 20)], ids=str)  # the last one's rows are too short
def test_the_weight_part_uses_the_multiplied_weight_and_the_bias_part_the_stored_one(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3)
    to_storage(layer, torch.float16)
    mean, gradient = torch.randn(shape[1:]), torch.randn(shape)
    changes = WeightChanges(
        {"layer": layer},
        candidates([INT4]),
        quantization=Quantization(calibration=Calibration({"layer": mean}), compute=Compute.INT8),
    )
    stored = INT4.dequantize(INT4.quantize(layer.weight.detach()), shape, torch.float32)
    step = (stored.flatten(1).abs().amax(1) / 127).view(-1, *[1] * (len(shape) - 1))
    multiplied = stored if stored[0].numel() < 32 else (stored / step).round() * step
    expected = float((gradient * (multiplied - layer.weight.detach())).sum())
    assert changes.weight_products("layer", gradient).item() == pytest.approx(expected, rel=1e-5)
    shift = bias_shift(layer, stored - layer.weight.detach(), mean)
    for unit in torch.eye(shape[0]):
        found = changes.bias_products("layer", unit).item()
        assert found == pytest.approx(float(shift @ unit), rel=1e-4, abs=1e-6)


def test_the_gradient_scale_of_half_precision_is_divided_out(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectories, found = new_trajectories(dtype=torch.float16), []
    for scale in (16.0, 1.0):
        monkeypatch.setattr("bitpolicy.sensitivity.probes.adjoint.scales_for", lambda *_, scale=scale: [scale])
        found.append(of_inputs(sketch(trajectories)).sum(0))
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_a_gradient_overflow_at_an_input_is_detected(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only weights were checked, the first scale would be kept and the part from inputs would be infinite."""
    trajectories = new_trajectories()
    calls = iter(range(10_000))

    def once(layer: Any, x: torch.Tensor, compute: Compute) -> torch.Tensor:
        return seen_input(layer, x, compute) * (torch.inf if next(calls) == 0 else 1)

    expected = of_inputs(sketch(trajectories))
    monkeypatch.setattr("bitpolicy.sensitivity.sketches.input_rounding.seen_input", once)
    monkeypatch.setattr("bitpolicy.sensitivity.probes.adjoint.scales_for", lambda *_: [4.0, 1.0])
    torch.testing.assert_close(of_inputs(sketch(trajectories)), expected)


def test_a_stepwise_sketch_agrees_with_finite_differences_of_each_call(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories(dtype=torch.float64)
    probe = LocalSketches(trajectories, candidates([INT4]), quantization=Quantization(compute=Compute.INT8))
    (found,) = probe.sketches(SAMPLE, [SEED])
    assert of_inputs(found.sketch).shape == found.sketch.weight.shape[:2] == (3, 83)
    denoiser: Any = trajectories.pipe.unet
    calls: list[Any] = []
    handle = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    projected(trajectories)
    handle.remove()
    for step, (args, kwargs) in enumerate(calls):

        def value(step: int = step, args: Any = args, kwargs: Any = kwargs) -> float:
            with torch.no_grad():
                output = denoiser(*args, **kwargs)[0]
            v = torch.randn(output.shape, generator=stream(0x57E9, SAMPLE.seed, SEED, step))
            return float((v.double() * output).sum())

        for name in (FIRST, *SHARING):
            expected = PartlyRounded(trajectories, name).slope(value, 1e-3)
            place = names_of(trajectories).index(name)
            assert of_inputs(found.sketch)[step, place].item() == pytest.approx(expected, rel=2e-3), (step, name)


def test_a_pass_leaves_no_hooks(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()
    before = next(trajectories.latents([SAMPLE]))
    probe = AdjointSketches(trajectories, candidates([INT4]), quantization=Quantization(compute=Compute.INT8))
    passes = probe.sketches(SAMPLE, [Random(0), Random(1)])
    next(passes)
    passes.close()  # type: ignore[attr-defined]
    list(
        LocalSketches(trajectories, candidates([INT4]), quantization=Quantization(compute=Compute.INT8)).sketches(
            SAMPLE, [0]
        )
    )
    assert not any(layer._forward_pre_hooks for _, layer in quantizable_layers(trajectories.target))
    assert torch.equal(next(trajectories.latents([SAMPLE])), before)


# Against ablation


def new_run(trajectories: Trajectories, folder: Path, settings: ProbeSettings) -> ProbeRun:
    layers, formats = inventory(trajectories.target), parse_formats("int4,int8")
    return ProbeRun(trajectories, layers, formats, torch.float16, "toy", settings, folder, Stages(quiet=True))


@pytest.fixture(scope="module")
def tables(new_trajectories: NewTrajectories, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SensitivityTable]:
    """Both probes of one pipeline under INT8 compute."""
    trajectories = new_trajectories(num_inference_steps=2, guidance_scale=1.0)
    folder = tmp_path_factory.mktemp("probes")
    found = {}
    for probe in ("adjoint", "ablation"):
        run = new_run(trajectories, folder, ProbeSettings(probe, SAMPLES[:2], vectors=16, compute=Compute.INT8))
        found[probe] = run.table(run.reference())
    return found


def rounded_layers(new_trajectories: NewTrajectories) -> list[int]:
    layers = quantizable_layers(new_trajectories().target)
    return [i for i, (_, layer) in enumerate(layers) if layer.weight[0].numel() >= 32]


@pytest.mark.parametrize("column", [0, 1], ids=["int4", "int8"])
def test_adjoint_scores_agree_with_ablation_in_rank_and_size(tables: dict[str, SensitivityTable], column: int) -> None:
    predicted, truth = tables["adjoint"].error[:, column], tables["ablation"].error[:, column]
    assert spearmanr(predicted, truth).statistic > 0.95
    assert 0.8 < (predicted / truth).median() < 1.25
    assert 0.7 < predicted.sum() / truth.sum() < 1.5


def test_inputs_cause_a_large_share_of_the_error_of_int8_layers(
    tables: dict[str, SensitivityTable], new_trajectories: NewTrajectories
) -> None:
    """So weights alone could not reach the agreement above. In INT4 layers, inputs cause little of the error."""
    rounded, table = rounded_layers(new_trajectories), tables["adjoint"]
    assert table.inputs is not None
    share = (table.inputs / table.error)[rounded]
    assert 0.2 < share[:, 1].median() < 0.95
    assert share[:, 0].median() < 0.1
    assert tables["ablation"].inputs is None


def test_a_layer_whose_inputs_hurt_more_than_its_weight_is_detected(new_trajectories: NewTrajectories) -> None:
    """One input channel, an outlier 100 times the others, uses up all the steps; its weight is small to compensate."""
    trajectories = new_trajectories(num_inference_steps=2, guidance_scale=1.0)
    block = trajectories.pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    norm, name = block.get_submodule("norm3"), "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    norm.weight.data[3] *= 100
    trajectories.pipe.unet.get_submodule(name).weight.data[:, 3] /= 100
    reference = ReferencePass.of(trajectories, SAMPLES[:2])
    errors = {}
    for compute in (Compute.EXACT, Compute.INT8):
        probe = AdjointSketches(trajectories, candidates([INT8]), quantization=Quantization(compute=compute))
        found = [s for sample in SAMPLES[:2] for s in probe.sketches(sample, [Random(k) for k in range(12)])]
        names = names_of(trajectories)
        table = SensitivityTable.from_sketches(names, candidates([INT8]), found, reference.latent_power)
        measured = ablate(
            trajectories,
            {name: Choice(INT8)},
            SAMPLES[:2],
            References.of(trajectories, SAMPLES[:2], images=False),
            quantization=Quantization(compute=compute),
        )
        errors[compute] = (table.error[names.index(name), 0], measured.power.mean() / reference.latent_power)
    for predicted, truth in errors.values():
        assert predicted == pytest.approx(truth, rel=0.5)
    assert errors[Compute.INT8][1] > 5 * errors[Compute.EXACT][1]


def test_layers_outside_the_loop_are_scored_like_the_others(new_toy_pipeline: Callable[[], Any]) -> None:
    pipe = new_toy_pipeline()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        to_storage(model, torch.float16)
    trajectories = Trajectories(
        pipe, ["unet", "text_encoder", "vae"], {"num_inference_steps": 2, "guidance_scale": 1.0}
    )
    samples = SAMPLES[:2]
    power = ReferencePass.of(trajectories, samples).latent_power
    probe = AdjointSketches(trajectories, candidates([INT8]), quantization=Quantization(compute=Compute.INT8))
    sketches = [s for sample in samples for s in probe.sketches(sample, [Random(k) for k in range(12)])]
    table = SensitivityTable.from_sketches(names_of(trajectories), candidates([INT8]), sketches, power)
    owners = trajectories.outside_layers
    assert {name.partition(".")[0] for name in owners} == {"text_encoder", "vae"}
    kept = [i for i, name in enumerate(table.layers) if name in owners and table.error[i, 0] > 0]
    outside = of_inputs(sketches[0])[:, kept]
    assert outside[0].count_nonzero() > 10
    assert not outside[1:].any()
    kept = kept[::2]  # each one takes more runs below
    references = References.of(trajectories, samples, images=False)
    truth = []
    for i in kept:
        choices = {table.layers[i]: Choice(INT8)}
        found = ablate(trajectories, choices, samples, references, quantization=Quantization(compute=Compute.INT8))
        truth.append(float(found.power.mean()) / power)
    assert spearmanr(table.error[kept, 0], truth).statistic > 0.9
    assert 0.7 < float((table.error[kept, 0] / torch.tensor(truth)).median()) < 1.4


# Records


@pytest.mark.parametrize("probe", ["adjoint", "stepwise"])
def test_records_of_different_compute_modes_are_kept_apart(
    new_trajectories: NewTrajectories, tmp_path: Path, probe: str
) -> None:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    exact = ProbeSettings(probe, SAMPLES[:1], vectors=1)
    tables = []
    for settings in (exact, replace(exact, compute=Compute.INT8), exact, replace(exact, compute=Compute.INT8)):
        run = new_run(trajectories, tmp_path, settings)
        tables.append(run.table(run.reference()))
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(tables[0].error, tables[2].error)
    assert torch.equal(tables[1].error, tables[3].error)
    assert not torch.allclose(tables[0].error, tables[1].error)
    assert (tables[0].inputs, tables[0].compute) == (None, Compute.EXACT)
    assert tables[3].inputs is not None
    assert tables[3].compute is Compute.INT8


def test_a_resumed_probe_of_inputs_gives_the_same_table(new_trajectories: NewTrajectories, tmp_path: Path) -> None:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    settings = ProbeSettings("adjoint", SAMPLES[:2], vectors=1, compute=Compute.INT8)
    whole = new_run(trajectories, tmp_path, settings)
    expected = whole.table(whole.reference())
    (piece, *_) = sorted(tmp_path.rglob("sketch-1-*"))
    piece.unlink()
    again = new_run(trajectories, tmp_path, settings)
    found = again.table(again.reference())
    assert torch.equal(found.error, expected.error)
    assert found.inputs is not None
    assert expected.inputs is not None
    assert torch.equal(found.inputs, expected.inputs)


def test_the_split_and_measured_policies_include_input_rounding(
    new_trajectories: NewTrajectories, tmp_path: Path
) -> None:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    settings = ProbeSettings("adjoint", SAMPLES[:2], vectors=2, shared=12, compute=Compute.INT8)
    run = new_run(trajectories, tmp_path, settings)
    reference = run.reference()
    split = run.split(reference)
    names, place = names_of(trajectories), names_of(trajectories).index("conv_out")
    measured = run.measure({"alone": {names[place]: Choice(INT8)}}, reference, "")[0]
    found = float(split.error[0, 0, place, 1])
    assert found == pytest.approx(float(measured.power.mean()) / reference.latent_power, rel=0.6)
    exact = new_run(trajectories, tmp_path, replace(settings, compute=Compute.EXACT))
    assert found > 1.5 * float(exact.split(exact.reference()).error[0, 0, place, 1])
