"""Sampling loops that cannot be differentiated, and the stepwise probe that then replaces the adjoint probe.

Also the errors when memory runs out or values are not finite.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, ImagePipelineOutput, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from scipy.stats import chi2
from torch.utils import _pytree as pytree
from toy_pipelines import TOYS, every

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.stepwise import LocalSketches
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.rounding.hessians import Moments, measure_moments
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories

INT4, INT8 = format_named("int4"), format_named("int8")
STEPS = 3
SAMPLE = Sample("", 1)


class OwnLoop(DDIMPipeline):
    """DDIM's loop with a latent output. Subclasses change the loop."""

    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        return self.unet(sample, t).sample

    def between(self, sample: torch.Tensor) -> torch.Tensor:
        return sample

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = STEPS,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        return ImagePipelineOutput(self.loop(batch_size, generator, num_inference_steps, output_type))

    def loop(self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str) -> torch.Tensor:
        sample = randn_tensor((batch_size, 3, 8, 8), generator=generator, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            sample = self.between(sample) if step else sample
            sample = self.scheduler.step(self.predict(sample, t, step), t, sample).prev_sample
        return sample if output_type == "latent" else (sample / 2 + 0.5).clamp(0, 1)


class DetachesBetweenSteps(OwnLoop):
    def between(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.detach()


class DetachesOneAnswer(OwnLoop):
    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        found = super().predict(sample, t, step)
        return found.detach() if step == 1 else found


class GoesThroughNumpy(OwnLoop):
    def between(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(sample.numpy().copy())


class GoesThroughDetachedNumpy(OwnLoop):
    def between(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(sample.detach().numpy().copy())


class ChangesAViewInPlace(OwnLoop):
    """Autograd refuses the change at once."""

    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        found = super().predict(sample, t, step)
        found.split(1, dim=1)[0].mul_(0.9)
        return found


class LoopsWithoutGrad(OwnLoop):
    def loop(self, *args: Any) -> torch.Tensor:
        with torch.no_grad():
            return super().loop(*args)


class LoopsInInferenceMode(OwnLoop):
    def loop(self, *args: Any) -> torch.Tensor:
        with torch.inference_mode():
            return super().loop(*args)


class PredictsWithoutGrad(OwnLoop):
    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        with torch.no_grad():
            return super().predict(sample, t, step)


class BeginsWithoutGrad(OwnLoop):
    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and step > 0):
            return super().predict(sample, t, step)


class GuidesWithoutGrad(OwnLoop):
    """Makes two calls per step, as Wan does, one of them without a graph."""

    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        with torch.no_grad():
            other = super().predict(-sample, t, step)
        return 2 * super().predict(sample, t, step) - other


class DetachesWhatTheDenoiserSees(OwnLoop):
    """Every call has a graph, but the denoiser's dependence on the sample is missing from it."""

    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        return super().predict(sample.detach(), t, step)


class EndsWithACall(OwnLoop):
    """Calls the denoiser once more after the scheduler's last step."""

    def loop(self, *args: Any) -> torch.Tensor:
        sample = super().loop(*args[:-1], "latent")
        sample = sample - 0.1 * self.unet(sample, 0).sample
        return sample if args[-1] == "latent" else (sample / 2 + 0.5).clamp(0, 1)


class StepsByItself(OwnLoop):
    """Euler's method written out. The scheduler gives the times but takes no step."""

    def loop(self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str) -> torch.Tensor:
        sample = randn_tensor((batch_size, 3, 8, 8), generator=generator, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            sample = sample - 0.1 * self.unet(sample, t).sample
        return sample if output_type == "latent" else (sample / 2 + 0.5).clamp(0, 1)


class DetachingStableDiffusion(StableDiffusionPipeline):
    """Detaches the latent, as a user's callback might."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        generator: Any = None,
        num_inference_steps: int = STEPS,
        height: int = 16,
        width: int = 16,
        output_type: str = "pt",
    ) -> Any:
        def detach(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            return {"latents": given["latents"].detach()} if step < num_inference_steps - 1 else given

        given = {"generator": generator, "height": height, "width": width, "callback_on_step_end": detach}
        return inspect.unwrap(StableDiffusionPipeline.__call__)(
            self, prompt, num_inference_steps=num_inference_steps, output_type=output_type, **given
        )


BROKEN: dict[type[OwnLoop], str] = {  # what the message has to contain
    DetachesBetweenSteps: "step 2",
    DetachesOneAnswer: "no gradient back to step 2",
    GoesThroughNumpy: "cannot be differentiated: .*numpy",
    GoesThroughDetachedNumpy: "step 2",
    ChangesAViewInPlace: "cannot be differentiated: .*view",
    LoopsWithoutGrad: "(detaches its result|step 1)",
    LoopsInInferenceMode: "(detaches its result|step 1)",
    PredictsWithoutGrad: "(detaches its result|step 1)",
    BeginsWithoutGrad: "step 1",
    GuidesWithoutGrad: "step 3",
    DetachesWhatTheDenoiserSees: "step 2",
}
every_broken_loop = pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)


def new_pipe(kind: type[OwnLoop] = OwnLoop) -> OwnLoop:
    toy: Any = TOYS["DDIMPipeline"].new()
    pipe = kind(unet=toy.unet, scheduler=toy.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adjoint_sketches(pipe: Any) -> Iterator[Sketch]:
    trajectories = Trajectories(pipe, ["unet"], {"num_inference_steps": STEPS})
    return AdjointSketches(trajectories, candidates([INT4]), quantization=Quantization()).sketches(
        SAMPLE, [Random(0), Random(1)]
    )


def probed(pipe: Any, **arguments: Any) -> SensitivityTable:
    given = {"samples": 2, "vectors": 2, "quiet": True, **arguments}
    return bitpolicy.probe(pipe, call={"num_inference_steps": STEPS}, **given)


# Messages and fallbacks


@pytest.mark.parametrize("kind", [OwnLoop, EndsWithACall, StepsByItself])
def test_unusual_loops_are_differentiated(kind: type[OwnLoop], capsys: pytest.CaptureFixture[str]) -> None:
    pipe = new_pipe(kind)
    (first, _) = adjoint_sketches(pipe)
    for name in ("conv_in", "mid_block.resnets.0.conv1", "conv_out"):
        weight = pipe.unet.get_parameter(f"{name}.weight")
        place = [layer for layer, _ in quantizable_layers(pipe.unet)].index(name)
        change = INT4.dequantize(INT4.quantize(weight.data.half()), weight.shape, torch.float32) - weight.data
        ends = []
        for amount in (0.05, -0.05):
            with moved(weight, amount * change):
                latent = pipe(generator=torch.Generator().manual_seed(SAMPLE.seed), output_type="latent").images
                ends.append(float((Random(0).vector(latent, SAMPLE) * latent).double().sum()))
        expected = (ends[0] - ends[1]) / 0.1
        assert float(first.weight.sum(0)[place, 0]) == pytest.approx(expected, rel=0.02, abs=1e-4), name
    assert probed(pipe).probe == "adjoint"
    assert capsys.readouterr().err == ""


@contextmanager
def moved(parameter: torch.nn.Parameter, change: torch.Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = before + change
    try:
        yield
    finally:
        parameter.data = before


@every_broken_loop
def test_a_loop_that_loses_its_graph_is_refused(kind: type[OwnLoop]) -> None:
    with pytest.raises(LoopError, match=BROKEN[kind]):
        next(adjoint_sketches(new_pipe(kind)))


@every_broken_loop
def test_the_stepwise_probe_takes_over_with_a_one_line_warning(
    kind: type[OwnLoop], capsys: pytest.CaptureFixture[str]
) -> None:
    table = probed(new_pipe(kind))
    warning = capsys.readouterr().err
    assert re.fullmatch(rf"warning: the sampling loop .*{BROKEN[kind]}.*; .*stepwise probe.*\n", warning)
    assert_ranks_but_predicts_nothing(table)


def assert_ranks_but_predicts_nothing(table: SensitivityTable) -> None:
    assert table.probe == "stepwise"
    assert torch.isfinite(table.error).all()
    assert (table.error >= 0).all()
    assert 0 < table.error[:, 1].sum() < table.error[:, 0].sum() / 10
    assert table.additive_error([INT8] * len(table.layers)) is None


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_trajectory_moments_are_not_measured_through_a_broken_loop(kind: type[OwnLoop]) -> None:
    trajectories = Trajectories(new_pipe(kind), ["unet"], {"num_inference_steps": STEPS})
    with pytest.raises(LoopError):
        measure_moments(trajectories, {}, ["conv_in"], SAMPLE, True, False)


@every_broken_loop
def test_input_moments_are_measured_through_any_loop(kind: type[OwnLoop]) -> None:
    trajectories = Trajectories(new_pipe(kind), ["unet"], {"num_inference_steps": STEPS})
    found: dict[str, Moments] = {}
    for _ in range(2):
        measure_moments(trajectories, found, ["conv_in", "conv_out"], SAMPLE, False, False)
    assert all(torch.isfinite(m.inputs).all() and m.inputs.diagonal(dim1=-2, dim2=-1).sum() > 0 for m in found.values())
    assert set(found) == {"conv_in", "conv_out"}


@pytest.mark.parametrize("kind", [GoesThroughNumpy, ChangesAViewInPlace, LoopsWithoutGrad])
def test_rounding_falls_back_to_inputs_alone_with_a_one_line_warning(
    kind: type[OwnLoop], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, sizes = new_pipe(kind), {"calibration_samples": 2, "vectors": 1, "trials": 0, "quiet": True}
    call = {"num_inference_steps": STEPS}
    policy = bitpolicy.search(pipe, "30%", call=call, quantizer="gptq-trajectory", **sizes)
    lines = capsys.readouterr().err.splitlines()
    rounding = [line for line in lines if "weights are rounded" in line]
    assert len(rounding) == 1
    assert rounding[0].startswith("warning: the sampling loop")
    names = [name for name, _ in quantizable_layers(pipe.unet)]
    alone = bitpolicy.search(new_pipe(kind), "30%", call=call, quantizer="gptq", **sizes)
    assert policy.calibration is not None
    assert alone.calibration is not None
    chosen = policy.resolve(names)
    for key, tensor in policy.calibration.rounded.items():
        other = alone.calibration.rounded.get(key._replace(quantizer=key.quantizer.replace("gptq-trajectory", "gptq")))
        if chosen[key.layer].format == alone.resolve(names)[key.layer].format:
            assert other is not None
            assert float((tensor.float() == other.float()).float().mean()) > 0.97, key


def test_a_callback_that_detaches_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    toy = TOYS["StableDiffusionPipeline"]
    pipe = DetachingStableDiffusion(**toy.new().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    table = probed(pipe, prompts=["a red heart", "pizza"])
    warning = capsys.readouterr().err
    assert re.match("warning: the sampling loop .* step 2;", warning)  # of four; a new graph begins in the third
    assert warning.count("\n") == 1
    assert_ranks_but_predicts_nothing(table)


def test_a_search_continues_with_stepwise_scores(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"calibration_samples": 1, "vectors": 1, "trials": 0}
    call = {"num_inference_steps": STEPS}
    policy = bitpolicy.search(new_pipe(DetachesBetweenSteps), "50%", call=call, quiet=True, **sizes)
    assert capsys.readouterr().err.count("warning:") == 1
    assert policy.result is not None
    assert policy.result.predicted_error is None
    assert policy.result.policy_bytes <= policy.budget.bytes
    assert policy.provenance["probe"]["name"] == "stepwise"


def test_the_stepwise_probe_leaves_no_trace() -> None:
    pipe = new_pipe()
    trajectories = Trajectories(pipe, ["unet"], {"num_inference_steps": STEPS})
    flags = {name: i % 3 != 0 for i, (name, _) in enumerate(pipe.unet.named_parameters())}
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(flags[name])
    expected = next(trajectories.latents([SAMPLE]))
    for passes in (1, 2):
        list(
            LocalSketches(trajectories, candidates([INT4]), quantization=Quantization()).sketches(SAMPLE, range(passes))
        )
        assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == flags
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in pipe.unet.parameters())
        assert "forward" not in vars(pipe.unet)
        assert "step" not in vars(pipe.scheduler)
        assert torch.equal(next(trajectories.latents([SAMPLE])), expected)


# Running out of memory does not mean that the loop cannot be differentiated


class RunsOutForward(OwnLoop):
    def predict(self, sample: torch.Tensor, t: Any, step: int) -> torch.Tensor:
        if torch.is_grad_enabled() and step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(sample, t, step)


def runs_out_backward(*_: Any) -> None:
    if torch.is_grad_enabled():  # a checkpointed call computes with a graph only when it runs again
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("probe", ["adjoint", "stepwise"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_out_of_memory_error_is_not_hidden(where: str, probe: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = new_pipe(RunsOutForward if where == "forward" and probe == "adjoint" else OwnLoop)
    if where == "backward" or probe == "stepwise":
        pipe.unet.conv_out.register_forward_pre_hook(runs_out_backward)
    with pytest.raises(torch.OutOfMemoryError):
        probed(pipe, probe=probe)
    assert capsys.readouterr().err == ""


# The stepwise probe against the denoiser itself, called again with the same inputs


@dataclass
class Recorded:
    """Every denoiser call of one sample's reference trajectory."""

    subject: Any
    calls: list[tuple[torch.nn.Module, Any, Any, int]]

    @classmethod
    def of(cls, subject: Any, sample: Sample) -> Recorded:
        calls: list[tuple[torch.nn.Module, Any, Any, int]] = []
        step = [0]

        def record(model: torch.nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((model, *pytree.tree_map(copied, (args, kwargs)), step[0]))

        hooks = [model.register_forward_pre_hook(record, with_kwargs=True) for model in subject.trajectories.denoisers]
        subject.final_latent(sample, lambda taken: step.__setitem__(0, taken))
        for hook in hooks:
            hook.remove()
        return cls(subject, calls)

    def outputs(self, moves: Any = None, amount: float = 0.0) -> list[torch.Tensor]:
        """The output of each call with the parameters moved."""
        with ExitStack() as stack, torch.no_grad():
            for parameter, change in (moves or {}).items():
                stack.enter_context(moved(parameter, amount * change))
            return [model(*args, **kwargs)[0] for model, args, kwargs, _ in self.calls]

    def changes(self, moves: Any, amount: float) -> list[torch.Tensor]:
        """de_t of each call to first order, by central differences."""
        ends = zip(self.outputs(moves, amount), self.outputs(moves, -amount), strict=True)
        return [(after - before) / (2 * amount) for after, before in ends]


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every vector that starts a backward pass."""
    found: list[torch.Tensor] = []
    backward = torch.autograd.backward

    def recorded(tensors: Any, grad_tensors: Any = None, **kwargs: Any) -> None:
        if not found or grad_tensors is not found[-1]:  # a torch function mode passes the call on to itself
            found.append(grad_tensors)
        backward(tensors, grad_tensors, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", recorded)
    return found


@pytest.mark.parametrize("name", every(TOYS))
def test_a_stepwise_sketch_agrees_with_finite_differences_of_each_call(
    new_subject: Any, made_up_means: Any, vectors: list[torch.Tensor], name: str
) -> None:
    subject = new_subject(name, torch.float64, num_inference_steps=2)
    sample = subject.samples[0]
    layers = subject.layers
    signs = torch.randint(2, (len(layers),), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    with subject.unrounded():
        probe = LocalSketches(
            subject.trajectories,
            candidates([INT4]),
            quantization=Quantization(calibration=Calibration(made_up_means(subject))),
        )
        (found,) = probe.sketches(sample, [5])
    moves = {
        layer.weight: sign * subject.weight_change(layer_name, INT4)
        for sign, (layer_name, layer) in zip(signs, layers.items(), strict=True)
    }
    with subject.unrounded():
        recorded = Recorded.of(subject, sample)
        changes, outputs = recorded.changes(moves, 1e-4), recorded.outputs()
    assert len(changes) == len(vectors)
    expected, power = torch.zeros(len(found.power)).double(), torch.zeros(len(found.power)).double()
    for (*_, step), change, v, output in zip(recorded.calls, changes, vectors, outputs, strict=True):
        expected[step] += (v * change).sum()
        power[step] += output.square().sum()
    assert len(found.power) == subject.steps_taken(sample)
    error = (found.sketch.weight[..., 0].double() @ signs - expected).abs().max()
    assert error < 5e-6 * found.sketch.weight.double().norm()
    torch.testing.assert_close(found.power.double(), power, rtol=1e-5, atol=0)


def test_stepwise_probe_vectors_are_standard_normal_and_independent(vectors: list[torch.Tensor]) -> None:
    """This makes a squared sketch unbiased. Vectors differ between calls, samples and indices."""
    trajectories = Trajectories(new_pipe(), ["unet"], {"num_inference_steps": STEPS})
    probe = LocalSketches(trajectories, candidates([INT4]), quantization=Quantization())
    for seed in (0, 1, 1_000_000):
        list(probe.sketches(Sample("", seed), range(4)))
    together = torch.stack(vectors).flatten(1).double()
    assert together.shape == (3 * 4 * STEPS, 3 * 64)
    assert together.mean().abs() < 4 / together.numel() ** 0.5
    assert together.var().sub(1).abs() < 4 * (2 / together.numel()) ** 0.5
    noise = [torch.randn(3 * 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 1_000_000)]
    rows = torch.nn.functional.normalize(torch.cat([together, torch.stack(noise).double()]), dim=1)
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 6 / (3 * 64) ** 0.5


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline"])
def test_stepwise_scores_are_the_share_of_the_denoisers_output_that_changes(new_subject: Any, name: str) -> None:
    """A table of many vectors against sum_t |de_t|^2 / sum_t |e_t|^2 of single layers, over two samples.

    The mean of R squares of one sample is chi-squared. The mean of two samples is within the wider of their bounds.
    """
    subject, count = new_subject(name, num_inference_steps=2, guidance_scale=1.0), 24
    samples = [Sample(subject.samples[0].prompt, seed) for seed in (0, 1)]
    table = bitpolicy.probe(
        subject.pipe,
        call=subject.call,
        prompts=[samples[0].prompt],
        formats="int8",
        probe="stepwise",
        quantizer="rtn",
        samples=2,
        vectors=count,
        quiet=True,
    )
    recorded = [Recorded.of(subject, sample) for sample in samples]
    power = sum(float(output.double().square().sum()) for calls in recorded for output in calls.outputs())
    low, high = (chi2.ppf(q, count) / count for q in (1e-4, 1 - 1e-4))
    names = [layer for layer, module in subject.layers.items() if not table.corrected[table.layers.index(layer), 0]]
    for layer in names[:: max(1, len(names) // 8)]:
        moves = {subject.layers[layer].weight: subject.weight_change(layer, INT8).float()}
        changes = [change for calls in recorded for change in calls.changes(moves, 1.0)]
        truth = sum(float(change.double().square().sum()) for change in changes) / power
        assert low < table.error[table.layers.index(layer), 0] / truth < high, layer


# NaN and Inf


def new_stable_diffusion(dtype: torch.dtype = torch.float32) -> Trajectories:
    toy = TOYS["StableDiffusionPipeline"]
    pipe = toy.new()
    pipe.to(dtype)
    return Trajectories(pipe, ["unet"], {**toy.call, "num_inference_steps": STEPS})


RUNS: dict[str, Callable[[Trajectories, list[Sample]], Any]] = {
    "images": lambda trajectories, samples: list(trajectories.images(samples)),
    "latents": lambda trajectories, samples: list(trajectories.latents(samples)),
    "adjoint": lambda t, samples: list(
        AdjointSketches(t, candidates([INT4]), quantization=Quantization()).sketches(samples[0], [Random(0)])
    ),
    "stepwise": lambda t, samples: list(
        LocalSketches(t, candidates([INT4]), quantization=Quantization()).sketches(samples[0], [0])
    ),
    "reference": lambda trajectories, samples: ReferencePass.of(trajectories, samples),
}
HEARTS = [Sample("a red heart", 1), Sample("pizza", 2)]
LAYER = "mid_block.resnets.0.conv1"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_step(run: str, value: float) -> None:
    trajectories = new_stable_diffusion()
    trajectories.pipe.unet.get_parameter(f"{LAYER}.weight").data[0, 0, 0, 0] = value
    message = f"^step 1: {LAYER} gives NaN or Inf for 'a red heart', seed 1; .* wider range than float32"
    with pytest.raises(BitPolicyError, match=message):
        RUNS[run](trajectories, HEARTS)


@pytest.mark.parametrize("run", RUNS)
def test_a_float16_overflow_during_the_loop_is_named_with_its_step(run: str) -> None:
    trajectories = new_stable_diffusion(torch.float16)
    layer: Any = trajectories.pipe.unet.get_submodule(LAYER)
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 6e4,) if trajectories.steps == 2 else None)
    with pytest.raises(BitPolicyError, match=f"^step 3: {LAYER} gives NaN or Inf for 'a red heart', seed 1; try"):
        RUNS[run](trajectories, HEARTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_probe_names_step_and_layer_of_a_weight_that_is_not_finite(dtype: torch.dtype) -> None:
    pipe = new_stable_diffusion(dtype).pipe
    pipe.unet.get_parameter(f"{LAYER}.weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(BitPolicyError, match=f"^step 1: {LAYER} gives NaN or Inf for 'a red heart'"):
        probed(pipe, prompts=["a red heart"])


def test_a_weight_that_storage_cannot_hold_is_named_before_anything_runs() -> None:
    pipe = new_stable_diffusion().pipe
    pipe.unet.get_parameter(f"{LAYER}.weight").data[0, 0, 0, 0] = 1e6
    with pytest.raises(BitPolicyError, match=f"^{LAYER}.weight has values that torch.float16 cannot hold"):
        probed(pipe, prompts=["a red heart"])


def test_a_layer_of_one_of_two_denoisers_is_named_with_its_component(new_subject: Any) -> None:
    subject = new_subject("WanPipeline-2.2")
    name = "transformer_2.blocks.1.ffn.net.2"
    subject.layers[name].weight.data[0, 0] = float("nan")
    with pytest.raises(BitPolicyError, match=rf"^step \d: {name} gives NaN or Inf"):
        list(subject.trajectories.latents(subject.samples[:1]))


def test_images_that_are_not_finite_are_refused_even_if_every_latent_is_finite() -> None:
    """SDXL's decoder is known to overflow in float16."""
    trajectories = new_stable_diffusion()
    trajectories.pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    assert len(list(trajectories.latents(HEARTS))) == 2
    with pytest.raises(BitPolicyError, match="NaN or Inf"):
        list(trajectories.images(HEARTS))
