"""Toy pipelines run by their own call, at a precision where finite differences are exact.

For a change dW of the weights, the adjoint probe's sketch is <v, J dW>, the slope of <v, x_0> along dW. Here the
weights are moved by +-a dW, the pipeline is called as a user calls it, and the two results are subtracted. This uses no
gradients, and neither the trajectory code nor the sketches under test.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from torch.overrides import TorchFunctionMode
from toy_recipe import Toy

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.components import asked_components
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

Moves = Mapping[nn.Parameter, torch.Tensor]
REQUESTS = {"prompt": ["a red heart", "pizza", "a cat"], "class_labels": ["207", "3", "999"], "nothing": ["", "", ""]}
_AMOUNT = 1e-4


class _Unrounded(TorchFunctionMode):
    """Gives float64 wherever code requests float32, as most schedulers do, or bfloat16, as Kandinsky 5, or no dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        given = {name: _widened(value) for name, value in (kwargs or {}).items()}
        if func is torch.randn and given.get("dtype") is None:
            given["dtype"] = torch.float64
        return func(*map(_widened, args), **given)


def _widened(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.bfloat16) else value


@contextmanager
def _unrounded(denoisers: Sequence[nn.Module], outside: Sequence[nn.Module] = ()) -> Iterator[None]:
    numpy_to_pt = VaeImageProcessor.numpy_to_pt
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(VaeImageProcessor, "numpy_to_pt", staticmethod(lambda image: numpy_to_pt(image).double()))
        )
        for denoiser in denoisers:  # a checkpointed call runs again in the backward pass, which suspends the mode
            stack.enter_context(patch.object(denoiser, "forward", _in_float64(denoiser.forward)))
        for model in outside:
            method = "decode" if hasattr(model, "decode") else "forward"
            stack.enter_context(patch.object(model, method, _in_float64(getattr(model, method))))
        stack.enter_context(_Unrounded())
        yield


