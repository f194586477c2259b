"""Backward passes through a sampling loop, scaled under float16 so that gradients neither overflow nor vanish.

Gradients are linear in v: those of scale * v are divided by the scale again in float32, where nothing is lost. It is
the loss scaling of Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from __future__ import annotations

import torch

from bitpolicy.sensitivity.trajectory import LoopError

_HALF_SCALES = [2.0**power for power in (8, 4, 0, -4, -8, -12)]  # of v under float16, largest that stays finite wins


def scales_for(latent: torch.Tensor) -> list[float]:
    """What v may be multiplied by, in the order to try."""
    return _HALF_SCALES if latent.dtype == torch.float16 else [1.0]


def backward(latent: torch.Tensor, v: torch.Tensor, scale: float, keep: bool) -> None:
    """Gradients of scale * <v, latent>, for hooks to take.

    Args:
        keep: the graph, for another backward pass.

    Raises:
        LoopError: the sampling loop cannot be differentiated.
    """
    try:
        torch.autograd.backward(latent, (v * scale).to(latent.dtype), retain_graph=keep)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a tensor of the graph was changed in place
        raise LoopError(f"the sampling loop cannot be differentiated: {error}") from error
