"""Round to nearest: the scale spans the extremes, every value goes to the closest code.

For levels q in {0 .. 2^b - 1} with scale s and zero point z the value is w ~ s (q - z); for symmetric codes z = 0 and q
in {-(2^(b-1) - 1) .. 2^(b-1) - 1} (Jacob et al. 2018, section 2.1). Scales are rounded to the dtype they are stored in
*before* the codes are chosen, so that the codes are nearest for the scale that will be read back.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.errors import FormatError


def asymmetric(
    values: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of groups that lie along the last dimension.

    Args:
        values: shape (..., group), finite.
        bits: code width, 2 to 8.
        scale_dtype: dtype the scale is stored in.

    Returns:
        codes u8 (..., group) in [0, 2^bits - 1], scale (...) > 0, zero u8 (...) in [0, 2^bits - 1]. A group of zero
        range, or whose scale underflows, has scale 1 and every code equal to its zero point.
    """
    _require_finite(values)
    top = 2**bits - 1
    values = values.float()
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    scale = ((high - low) / top).to(scale_dtype)
    if torch.isinf(scale).any():
        raise FormatError(
            f"the weight spans more than a {scale_dtype} scale can express; keep this layer at fp16 or int8"
        )
    flat = scale == 0
    scale = torch.where(flat, torch.ones_like(scale), scale)
    wide = scale.float()
    zero = (-low / wide).round().clamp(0, top)
    codes = (values / wide[..., None] + zero[..., None]).round().clamp(0, top)
    codes = torch.where(flat[..., None], zero[..., None], codes)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def symmetric(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of rows that lie along the last dimension, without a zero point.

    Args:
        values: shape (rows, n), finite.
        bits: code width, 2 to 8.

    Returns:
        codes i8 (rows, n) in [-(2^(bits-1) - 1), 2^(bits-1) - 1], scale float32 (rows) > 0.
    """
    _require_finite(values)
    top = 2 ** (bits - 1) - 1
    values = values.float()
    scale = values.abs().amax(-1) / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (values / scale[:, None]).round().clamp(-top, top).to(torch.int8), scale


def _require_finite(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise FormatError(
            "the weight has NaN or infinite values, which no integer format can hold; keep this layer at fp16"
        )
