"""Learns from short runs how to call a pipeline, without assumptions about its class.

The signature names the arguments. Short runs show which values they take, which outputs the pipeline offers, and how
many samples come out. Runs have two steps if the pipeline takes a number of steps. There is one plain run, one that
requests the final latent and, for small models, runs of two samples, each alone and both in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.sensitivity.calls.caller import Caller
from bitpolicy.sensitivity.calls.example_request import example_line
from bitpolicy.sensitivity.calls.form import Form, Writing, writings
from bitpolicy.sensitivity.calls.outputs import drawn, in_range, rows
from bitpolicy.sensitivity.samples import Sample

REFUSALS = Exception  # pipelines raise anything, even a bare Exception for an output type
_IMAGE_DIMS = 4  # of a batch; a video has more, and gains nothing from sharing a call
_PLAIN: dict[str, Any] = {}
_FLOATS, _ARRAY, _LATENT = ({"output_type": name} for name in ("pt", "np", "latent"))


class Rehearsal:
    """Short runs of one pipeline.

    Args:
        caller: calls the pipeline.
        sample: what to draw.
        dtype: the models' compute dtype.
    """

    def __init__(self, caller: Caller, sample: Sample, dtype: torch.dtype) -> None:
        self._caller, self._sample, self._dtype = caller, sample, dtype
        self._whole = False  # whether runs need their full length, because two steps fail
        self._asks = "output_type" in caller.signature

    def form(self, may_share: bool) -> Form:
        """How the pipeline is called.

        Args:
            may_share: whether samples may share a call at all; if not, no run tests it.

        Raises:
            BitPolicyError: the pipeline refuses the plain call.
        """
        form, images = self._plain()
        form = replace(form, latent=self._latent(form.writing, images))
        return replace(form, shares=may_share and not self._sample.arguments and self._shares(form))

    def _plain(self) -> tuple[Form, list[torch.Tensor]]:
        """The first form that the pipeline accepts, and the images it gives. Some autoencoders decode tiles only."""
        try:
            return self._accepted()
        except BitPolicyError as error:
            if not isinstance(error.__cause__, NotImplementedError) or not self._enable_tiling():
                raise
        return self._accepted()

    def _enable_tiling(self) -> bool:
        """Let the autoencoders work on tiles; whether any of them did not do so before."""
        whole = [part for part in self._caller.pipe.components.values() if getattr(part, "use_tiling", None) is False]
        for autoencoder in whole:
            autoencoder.enable_tiling()
        return bool(whole)

    def _accepted(self) -> tuple[Form, list[torch.Tensor]]:
        refusals: list[Exception] = []
        for self._whole in (False, True):
            refusals.clear()
            for writing in writings(self._caller.signature):
                try:
                    return self._finished(writing)
                except REFUSALS as error:
                    if not is_refusal(error):
                        raise
                    refusals.append(error)
        raise refused(self._caller, refusals[0]) from refusals[0]

    def _finished(self, writing: Writing) -> tuple[Form, list[torch.Tensor]]:
        """The form of finished images, and the images. Floats in [0, 1] are best, then other floats, then 8 bits."""
        if not self._asks:
            return Form(writing, _PLAIN), self._drawn(writing, _PLAIN)
        floats = self._tried(writing, _FLOATS)
        if floats is not None and all(map(in_range, floats)):
            return Form(writing, _FLOATS), floats
        array = self._tried(writing, _ARRAY)
        if array is not None and (floats is None or all(map(in_range, array))):
            return Form(writing, _ARRAY), array
        if floats is not None:
            return Form(writing, _FLOATS), floats
        return Form(writing, _PLAIN), self._drawn(writing, _PLAIN)

    def _drawn(self, writing: Writing, asked: Mapping[str, Any]) -> list[torch.Tensor]:
        return drawn(self._caller.trial([self._sample], writing, asked, whole=self._whole), 1)

    def _tried(self, writing: Writing, asked: Mapping[str, Any]) -> list[torch.Tensor] | None:
        """The images; None if the pipeline refuses to return them in this form."""
        try:
            return self._drawn(writing, asked)
        except REFUSALS as error:
            if not is_refusal(error):
                raise
            return None

    def _latent(self, writing: Writing, images: list[torch.Tensor]) -> Mapping[str, Any] | None:
        """The arguments that select the latent; None if they fail or have no effect, as some pipelines ignore them."""
        if not self._asks:
            return None
        try:
            found = self._caller.trial([self._sample], writing, _LATENT, whole=self._whole)
        except REFUSALS as error:
            if not is_refusal(error):
                raise
            return None
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            return None
        return None if _same(found, torch.stack(images)) and not _same(found, self._caller.loop.last) else _LATENT

    def _shares(self, form: Form) -> bool:
        """Whether two samples in one call come out as they do alone, with the same noise and the same padding."""
        first, prompt = self._sample, self._sample.prompt
        text = f"{prompt}, {prompt}" if self._caller.signature.takes_text else prompt
        second = replace(first, prompt=text, seed=first.seed ^ 1)
        try:
            found = [self._last_rows(1) if self._caller.loop.steps else self._last(form, [first])]
            found += [self._last(form, [second]), self._last(form, [first, second])]
        except REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return False
        *alone, together = known
        wanted = torch.cat(alone)
        return wanted.shape == together.shape and self._close(together, wanted)

    def _last(self, form: Form, samples: Sequence[Sample]) -> torch.Tensor | None:
        asked = form.finished if form.latent is None else form.latent
        self._caller.trial(samples, form.writing, asked, whole=self._whole)
        return self._last_rows(len(samples))

    def _last_rows(self, count: int) -> torch.Tensor | None:
        """The last step's result, one row per sample; None for a video, or if the loop takes no scheduler steps."""
        loop = self._caller.loop
        if not loop.steps or len(loop.last) not in (count, 2 * count) or loop.last.dim() > _IMAGE_DIMS:
            return None
        return rows(loop.last, count)

    def _close(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Whether the two differ by no more than rounding explains, which is far less than other noise would."""
        error = (found.double() - wanted.double()).flatten(1).norm(dim=1)
        rounding = max(torch.finfo(self._dtype).eps, torch.finfo(torch.float32).eps)
        return bool((error <= rounding**0.5 * wanted.double().flatten(1).norm(dim=1)).all())


def is_refusal(error: Exception) -> bool:
    """Whether the pipeline refused the call, as opposed to an error of our own or a lack of memory."""
    return not isinstance(error, BitPolicyError | torch.OutOfMemoryError)


def refused(caller: Caller, error: Exception) -> BitPolicyError:
    """An error with the pipeline's own message on one line, and where to give missing arguments, with an example."""
    said = " ".join(str(error).split()) or type(error).__name__
    return BitPolicyError(
        f"{caller.signature.pipeline} refused the call: {said}; give other arguments than a prompt in --prompts "
        f"FILE.jsonl, one JSON object of call arguments per line: {example_line(caller.signature, caller.call, error)}"
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float().cpu(), other.float().cpu())
