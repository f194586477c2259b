"""Bias correction: move the mean error of a quantized weight into the layer's bias.

If the weight W of a layer y = W x + b becomes W + dW, the error is dW x, with mean dW E[x]. Subtracting the mean from
the bias,

    b' = b - dW E[x],

costs no bytes if there is a bias (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.2, with E[x] measured instead of derived). For a convolution E[x] is the mean *patch*: the mean
input of each kernel tap over samples and output positions, zero padding included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.layers import Quantizable


def mean_patch(layer: Quantizable, x: torch.Tensor) -> torch.Tensor:
    """E[x] of one call.

    Args:
        layer: a linear layer or a convolution.
        x: its input; (..., in) for a linear layer, (B, in, *spatial) or (in, *spatial) for a convolution.

    Returns:
        float32, shape (in) for a linear layer and (in, *kernel) for a convolution.
    """
    x = x.detach().float()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).mean(0)
    dims = len(layer.kernel_size)
    mean = x.mean(0) if x.ndim == dims + 2 else x
    return patches(layer, mean[None])[0].mean(tuple(range(1, 1 + dims)))


def patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The inputs of a convolution at each output position: a view (B, in, *spatial, *kernel) of its padded input.

    Args:
        x: (B, in, *spatial).
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    view = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        view = view.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return view


def bias_shift(layer: Quantizable, delta: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    """-dW E[x], float32, shape (out): what to add to the bias.

    Args:
        delta: dW = Q(W) - W, in the weight's shape (out, in/groups, *kernel).
        patch: E[x] from `mean_patch`.
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    per_group = delta.double().flatten(1).unflatten(0, (groups, -1))  # float64: the same bits on every device
    shift = torch.einsum("gok,gk->go", per_group, patch.to(delta.device).double().reshape(groups, -1))
    return -shift.flatten().float()


def corrected_bias(bias: torch.Tensor, shift: torch.Tensor, storage: torch.dtype) -> torch.Tensor | None:
    """The bias with `shift` added, in the storage dtype, or None if a value exceeds the range of that dtype.

    A layer with large inputs has a large mean error, and float16 ends at 65504. Such a layer keeps its bias.

    Args:
        bias: shape (out), any float dtype.
        shift: float32, shape (out), from `bias_shift`.
    """
    corrected = (bias.float() + shift).to(storage)
    return corrected if torch.isfinite(corrected).all() else None
