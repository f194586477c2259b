"""The peak memory of one pipeline call under any policy, predicted from one call of the unquantized pipeline.

A policy changes two things: what stays in memory all the time, and what a packed layer needs while it multiplies. The
latter is its dequantized weight and, before that, the temporaries of dequantizing. Let A be the peak bytes of
activations in a call where nothing is packed, B_l the bytes that are live when layer l is called, and I_l the peak
bytes while it computes. Then

    peak(f) = resident(f) + max(A, max over packed layers l of max(B_l + unpacking(f_l), I_l + weight_l)).

If a kernel dequantizes into memory that stays reserved between calls, the largest weight is there all the time:

    peak(f) = resident(f) + A + max over packed layers l of weight_l.

Bytes are torch's own count of its allocations, so temporaries inside an operator count as well: on the CPU, a
convolution holds its input and its output twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from bitpolicy.kernels.dispatch import scratch_kept
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.kernels.kernel import PackedWeight
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.footprint import Meter, Span, loaded_bytes, metered
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerCall:
    """The peak bytes of activations over the calls of one unquantized layer: when it is called, and during the call."""

    before: int
    inside: int


@dataclass(frozen=True)
class Room:
    """The bytes reserved for activations, and the choices that would need more.

    Attributes:
        activations: bytes.
        barred: (layer name, format) pairs. Every policy without them needs at most `activations`.
    """

    activations: int
    barred: frozenset[tuple[str, Format]]


@dataclass(frozen=True)
class PeakMemory:
    """The peak memory of one pipeline at one image size, batch size and compute dtype.

    Attributes:
        account: the target's bytes in memory: packed layers as stored, the rest in the compute dtype.
        others: bytes in memory of the pipeline's other models.
        unpacked: the peak bytes of activations in the whole call, decoding included, with every layer at FP16.
        calls: the target's layers that are called, by name.
        unpacking: the peak bytes while a weight of this shape is dequantized from this format.
        kept: of these, the bytes that stay reserved afterwards.
        height, width: of the image, in pixels.
        batch_size: images or videos per call.
        device: where it was measured, "cpu" or "cuda".
    """

    account: ByteAccount
    others: int
    unpacked: int
    calls: Mapping[str, LayerCall]
    unpacking: Mapping[tuple[Format, Shape], int]
    height: int
    width: int
    batch_size: int
    device: str
    kept: Mapping[tuple[Format, Shape], int] = field(default_factory=dict)

    def peak(self, formats: Mapping[str, Format]) -> int:
        """The peak bytes when each layer has the given format."""
        return self.others + self.account.total(formats) + self.activations(formats)

    def activations(self, formats: Mapping[str, Format]) -> int:
        """The part of the peak that is not stored weights. It includes dequantized weights."""
        return max(self.needed(name, formats[name]) for name in self.account.shapes)

    @property
    def reference(self) -> int:
        """The peak with every layer at FP16, which `%` is relative to."""
        return self.peak(dict.fromkeys(self.account.shapes, FP16))

    def needed(self, layer: str, format: Format) -> int:
        """The least bytes of activations that a policy needs if it gives this format to this layer."""
        call, shape = self.calls.get(layer), self.account.shapes[layer]
        if call is None or not format.packed:
            return self.unpacked
        if kept := self.kept.get((format, shape)):
            return self.unpacked + kept
        weight = prod(shape) * self.account.storage_dtype.itemsize
        return max(self.unpacked, call.before + self.unpacking[format, shape], call.inside + weight)

    def room(self, candidates: Sequence[Format]) -> Room:
        """The room for activations that allows the smallest possible peak.

        Bytes reserved for activations cannot hold weights, and a format may save less than its dequantizing costs. Each
        bound on the activations bars some choices. The chosen bound is the one under which the smallest policy has the
        least peak.

        Args:
            candidates: the formats that a policy may use, including FP16.
        """
        names = list(self.account.shapes)
        suits = np.array([[f.fits(self.account.shapes[name]) for f in candidates] for name in names])
        needed = np.where(suits, [[self.needed(name, f) for f in candidates] for name in names], np.inf)
        sizes = np.array([[self.account.layer(name, f) for f in candidates] for name in names])
        least = needed.min(axis=1).max()
        bounds = np.unique(needed[(needed >= least) & suits])
        peaks = [bound + np.where(needed <= bound, sizes, np.inf).min(axis=1).sum() for bound in bounds]
        chosen = bounds[len(bounds) - 1 - int(np.argmin(peaks[::-1]))]  # of equal peaks, take the bound that bars least
        over = zip(*np.nonzero((needed > chosen) & suits), strict=True)
        return Room(int(chosen), frozenset((names[layer], candidates[format]) for layer, format in over))


def observe(
    pipe: DiffusionPipeline,
    components: Sequence[str],
    call: Mapping[str, Any],
    sample: Sample,
    candidates: Sequence[Format],
    batch_size: int = 1,
) -> PeakMemory:
    """Call an unquantized pipeline once, and predict the peak of every policy from that call.

    Args:
        pipe: on the device and in the dtype that it will run in.
        components: names of the components to pack.
        call: arguments of the pipeline call, e.g. {"num_inference_steps": 20, "height": 512, "width": 512}.
        sample: what to draw.
        candidates: the formats that a policy may use.
        batch_size: how many times to draw the sample in the call.

    Raises:
        BitPolicyError: the pipeline does not take these arguments, or it is neither on the CPU nor on CUDA.
    """
    trajectories = Trajectories(pipe, components, call)
    trajectories.learn(sample)  # its short runs must not be measured
    resident = loaded_bytes(pipe)
    account = ByteAccount.of(trajectories.target, trajectories.target.dtype)
    with metered(pipe.device) as meter, _marked(trajectories.target, meter):
        image = _draw(trajectories, sample, batch_size)
    return PeakMemory(
        account=account,
        others=resident - account.reference,
        unpacked=max(span.most for span in meter.spans),
        calls=_calls(meter.spans),
        unpacking=unpacking_bytes(account.shapes.values(), candidates, account.storage_dtype, pipe.device),
        kept=kept_bytes(account.shapes.values(), candidates, account.storage_dtype, pipe.device),
        height=image.shape[-2],
        width=image.shape[-1],
        batch_size=batch_size,
        device=pipe.device.type,
    )


def _draw(trajectories: Trajectories, sample: Sample, batch_size: int) -> torch.Tensor:
    """The first of `batch_size` images from one pipeline call, shape (..., H, W)."""
    if batch_size > 1 and sample.arguments:
        raise BitPolicyError(
            f"--batch-size {batch_size}: a request with its own {', '.join(sample.arguments)} is drawn alone; "
            "leave --batch-size out"
        )
    trajectories.batch = batch_size
    images = [image for image, _ in trajectories.images([sample] * batch_size)]
    return images[0]


@contextmanager
def _marked(target: Target, meter: Meter) -> Iterator[None]:
    """While the block runs, each call of a layer is a separate span, labelled with the layer's name."""
    handles = []
    for name, layer in target.layers.items():
        handles += [
            layer.register_forward_pre_hook(_marking(meter, name)),
            layer.register_forward_hook(_marking(meter)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _marking(meter: Meter, label: str = "") -> Callable[..., None]:
    return lambda *_: meter.mark(label)


def _calls(spans: Iterable[Span]) -> dict[str, LayerCall]:
    """The maxima over each layer's calls."""
    calls: dict[str, LayerCall] = {}
    for span in spans:
        if span.label:
            seen = calls.get(span.label, LayerCall(0, 0))
            calls[span.label] = LayerCall(max(seen.before, span.before), max(seen.inside, span.most))
    return calls


def unpacking_bytes(
    shapes: Iterable[Shape], candidates: Iterable[Format], dtype: torch.dtype, device: torch.device
) -> dict[tuple[Format, Shape], int]:
    """The peak bytes while a weight is dequantized, including the weight, measured for each format and shape.

    Args:
        shapes: of weights, (out, in/groups, *kernel).
        candidates: formats that are not packed, or do not fit a shape, are skipped.
        dtype: of the dequantized weight.
    """
    wanted = _packed(shapes, candidates)
    with metered(device) as meter:
        for place, (format, shape) in enumerate(wanted):
            stored = _zeros(format, shape, dtype, device)
            meter.mark(str(place))
            format.dequantize(stored, shape, dtype)
            meter.mark("")
    return {wanted[int(span.label)]: span.most - span.before for span in meter.spans if span.label}


def kept_bytes(
    shapes: Iterable[Shape], candidates: Iterable[Format], dtype: torch.dtype, device: torch.device
) -> dict[tuple[Format, Shape], int]:
    """Bytes that stay reserved after a multiplication with the weight. Arguments as in `unpacking_bytes`."""
    return {
        (format, shape): scratch_kept(PackedWeight(format, shape, _zeros(format, shape, dtype, device)), dtype)
        for format, shape in _packed(shapes, candidates)
    }


def _packed(shapes: Iterable[Shape], candidates: Iterable[Format]) -> list[tuple[Format, Shape]]:
    candidates = list(candidates)
    return [(f, shape) for shape in dict.fromkeys(shapes) for f in candidates if f.packed and f.fits(shape)]


def _zeros(format: Format, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    specs = format.tensors(shape, dtype)
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
