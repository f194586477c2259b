"""INT8 activation quantization on the CPU with oneDNN's integer products, for machines without a C++ compiler.

Plain torch code quantizes the inputs and scales the sums. The operators are private to torch (`onednn::`), so they are
tested on a small product first. If they are missing, take other arguments or give a wrong result, this kernel refuses.
They take unsigned bytes; for signed ones oneDNN has only a reference kernel, a hundred times slower. They support only
one zero point per call, so zero points are subtracted with additional channels that all have the value z:

    sum_k (x_q - z) w_q = sum_k x_q w_q + sum_j z v_j,    sum_j v_j = -sum_k w_q
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch.nn.functional import pad

from bitpolicy.kernels.compute.int8 import TOP, input_grid, multiply, quantize_input, shared, weight_codes
from bitpolicy.kernels.kernel import Compute, Geometry, Kernel, PackedWeight, Prepared

_MOST = 127  # largest code of a weight
_LONGEST = 2**16  # weights in a row whose sum fits 32 bits
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class OneDnnInt8(Kernel):
    name = "onednn-int8"
    compute = Compute.INT8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if x.device.type != "cpu":
            return "not on the CPU"
        if x.dtype not in _DTYPES:
            return f"not for {x.dtype}"
        if weight.geometry is not None and weight.geometry.groups != 1:
            return "not for grouped convolutions"
        if weight.row_length >= _LONGEST:
            return f"for rows shorter than {_LONGEST}"
        return _unusable()

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        return {} if weight.low_memory else _packed(weight)

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        if not x.numel():
            return multiply(x, x.new_empty(weight.shape), weight.geometry, bias)
        layout = prepared or _packed(weight)
        dims = shared(x.ndim, weight.shape, weight.geometry)
        zero, (steps, scale) = input_grid(x, dims)[1], quantize_input(x, dims)
        scale = torch.where(torch.isfinite(scale), scale, torch.nan)  # the codes of NaN are arbitrary
        sums = _sums(steps, zero, layout, weight.geometry, weight.shape[0])
        channels = layout["scale"] if weight.geometry is None else _by_channel(layout["scale"], sums)
        y = sums.mul_(scale * channels)
        if bias is not None:
            y = y.add_(bias.float() if weight.geometry is None else _by_channel(bias.float(), y))
        return y.to(x.dtype)


def _packed(weight: PackedWeight) -> dict[str, torch.Tensor]:
    codes, scale = weight_codes(weight)
    return _prepacked(codes, weight.geometry) | {"scale": scale}


def _prepacked(codes: torch.Tensor, geometry: Geometry | None) -> dict[str, torch.Tensor]:
    """`codes` extended by the channels whose input is z; `ones`, u8, with one entry for each of those channels."""
    sums, ops = codes.flatten(1).sum(1, dtype=torch.int64)[:, None], torch.ops.onednn
    count = -(-int(sums.abs().max()) // _MOST)
    v = sums.sign().neg() * (sums.abs() - _MOST * torch.arange(count)).clamp_(0, _MOST)
    more = codes.new_zeros(codes.shape[0], count, *codes.shape[2:])
    more.view(*more.shape[:2], prod(more.shape[2:]))[..., 0] = v  # in the first tap only
    codes, ones = torch.cat([codes, more], 1), torch.ones(count, dtype=torch.uint8)
    if geometry is None:
        return {"codes": ops.qlinear_prepack(codes, None), "ones": ones}
    packed = ops.qconv_prepack(codes, torch.ones(codes.shape[0]), 1.0, 0, *_slides(geometry))
    return {"codes": packed, "ones": ones.view(-1, *[1] * len(geometry.stride))}


def _slides(geometry: Geometry) -> tuple[list[int], list[int], list[int], int]:
    """The geometry in the operators' form. The input is padded already."""
    return list(geometry.stride), [0] * len(geometry.stride), list(geometry.dilation), 1


def _sums(
    steps: torch.Tensor, zero: torch.Tensor, layout: Prepared, geometry: Geometry | None, out: int
) -> torch.Tensor:
    """sum_k (x_q - z) w_q, float32, in the memory format of `steps`, x_q - z."""
    packed, units, last = layout["codes"], _units(out), _channels_last(steps)
    held = (zero * layout["ones"]).to(torch.uint8)
    if geometry is None:
        x = torch.cat([(steps + zero).to(torch.uint8), held], -1)
        y = torch.ops.onednn.qlinear_pointwise(
            x.view(-1, x.shape[-1]), 1.0, 0, packed, *units, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.view(*x.shape[:-1], out)
    steps = pad(steps, [n for n in reversed(geometry.padding) for _ in range(2)])
    x = torch.cat([(steps + zero).to(torch.uint8), held.expand(*held.shape[:2], *steps.shape[2:])], 1)
    y = torch.ops.onednn.qconv_pointwise(
        x, 1.0, 0, packed, *units, None, *_slides(geometry), 1.0, 0, torch.float32, "none", [], ""
    )
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@lru_cache(maxsize=64)
def _units(out: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(out), torch.zeros(out, dtype=torch.int64)


def _by_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 2))


@lru_cache(maxsize=1)
def _unusable() -> str | None:
    """Why oneDNN's operators cannot be used on this machine; None if they can."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this machine has no AVX-512 VNNI"
    try:
        right = all(_is_right(shape, geometry) for shape, geometry in _TRIED)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this machine's torch lacks oneDNN's integer products: {str(error).splitlines()[0]}"
    return None if right else "this machine's oneDNN computes wrong sums"


_TRIED: Sequence[tuple[tuple[int, ...], Geometry | None]] = (
    ((5, 33), None),
    ((5, 33, 3), Geometry((2,), (1,), (1,))),
    ((5, 33, 3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((5, 33, 1, 3, 3), Geometry((1, 1, 1), (0, 1, 1), (1, 1, 1))),
)


def _is_right(shape: tuple[int, ...], geometry: Geometry | None) -> bool:
    size = (2, 33, *[7] * (len(shape) - 2))
    zero = torch.tensor([3.0, 201.0]).view(2, *[1] * (len(shape) - 1))
    steps = torch.arange(prod(size)).remainder(TOP + 1).view(size) - zero
    w = torch.arange(prod(shape)).mul(7).remainder(2 * _MOST + 1).sub(_MOST).view(shape)
    found = _sums(steps, zero, _prepacked(w.to(torch.int8), geometry), geometry, shape[0])
    return torch.equal(found.double(), multiply(steps.double(), w.double(), geometry))
