"""Run a pipeline's own sampling loop: finished images, final latents, or a differentiable latent.

No sampler code is needed: `type(pipe).__call__` is the loop, with whatever scheduler the pipeline has, and the function
that diffusers' `torch.no_grad` decorator wraps is differentiable end to end. What is studied is the *signal*: the
latents that the pipeline returns; where it returns none (DDIM, DDPM and DiT decode at once), the sample that the last
scheduler step gives, and the loop is left there. Where an autoencoder is studied it is the image instead. How the
pipeline is called is learned from its signature and from short runs (`bitpolicy.sensitivity.calls.rehearsal`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import packed_layers, quantizable_layers
from bitpolicy.policies.components import is_autoencoder
from bitpolicy.policies.target import Target, loop_denoisers
from bitpolicy.sensitivity.calls.caller import Caller
from bitpolicy.sensitivity.calls.effects import without_effect
from bitpolicy.sensitivity.calls.form import Form
from bitpolicy.sensitivity.calls.outputs import drawn, rows
from bitpolicy.sensitivity.calls.rehearsal import REFUSALS, Rehearsal, is_refusal, refused
from bitpolicy.sensitivity.calls.watched_loop import Finished, NotFinite
from bitpolicy.sensitivity.probes.compute_range import advice
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.decoding import Decoded, Decoding, replaced_method

_SMALL, _SMALL_BATCH = 100_000_000, 4  # parameters below which several samples share one call, and how many


class LoopError(BitPolicyError):
    """The sampling loop cannot be differentiated from end to end."""


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
        target: the components under study.
        denoisers: the models whose calls make up the trajectory, studied or not.
        outside: what of the target is called before the loop or after it: text encoders, the autoencoder; by name.
        draws: whether the autoencoder is studied, and so the signal is the image.
        call: arguments of every pipeline call, e.g. {"num_inference_steps": 20}.
        steps: number of scheduler steps of the last run, those of the current run so far.
        batch: how many samples share one call where no gradient is wanted.
    """

    def __init__(self, pipe: DiffusionPipeline, components: Sequence[str], call: Mapping[str, Any]) -> None:
        self.pipe, self.call = pipe, dict(call)
        self.target = Target.of(pipe, components)
        self.denoisers = loop_denoisers(pipe, self.target)
        self.outside = self.target.outside_loop
        self._decoding = self._watch_autoencoder()
        self.caller = Caller(pipe, self.call, self._decoding)
        self.require(self.call)
        self._form: Form | None = None
        self._end: _End | None = None  # of the last run that came to it
        self._batch: int | None = None
        self._small = sum(p.numel() for model in self.denoisers for p in model.parameters()) < _SMALL
        pipe.set_progress_bar_config(disable=True)

    @property
    def steps(self) -> int:
        return self.caller.loop.steps

    @property
    def batch(self) -> int:
        if self._batch is not None:
            return self._batch
        return _SMALL_BATCH if self._form is not None and self._form.shares else 1

    @batch.setter
    def batch(self, count: int) -> None:
        self._batch = count

    def learn(self, sample: Sample) -> Form:
        """How the pipeline is called; the first time it takes short runs of `sample`. Hooks see them, too: who counts
        calls, or looks at what layers are given, lets it learn before.

        Raises:
            BitPolicyError: the pipeline refuses the call.
        """
        if self._form is None:
            dtype = next(self.denoisers[0].parameters()).dtype
            self._form = Rehearsal(self.caller, sample, dtype).form(self._small and self._batch is None)
        return self._form

    def _watch_autoencoder(self) -> Decoding | None:
        found = {name: model for name, model in self.outside.items() if is_autoencoder(model)}
        if len(found) > 1:
            raise BitPolicyError(f"{' and '.join(found)} each make something of a latent; name one of them only")
        return next((Decoding(model, lambda: self.caller.loop.steps) for model in found.values()), None)

    @property
    def draws(self) -> bool:
        return self._decoding is not None

    @property
    def studied_denoisers(self) -> list[nn.Module]:
        """Those of `denoisers` that are under study."""
        return [model for model in self.denoisers if any(model is studied for studied in self.target.models)]

    @property
    def outside_layers(self) -> dict[str, str]:
        """Layer name -> component, of the studied layers outside the loop."""
        return {
            f"{self.target.prefix(owner)}{name}": owner
            for owner, model in self.outside.items()
            for name, _ in quantizable_layers(model)
        }

    def require(self, arguments: Mapping[str, Any]) -> None:
        """Check names and values of call arguments.

        Raises:
            BitPolicyError: the pipeline takes none of that name, it is set here, or the value is of a wrong type.
        """
        self.caller.signature.require(arguments)

    def without_effect(self, sample: Sample, names: Sequence[str]) -> list[str]:
        """Which of the call arguments `names` change nothing: the images of `sample` are the same without them."""
        return without_effect(self.caller, self.learn(sample), sample, names)

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
            images = drawn(self._run(part, self.learn(part[0]).finished), len(part))
            if not all(torch.isfinite(image).all() for image in images):
                raise self._overflow(part)
            latents = list(rows(self.caller.loop.last, len(part)).float().cpu()) if self.steps else images
            yield from zip(images, latents, self._decoded(part), strict=True)

    def _decoded(self, part: Sequence[Sample]) -> Sequence[torch.Tensor | None]:
        """What was decoded in the last run, for each sample of it; None of each where that is not watched."""
        if self._decoding is None:
            return [None] * len(part)
        self._end = _End(part[0].arguments, self.steps, 0, self._decoding.calls)
        images = rows(self._decoding.images(), len(part))
        if not torch.isfinite(images).all():
            raise self._overflow(part)
        return list(images.float().cpu())

    def _overflow(self, part: Sequence[Sample]) -> BitPolicyError:
        return BitPolicyError(
            f"the decoded image of {part[0].prompt!r}, seed {part[0].seed}, has NaN or Inf, its latent has "
            f"none: the decoder overflows; {advice(self.target.dtype)}"
        )

    def latents(self, samples: Iterable[Sample]) -> Generator[torch.Tensor, None, None]:
        """The final latent of each sample without gradients, float32 on the CPU, shape (C, h, w) or as the pipeline
        has it."""
        for part in self.parts(samples):
            yield from self._latents(part).float().cpu()

    def _latents(self, part: Sequence[Sample]) -> torch.Tensor:
        form, end = self.learn(part[0]), self._end
        leave_after = end.leave_after if end is not None and end.holds_for(part[0]) else 0
        try:
            found = self._run(part, form.finished if form.latent is None else form.latent, leave_after)
        except Finished:
            return rows(self.caller.loop.last, len(part))
        if not self.draws:
            self._end = _End(part[0].arguments, self.steps, self.steps if form.latent is None else 0)
        if form.latent is not None:
            return rows(found, len(part))
        return rows(self.caller.loop.last, len(part)) if self.steps else torch.stack(drawn(found, len(part)))

    def differentiable_signal(self, sample: Sample) -> torch.Tensor:
        """The signal with its graph, shape (1, ...), in the compute dtype.

        Raises:
            LoopError: the pipeline's loop cannot be differentiated.
        """
        end, form = self.end(sample), self.learn(sample)
        asked = form.finished if self.draws or form.latent is None else form.latent
        with self._encoding():
            try:
                signal = self.caller.run_with_graph(sample, form.writing, asked, end.leave_after, end.decodes)
            except Finished:
                signal = rows(self.caller.loop.last, 1)
            except Decoded:
                assert self._decoding is not None
                signal = rows(self._decoding.images(), 1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch's word for in-place changes and for numpy() on a graph
                raise LoopError(f"the sampling loop of {self._class} cannot be differentiated: {error}") from error
        self.caller.loop.forget()
        if not isinstance(signal, torch.Tensor):
            raise LoopError(f"the sampling loop of {self._class} gives no tensor")
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
        for first in itertools.islice(waiting, 1):
            if self._batch is None and self._small:
                self.learn(first)
            waiting = itertools.chain([first], waiting)
        while part := list(itertools.islice(waiting, self.batch)):
            yield from [[sample] for sample in part] if any(sample.arguments for sample in part) else [part]

    def _run(self, part: Sequence[Sample], asked: Mapping[str, Any], leave_after: int = 0) -> Any:
        """The pipeline's images, frames, sounds or latents for `part`, without a graph."""
        writing = self.learn(part[0]).writing
        try:
            return self.caller.run(part, writing, asked, leave_after)
        except NotFinite:
            raise self._located(part, asked) from None
        except REFUSALS as error:
            if self.steps or not is_refusal(error):  # the loop had begun: the pipeline took the call
                raise
            raise refused(self._class, error) from error

    def _located(self, part: Sequence[Sample], asked: Mapping[str, Any]) -> BitPolicyError:
        """Which layer is the first to give NaN or Inf: run again and look at each."""
        found: list[tuple[int, str]] = []

        def look(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
                if not found and not torch.isfinite(output).all():
                    found.append((self.steps, name))

            return hook

        layers = itertools.chain(quantizable_layers(self.target), packed_layers(self.target))
        handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
        try:
            self.caller.run(part, self.learn(part[0]).writing, asked)
        except NotFinite:
            pass  # found as before, with the layer's name now
        finally:
            for handle in handles:
                handle.remove()
        step, where = found[0] if found else (self.steps - 1, "the scheduler, not a layer,")
        return BitPolicyError(
            f"step {step + 1}: {where} gives NaN or Inf for {part[0].prompt!r}, seed {part[0].seed}; "
            f"{advice(self.target.dtype)}"
        )
