"""INT8 compute on the CPU by oneDNN's integer products, for machines without a C++ compiler.

Inputs are quantized, and sums scaled, by plain torch code. The operators are private to torch (`onednn::`), so they are
tried on a small product first: where they are absent, take other arguments or give another answer, this kernel refuses.
They want bytes with zero point 128: for signed ones oneDNN has only a reference kernel, a hundred times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from bitpolicy.kernels.int8_compute import TOP, multiply, quantize_input, weight_codes
from bitpolicy.kernels.kernel import Compute, Geometry, Kernel, PackedWeight, Prepared

_ZERO = 128
_LONGEST = 2**16  # weights of a row whose products fit 32 bits
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
            return "not for convolutions in groups"
        if weight.row_length >= _LONGEST:
            return f"rows longer than {_LONGEST}"
        return _unusable()

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        return {} if weight.low_memory else _packed(weight)

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        if not x.numel():
            return multiply(x, x.new_empty(weight.shape), weight.geometry, bias)
        layout = prepared or _packed(weight)
        codes, scale = quantize_input(x, per_sample=weight.geometry is not None)
        scale = torch.where(torch.isfinite(scale), scale, torch.nan)  # codes of NaN are any byte
        sums = _sums(codes.add_(_ZERO).to(torch.uint8), layout["codes"], weight.geometry, weight.shape[0])
        channels = layout["scale"] if weight.geometry is None else _by_channel(layout["scale"], sums)
        y = sums.mul_(scale * channels)
        if bias is not None:
            y = y.add_(bias.float() if weight.geometry is None else _by_channel(bias.float(), y))
        return y.to(x.dtype)


def _packed(weight: PackedWeight) -> dict[str, torch.Tensor]:
    codes, scale = weight_codes(weight)
    return {"codes": _prepacked(codes.contiguous(), weight.geometry), "scale": scale}


def _prepacked(codes: torch.Tensor, geometry: Geometry | None) -> torch.Tensor:
    ops = torch.ops.onednn
    if geometry is None:
        return ops.qlinear_prepack(codes, None)
    slides = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1)
    return ops.qconv_prepack(codes, torch.ones(codes.shape[0]), 1.0, _ZERO, *slides)


def _sums(x: torch.Tensor, packed: torch.Tensor, geometry: Geometry | None, out: int) -> torch.Tensor:
    """sum_k (x_k - 128) w_k, float32, in the memory format of the input."""
    scales, zeros = _units(out)
    if geometry is None:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.view(*x.shape[:-1], out)
    slides = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1)
    y = torch.ops.onednn.qconv_pointwise(
        x, 1.0, _ZERO, packed, scales, zeros, None, *slides, 1.0, 0, torch.float32, "none", [], ""
    )
    return y if _channels_last(x) else y.contiguous()


def _channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@lru_cache(maxsize=64)
def _units(out: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(out), torch.zeros(out, dtype=torch.int64)


def _by_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 2))


@lru_cache(maxsize=1)
def _unusable() -> str | None:
    """Why oneDNN's operators are of no use on this machine; None if they are."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this machine has no AVX-512 VNNI"
    try:
        right = all(_is_right(shape, geometry) for shape, geometry in _TRIED)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this machine's torch lacks oneDNN's integer products: {str(error).splitlines()[0]}"
    return None if right else "this machine's oneDNN gives other sums"


_TRIED: Sequence[tuple[tuple[int, ...], Geometry | None]] = (
    ((5, 33), None),
    ((5, 33, 3), Geometry((2,), (1,), (1,))),
    ((5, 33, 3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((5, 33, 1, 3, 3), Geometry((1, 1, 1), (0, 1, 1), (1, 1, 1))),
)


def _is_right(shape: tuple[int, ...], geometry: Geometry | None) -> bool:
    x = (
        torch.arange(2 * 33 * 7 ** (len(shape) - 2))
        .remainder(2 * TOP + 1)
        .sub(TOP)
        .view(2, 33, *[7] * (len(shape) - 2))
    )
    w = torch.arange(torch.Size(shape).numel()).mul(7).remainder(2 * TOP + 1).sub(TOP).view(shape)
    found = _sums((x + _ZERO).to(torch.uint8), _prepacked(w.to(torch.int8), geometry), geometry, shape[0])
    return torch.equal(found.double(), multiply(x.double(), w.double(), geometry))