@contextmanager
def _without_asserts(kind: type) -> Iterator[None]:
    """While the block runs, the pipeline class asserts nothing. Z-Image's asserts that its latents are float32."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))
    if "assert " not in source:
        yield
        return
    found: dict[str, Any] = {}
    code = compile(source, inspect.getfile(kind), "exec", dont_inherit=True, optimize=1)
    exec(code, vars(inspect.getmodule(kind)), found)
    with patch.object(kind, "__call__", found["__call__"]):
        yield


def _in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with _Unrounded():
            return forward(*args, **kwargs)

    return inside


@dataclass(frozen=True)
class Subject:
    """A toy, its trajectories, and samples that suit it.

    Attributes:
        call: arguments that both `trajectories` and `own_call` pass to the pipeline with every sample.
    """

    toy: Toy
    pipe: Any
    call: dict[str, Any]
    trajectories: Trajectories
    samples: tuple[Sample, ...]

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """While the block runs, a pipeline with float64 weights computes in float64 from the noise to the latent."""
        models = self.trajectories.denoisers, list(self.trajectories.outside.values())
        with _without_asserts(type(self.pipe)), _unrounded(*models):
            yield

    @property
    def layers(self) -> dict[str, Quantizable]:
        return self.trajectories.target.layers

    def own_call(self, sample: Sample, output_type: str) -> Any:
        """The first output of the pipeline, called as a user calls it; latents with those of the sound track."""
        takes = self.toy.takes
        asked = (
            {} if takes == "nothing" else {takes: [int(sample.prompt)] if takes == "class_labels" else sample.prompt}
        )
        generator = torch.Generator().manual_seed(sample.seed)
        with torch.random.fork_rng():
            torch.manual_seed(sample.seed)
            made = self.pipe(**asked, **self.call, **sample.arguments, generator=generator, output_type=output_type)
        if output_type == "latent" and isinstance(getattr(made, "audio", None), torch.Tensor):
            return torch.cat([part.flatten(1) / part.numel() ** 0.5 for part in (made[0], made.audio)], 1)
        return made[0]

    def final_latent(self, sample: Sample, watch: Callable[[int], None] = lambda step: None) -> torch.Tensor:
        """The pipeline's output for "latent", or the result of its last scheduler step if it returns images.

        Args:
            watch: called with 0 before the first step, with 1 after it, and so on.
        """
        made: list[torch.Tensor] = []
        with self._each_step(lambda result: (made.append(result[0]), watch(len(made)))):
            watch(0)
            output = self.own_call(sample, "latent" if self.toy.gives_latents else self.toy.finished)
        if isinstance(output, torch.Tensor) and self.toy.gives_latents:
            return output
        return made[-1][:1]  # DiT holds every sample twice; take the half that becomes the image

    def image(self, sample: Sample, watch: Callable[[int], None] = lambda step: None) -> torch.Tensor:
        """The pipeline's finished image, shape (1, ...). `watch` is called with 0 before it."""
        watch(0)
        output = self.own_call(sample, self.toy.finished)
        if isinstance(output, torch.Tensor):
            return output
        return torch.from_numpy(output).movedim(-1, -3)

    def steps_taken(self, sample: Sample) -> int:
        taken: list[int] = []
        self.final_latent(sample, taken.append)
        return taken[-1]

    @contextmanager
    def _each_step(self, then: Callable[[Any], Any]) -> Iterator[None]:
        kind = type(self.pipe.scheduler)
        original = kind.step

        @functools.wraps(original)  # pipelines look at its signature
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scheduler, *args, **kwargs)
            if scheduler is self.pipe.scheduler:  # and not its copy for a sound track
                then(result)
            return result

        with patch.object(kind, "step", step):
            yield

    def slope(self, moves: Moves, vector: int, step: int | None = None) -> float:
        """(<v, x_0(W + a dW)> - <v, x_0(W - a dW)>) / 2a for the first sample; x_0 is the image if that is studied.

        Args:
            moves: dW of each parameter that moves.
            vector: index of the probe vector v.
            step: move the parameters only while the scheduler has taken this many steps; None means throughout.
        """
        ends = [self._projected(moves, sign * _AMOUNT, vector, step) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * _AMOUNT)

    def _projected(self, moves: Moves, amount: float, vector: int, step: int | None) -> float:
        before = {parameter: parameter.data for parameter in moves}

        def move(taken: int) -> None:
            here = amount if step in (None, taken) else 0.0
            for parameter, change in moves.items():
                parameter.data = before[parameter] + here * change

        try:
            signal = (self.image if self.trajectories.draws else self.final_latent)(self.samples[0], move)
        finally:
            for parameter, data in before.items():
                parameter.data = data
        return float((Random(vector).vector(signal, self.samples[0]).double() * signal.double()).sum())

    def weight_change(self, name: str, format: Format) -> torch.Tensor:
        """Q(W) - W, float64."""
        weight = self.layers[name].weight.data
        stored = format.dequantize(format.quantize(weight.half()), weight.shape, torch.float32)
        return stored.double() - weight.double()

    def bias_change(self, name: str, format: Format, mean_input: torch.Tensor) -> torch.Tensor:
        """-(Q(W) - W) E[x], summed for each output over its inputs."""
        change, groups = self.weight_change(name, format), getattr(self.layers[name], "groups", 1)
        inputs = mean_input.double().unflatten(0, (groups, -1)).repeat_interleave(len(change) // groups, 0)
        return -(change * inputs).flatten(1).sum(1)


def subject_of(
    toy: Toy, dtype: torch.dtype = torch.float32, scheduler: Any = None, components: str | None = None, **call: Any
) -> Subject:
    """A new pipeline of this toy, with float16 values as weights."""
    pipe: Any = toy.new()
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {**toy.call, **call}
    target = Target.chosen(pipe, asked_components(components))
    to_storage(target, torch.float16)
    if dtype != torch.float32:
        pipe.to(dtype)
    extra = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in toy.extra.items()}
    samples = [Sample(text, 11 + i, extra) for i, text in enumerate(REQUESTS[toy.takes])]
    return Subject(toy, pipe, call, Trajectories(pipe, target.names, call), tuple(samples))


def made_up_means(subject: Subject) -> dict[str, torch.Tensor]:
    """A random mean input for every layer, which determines the corrected bias whatever the pipeline does."""
    draw = torch.Generator().manual_seed(7)
    shapes = {
        name: (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
        for name, layer in subject.layers.items()
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
