"""Runs a pipeline's own sampling loop, which gives finished images, final latents or a differentiable latent.

No sampler code is needed: `type(pipe).__call__` is the loop, with whatever scheduler the pipeline has, and the function
inside diffusers' `torch.no_grad` decorator is differentiable from end to end.

Errors are errors of the *signal*. It is the latents that the pipeline returns. If it returns none (DDIM, DDPM and DiT
decode at once), it is the sample from the last scheduler step, and the loop is left there. If an autoencoder is
studied, it is the image. The pipeline's signature and short runs show how to call it
(`bitpolicy.sensitivity.calls.rehearsal`).
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

_SMALL, _SMALL_BATCH = 100_000_000, 4  # below this many parameters, this many samples share one call


class LoopError(BitPolicyError):
    """The sampling loop cannot be differentiated from end to end."""


@dataclass(frozen=True)
class _End:
    """How a loop ended.

    Attributes:
        arguments: of the sample; they may set the number of steps.
        steps: scheduler steps of the whole loop.
        leave_after: `steps` if the pipeline returns no latents, else 0.
        decodes: calls of the autoencoder's `decode`, if it is studied.
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
        pipe: the pipeline. Its models may be changed between runs, and the next run uses the change.
        target: the components under study.
        denoisers: the models whose calls make up the trajectory, studied or not.
        outside: the target's components that are called before or after the loop (text encoders, the autoencoder), by
            name.
        draws: whether the autoencoder is studied, so that the signal is the image.
        call: arguments of every pipeline call, e.g. {"num_inference_steps": 20}.
        steps: number of scheduler steps of the last run, or of the current run so far.
        batch: how many samples share one call without gradients.
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
        self._end: _End | None = None  # of the last run that reached its end
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
        """How the pipeline is called. The first time, this takes short runs of `sample`.

        Hooks see these runs, too. Code that counts calls or records the inputs of layers has to call `learn` first.

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
            raise BitPolicyError(f"{' and '.join(found)} are autoencoders; name only one of them in --component")
        return next((Decoding(model, lambda: self.caller.loop.steps) for model in found.values()), None)

    @property
    def draws(self) -> bool:
        return self._decoding is not None

    @property
    def studied_denoisers(self) -> list[nn.Module]:
        """The denoisers that are under study."""
        return [model for model in self.denoisers if any(model is studied for studied in self.target.models)]

    @property
    def outside_layers(self) -> dict[str, str]:
        """Layer name -> component, for the studied layers outside the loop."""
        return {
            f"{self.target.prefix(owner)}{name}": owner
            for owner, model in self.outside.items()
            for name, _ in quantizable_layers(model)
        }

    def require(self, arguments: Mapping[str, Any]) -> None:
        """Check names and values of call arguments.

        Raises:
            BitPolicyError: the pipeline takes no argument of that name, every sample sets it, or its type is wrong.
        """
        self.caller.signature.require(arguments)

    def without_effect(self, sample: Sample, names: Sequence[str]) -> list[str]:
        """The call arguments in `names` that have no effect: the images of `sample` are the same without them."""
        return without_effect(self.caller, self.learn(sample), sample, names)

    def images(self, samples: Iterable[Sample]) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """(decoded image, final latent) of each sample without gradients; `batch` samples share one pipeline call.

        Yields:
            The image, float32 on the CPU, shape (C, H, W), or (frames, C, H, W) for a video, in [0, 1], not rounded to
            8 bits. The latent, float32 on the CPU, shape (C, h, w) or the pipeline's own, scaled as the denoiser sees
            it.
        """
        for image, latent, _ in self._drawn(samples):
            yield image, latent

    def images_and_signals(self, samples: Iterable[Sample]) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """(decoded image, signal) of each sample, as in `images` and `signals`."""
        for image, latent, decoded in self._drawn(samples):
            yield image, latent if decoded is None else decoded

    def signals(self, samples: Iterable[Sample]) -> Generator[torch.Tensor, None, None]:
        """The signal of each sample without gradients, float32 on the CPU.

        It is the final latent or, if an autoencoder is studied, the image in [0, 1].
        """
        if not self.draws:
            yield from self.latents(samples)
            return
        for _, _, decoded in self._drawn(samples):
            assert decoded is not None
            yield decoded

    def _drawn(
        self, samples: Iterable[Sample]
    ) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], None, None]:
        """The image and the latent of each sample, and the decoded image if the autoencoder is studied."""
        for part in self.parts(samples):
            images = drawn(self._run(part, self.learn(part[0]).finished), len(part))
            if not all(torch.isfinite(image).all() for image in images):
                raise self._overflow(part)
            latents = list(rows(self.caller.loop.last, len(part)).float().cpu()) if self.steps else images
            yield from zip(images, latents, self._decoded(part), strict=True)

    def _decoded(self, part: Sequence[Sample]) -> Sequence[torch.Tensor | None]:
        """The images decoded in the last run, one per sample; all None if the autoencoder is not studied."""
        if self._decoding is None:
            return [None] * len(part)
        self._end = _End(part[0].arguments, self.steps, 0, self._decoding.calls)
        images = rows(self._decoding.images(), len(part))
        if not torch.isfinite(images).all():
            raise self._overflow(part)
        return list(images.float().cpu())

    def _overflow(self, part: Sequence[Sample]) -> BitPolicyError:
        return BitPolicyError(
            f"the decoded image of {part[0].prompt!r}, seed {part[0].seed}, has NaN or Inf, but its latent has "
            f"none, so the decoder overflows; {advice(self.target.dtype)}"
        )

    def latents(self, samples: Iterable[Sample]) -> Generator[torch.Tensor, None, None]:
        """The final latent of each sample without gradients, float32 on the CPU, shape (C, h, w) or the pipeline's."""
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
            except REFUSALS as error:  # in-place changes, numpy() on a graph, attention that is kept only with a graph
                if not is_refusal(error) or isinstance(error, NotFinite):
                    raise
                raise LoopError(f"the sampling loop of {self._class} cannot be differentiated: {error}") from error
        self.caller.loop.forget()
        if not isinstance(signal, torch.Tensor):
            raise LoopError(f"the sampling loop of {self._class} does not return a tensor")
        if not signal.requires_grad:
            raise LoopError(f"the sampling loop of {self._class} detaches its result")
        return signal

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """While the block runs, `encode_prompt` lets gradients pass; some pipelines decorate it like `__call__`."""
        decorated = getattr(type(self.pipe), "encode_prompt", None)
        undecorated = inspect.unwrap(decorated) if decorated else None
        if not self.outside or undecorated is decorated:
            yield
            return
        assert undecorated is not None
        with replaced_method(self.pipe, "encode_prompt", lambda _: undecorated.__get__(self.pipe)):
            yield

    def end(self, sample: Sample) -> _End:
        """How the loop ends for `sample`. This takes a run without gradients if it is not known yet."""
        if self._end is None or not self._end.holds_for(sample):
            next(self.signals([sample]))
        assert self._end is not None
        return self._end

    @property
    def _class(self) -> str:
        return type(self.pipe).__name__

    def parts(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """The samples of each pipeline call: up to `batch` of them, or a single one if any has its own arguments."""
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
            raise refused(self.caller, error) from error

    def _located(self, part: Sequence[Sample], asked: Mapping[str, Any]) -> BitPolicyError:
        """An error that names the first layer to give NaN or Inf. It runs the part again and checks each layer."""
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
            pass  # now the layer is known
        finally:
            for handle in handles:
                handle.remove()
        step, where = found[0] if found else (self.steps - 1, "the scheduler, not a layer,")
        return BitPolicyError(
            f"step {step + 1}: {where} gives NaN or Inf for {part[0].prompt!r}, seed {part[0].seed}; "
            f"{advice(self.target.dtype)}"
        )
