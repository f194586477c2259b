"""Run a pipeline's own sampling loop: finished images, final latents, or a differentiable latent.

No sampler code is needed: `type(pipe).__call__` is the loop, with whatever scheduler the pipeline has, and the function
that diffusers' `torch.no_grad` decorator wraps is differentiable end to end. What is studied is the *signal*: the
latents that the pipeline returns; where it returns none (DDIM, DDPM and DiT decode at once), the sample that the last
scheduler step gives, and the loop is left there. Where an autoencoder is studied it is the image instead.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import packed_layers, quantizable_layers
from bitpolicy.policies.denoiser import denoiser_of, denoisers_in, is_autoencoder, loop_denoisers, outside_loop
from bitpolicy.sensitivity.compute_range import advice
from bitpolicy.sensitivity.decoding import Decoded, Decoding, replaced_method
from bitpolicy.sensitivity.samples import Sample

_OURS = re.compile(r"prompt|class_labels|batch_size|generator|output_type|return_dict|latents|num_\w+_per_prompt")
_ONE_EACH = re.compile(r"(negative_)?prompt(_\d)?")  # texts of which a call takes one for each sample
_SMALL, _SMALL_BATCH = 100_000_000, 4  # parameters below which several samples share one call, and how many
_REFUSALS = (TypeError, ValueError, AttributeError, KeyError, NotImplementedError)


class LoopError(BitPolicyError):
    """The sampling loop cannot be differentiated from end to end."""


class _Finished(BaseException):
    """Leaves a sampling loop after its last step."""


class _NotFinite(Exception):
    """A scheduler step gave NaN or Inf."""


@dataclass(frozen=True)
class _End:
    """How a loop ended.

    Attributes:
        arguments: of the sample; they may set the number of steps.
        steps: scheduler steps of the whole loop.
        leave_after: the same where the pipeline returns no latents, 0 where it does.
        decodes: calls of the autoencoder's `decode`, where it is studied.
    """

    arguments: Mapping[str, Any]
    steps: int
    leave_after: int
    decodes: int = 0

    def holds_for(self, sample: Sample) -> bool:
        return self.arguments is sample.arguments or not (self.arguments or sample.arguments)


class Trajectories:
    """The sampling loop of one pipeline with fixed call arguments.

    Attributes:
        pipe: the pipeline; its models may be changed between runs, and the change shows.
        denoiser: the module under study; an `nn.ModuleDict` where there are several.
        denoisers: the models whose calls make up the trajectory, studied or not.
        outside: what is studied and called before the loop or after it: text encoders, the autoencoder; by name.
        draws: whether the autoencoder is studied, and so the signal is the image.
        call: arguments of every pipeline call, e.g. {"num_inference_steps": 20}.
        steps: number of scheduler steps of the last run, those of the current run so far.
        batch: how many samples share one call where no gradient is wanted.
    """

    def __init__(self, pipe: DiffusionPipeline, component: str, call: Mapping[str, Any]) -> None:
        self.pipe, self.call = pipe, dict(call)
        self.denoiser: nn.Module = denoiser_of(pipe, component)
        self.denoisers = loop_denoisers(pipe, component)
        self.outside = outside_loop(pipe, component)
        self._decoding = self._watch_autoencoder()
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        self.require(self.call)
        self.steps = 0
        self._last = torch.empty(0)
        self._end: _End | None = None  # of the last run that came to it
        self.batch = _SMALL_BATCH if self._may_share_calls() else 1
        pipe.set_progress_bar_config(disable=True)

    def _watch_autoencoder(self) -> Decoding | None:
        found = {name: model for name, model in self.outside.items() if is_autoencoder(model)}
        if len(found) > 1:
            raise BitPolicyError(f"{' and '.join(found)} each make something of a latent; name one of them only")
        return next((Decoding(model, lambda: self.steps) for model in found.values()), None)

    @property
    def draws(self) -> bool:
        return self._decoding is not None

    @property
    def studied_denoisers(self) -> list[nn.Module]:
        """Those of `denoisers` that are under study."""
        parts = denoisers_in(self.denoiser)
        return [model for model in self.denoisers if any(model is part for part in parts)]

    @property
    def outside_layers(self) -> dict[str, str]:
        """Layer name -> component, of the studied layers outside the loop."""
        prefixes = {name: "" if model is self.denoiser else f"{name}." for name, model in self.outside.items()}
        return {
            f"{prefixes[owner]}{name}": owner
            for owner, model in self.outside.items()
            for name, _ in quantizable_layers(model)
        }

    def _may_share_calls(self) -> bool:
        """Small models gain by it; but noise that the loop draws has to come from each sample's own generator."""
        small = sum(p.numel() for model in self.denoisers for p in model.parameters()) < _SMALL
        own_noise = hasattr(self.pipe, "prepare_extra_step_kwargs") or "batch_size" in self._accepted
        return small and own_noise and "num_frames" not in self._accepted  # frames are a batch of their own

    def require(self, arguments: Iterable[str]) -> None:
        """Check the names of call arguments.

        Raises:
            BitPolicyError: the pipeline takes none of that name, or it is set here.
        """
        names = list(arguments)
        unknown = [name for name in names if name not in self._accepted]
        if unknown:
            raise BitPolicyError(f"{self._class} does not take {', '.join(unknown)}; leave it out")
        ours = [name for name in names if _OURS.fullmatch(name)]
        if ours:
            raise BitPolicyError(f"{', '.join(ours)} cannot be given: every sample sets its own; leave it out")

    def images(self, samples: Iterable[Sample]) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """(decoded image, final latent) of each sample without gradients; `batch` samples share one pipeline call.

        Yields:
            image float32 on the CPU, shape (C, H, W), for a video (frames, C, H, W), in [0, 1], not rounded to 8 bits;
            latent float32 on the CPU, shape (C, h, w) or as the pipeline has it, scaled as the denoiser sees it.
        """
        for image, latent, _ in self._drawn(samples):
            yield image, latent

    def images_and_signals(self, samples: Iterable[Sample]) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """(decoded image, signal) of each sample; as `images` and `signals`."""
        for image, latent, decoded in self._drawn(samples):
            yield image, latent if decoded is None else decoded

    def signals(self, samples: Iterable[Sample]) -> Generator[torch.Tensor, None, None]:
        """What errors are errors of, of each sample, without gradients, float32 on the CPU: the final latent; where an
        autoencoder is studied, the image in [0, 1]."""
        if not self.draws:
            yield from self.latents(samples)
            return
        for _, _, decoded in self._drawn(samples):
            assert decoded is not None
            yield decoded

    def _drawn(
        self, samples: Iterable[Sample]
    ) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], None, None]:
        """Image, latent, and what was decoded where that is watched, of each sample."""
        for part in self.parts(samples):
            pixels = _pixels(self._run(part, "pt"))
            if not torch.isfinite(pixels).all():
                raise self._overflow(part)
            latents = _rows(self._last, len(part)).float().cpu()
            yield from zip(pixels.float().cpu(), latents, self._decoded(part), strict=True)

    def _decoded(self, part: Sequence[Sample]) -> Sequence[torch.Tensor | None]:
        """What was decoded in the last run, for each sample of it; None of each where that is not watched."""
        if self._decoding is None:
            return [None] * len(part)
        self._end = _End(part[0].arguments, self.steps, 0, self._decoding.calls)
        images = _rows(self._decoding.images(), len(part))
        if not torch.isfinite(images).all():
            raise self._overflow(part)
        return list(images.float().cpu())

    def _overflow(self, part: Sequence[Sample]) -> BitPolicyError:
        return BitPolicyError(
            f"the decoded image of {part[0].prompt!r}, seed {part[0].seed}, has NaN or Inf, its latent has "
            f"none: the decoder overflows; {advice(next(self.denoiser.parameters()).dtype)}"
        )

    def latents(self, samples: Iterable[Sample]) -> Generator[torch.Tensor, None, None]:
        """The final latent of each sample without gradients, float32 on the CPU, shape (C, h, w) or as the pipeline
        has it."""
        for part in self.parts(samples):
            output = self._run(part, "latent")
            returned = isinstance(output, torch.Tensor)
            if not self.draws:
                self._end = _End(part[0].arguments, self.steps, 0 if returned else self.steps)
            yield from (output if returned else _rows(self._last, len(part))).float().cpu()

    def differentiable_signal(self, sample: Sample) -> torch.Tensor:
        """The signal with its graph, shape (1, ...), in the compute dtype.

        Raises:
            LoopError: the pipeline's loop cannot be differentiated.
        """
        end = self.end(sample)
        undecorated: Callable[..., Any] = inspect.unwrap(type(self.pipe).__call__)
        output_type = "pt" if self.draws else "latent"
        with self._observed(sample.seed, end.leave_after, end.decodes), self._encoding(), torch.enable_grad():
            try:
                signal = _first(undecorated(self.pipe, **self._arguments([sample]), output_type=output_type))
            except _Finished:
                signal = _rows(self._last, 1)
            except Decoded:
                assert self._decoding is not None
                signal = _rows(self._decoding.images(), 1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch's word for in-place changes and for numpy() on a graph
                raise LoopError(f"the sampling loop of {self._class} cannot be differentiated: {error}") from error
        self._last = torch.empty(0)  # it would keep the graph
        if not signal.requires_grad:
            raise LoopError(f"the sampling loop of {self._class} detaches its result")
        return signal

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """While the block runs, `encode_prompt` passes gradients on: some pipelines decorate it like `__call__`."""
        decorated = getattr(type(self.pipe), "encode_prompt", None)
        undecorated = inspect.unwrap(decorated) if decorated else None
        if not self.outside or undecorated is decorated:
            yield
            return
        assert undecorated is not None
        with replaced_method(self.pipe, "encode_prompt", lambda _: undecorated.__get__(self.pipe)):
            yield

    def end(self, sample: Sample) -> _End:
        """How the loop ends for `sample`; takes a run without gradients where that is not known yet."""
        if self._end is None or not self._end.holds_for(sample):
            next(self.signals([sample]))
        assert self._end is not None
        return self._end

    @property
    def _class(self) -> str:
        return type(self.pipe).__name__

    def parts(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """What shares a pipeline call: up to `batch` samples; one with arguments of its own stays alone."""
        waiting = iter(samples)
        while part := list(itertools.islice(waiting, self.batch)):
            yield from [[sample] for sample in part] if any(sample.arguments for sample in part) else [part]

    def _run(self, part: Sequence[Sample], output_type: str) -> Any:
        """The pipeline's images, frames or latents for `part`, without a graph."""
        try:
            with self._observed(part[0].seed), torch.no_grad():
                return _first(self.pipe(**self._arguments(part), output_type=output_type))
        except _NotFinite:
            raise self._located(part, output_type) from None
        except BitPolicyError:
            raise
        except _REFUSALS as error:
            if self.steps:  # the loop had begun: the pipeline took the call
                raise
            raise BitPolicyError(
                f"{self._class} refused the call: {' '.join(str(error).split())}; what it needs beyond a prompt can be "
                'given in --prompts FILE.jsonl, one JSON object of call arguments a line: {"prompt": ..., "image": ...}'
            ) from error

    def _located(self, part: Sequence[Sample], output_type: str) -> BitPolicyError:
        """Which layer is the first to give NaN or Inf: run again and look at each."""
        found: list[tuple[int, str]] = []

        def look(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
                if not found and not torch.isfinite(output).all():
                    found.append((self.steps, name))

            return hook

        layers = itertools.chain(quantizable_layers(self.denoiser), packed_layers(self.denoiser))
        handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
        try:
            with self._observed(part[0].seed), torch.no_grad():
                self.pipe(**self._arguments(part), output_type=output_type)
        except _NotFinite:
            pass  # found as before, with the layer's name now
        finally:
            for handle in handles:
                handle.remove()
        step, where = found[0] if found else (self.steps - 1, "the scheduler, not a layer,")
        return BitPolicyError(
            f"step {step + 1}: {where} gives NaN or Inf for {part[0].prompt!r}, seed {part[0].seed}; "
            f"{advice(next(self.denoiser.parameters()).dtype)}"
        )

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        count = len(samples)
        own = samples[0].call_arguments() if count == 1 else {}
        arguments = {
            name: [value] * count if isinstance(value, str) and _ONE_EACH.fullmatch(name) else value
            for name, value in {**self.call, **own}.items()
        }
        generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in samples]
        if "generator" in self._accepted:
            arguments["generator"] = generators if count > 1 else generators[0]
        if "class_labels" in self._accepted:
            arguments["class_labels"] = [self._label(sample.prompt) for sample in samples]
        elif "prompt" in self._accepted and "prompt_embeds" not in samples[0].arguments:
            arguments["prompt"] = [sample.prompt for sample in samples]
        elif "batch_size" in self._accepted:
            arguments["batch_size"] = count
        return arguments

    def _label(self, prompt: str) -> int:
        """A class label from its digits, or from a class name where the pipeline knows names."""
        config: Any = self.denoisers[0].config
        classes = int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)
        if prompt.isdigit() and (not classes or int(prompt) < classes):
            return int(prompt)
        try:
            return int(self.pipe.get_label_ids([prompt])[0])
        except (AttributeError, ValueError) as error:
            raise BitPolicyError(
                f"{prompt!r} is no class of {self._class}; give a label from 0 to {classes - 1}, or a class's name"
            ) from error

    @contextmanager
    def _observed(self, seed: int, leave_after: int = 0, decodes: int = 0) -> Iterator[None]:
        """Count the scheduler's steps and remember the sample that the last one made, with its graph if it has one;
        watch the autoencoder where it is studied.

        The scheduler is afterwards as it was: its history would keep the graph of a whole trajectory alive.

        Args:
            seed: of random numbers that the pipeline does not take from its generator.
            leave_after: raise `_Finished` after so many steps; 0 never does.
            decodes: raise `Decoded` after so many images; 0 never does.
        """
        scheduler: Any = self.pipe.scheduler
        before, original = dict(vars(scheduler)), scheduler.step
        self.steps, self._last = 0, torch.empty(0)

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.steps += 1
            self._last = result[0]
            if not torch.isfinite(self._last).all():
                raise _NotFinite
            if self.steps == leave_after:
                raise _Finished
            return result

        scheduler.step = step
        try:
            with ExitStack() as stack:
                if self._decoding is not None:
                    stack.enter_context(self._decoding.watched(decodes))
                stack.enter_context(torch.random.fork_rng())
                torch.manual_seed(seed)
                yield
        finally:
            vars(scheduler).clear()
            vars(scheduler).update(before)


def _rows(sample: torch.Tensor, count: int) -> torch.Tensor:
    """A scheduler's sample with one row for each of `count` trajectories."""
    if len(sample) == 2 * count and torch.equal(sample[:count], sample[count:]):
        return sample[:count]  # DiT carries every sample twice, for guidance
    return sample if len(sample) == count else sample.unflatten(0, (count, -1))  # video U-Nets: frames in the batch


def _pixels(output: Any) -> torch.Tensor:
    """Images as (B, C, H, W), videos as (B, frames, C, H, W), from what a pipeline gives for "pt"."""
    if isinstance(output, np.ndarray):  # DDIM, DDPM, DiT: channels last
        output = torch.from_numpy(output).movedim(-1, -3)
    return output if isinstance(output, torch.Tensor) else torch.stack(list(output))


def _first(output: Any) -> Any:
    """The images, frames or latents of a pipeline's output."""
    return output[0]
