"""Backward passes through a sampling loop, scaled under float16 so that gradients neither overflow nor vanish.

Gradients are linear in v: those of scale * v are divided by the scale in float32, where nothing is lost. This is the
loss scaling of Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bitpolicy.sensitivity.trajectory.trajectories import LoopError

_HALF_SCALES = [2.0**power for power in (8, 4, 0, -4, -8, -12)]  # of v under float16, largest first


def scales_for(signal: torch.Tensor, denoisers: Iterable[nn.Module]) -> list[float]:
    """The scales for v, in the order to try. The first one that keeps gradients finite is used.

    Args:
        signal: the latent, or the image. The image may come from a decoder in float32 while denoisers are in float16.
    """
    dtypes = {signal.dtype, *(next(denoiser.parameters()).dtype for denoiser in denoisers)}
    return _HALF_SCALES if torch.float16 in dtypes else [1.0]


def backward(signal: torch.Tensor, v: torch.Tensor, scale: float, keep: bool) -> None:
    """Compute the gradients of scale * <v, signal>. Hooks use them.

    Args:
        keep: keep the graph for another backward pass.

    Raises:
        LoopError: the sampling loop cannot be differentiated.
    """
    try:
        torch.autograd.backward(signal, (v * scale).to(signal.dtype), retain_graph=keep)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a tensor of the graph was changed in place
        raise LoopError(f"the sampling loop cannot be differentiated: {error}") from error
