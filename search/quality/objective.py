"""What the trials of a study minimise on finished images: the distance between an image and the reference's.

Each objective is zero for identical images. Mean squared error, 1 - SSIM and LPIPS are all quadratic in a small error,
so a ratio of two distances means about the same in each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Images, Paired, Unavailable, mean_square, ssim

Metric = Callable[[Images, Images], Paired | Unavailable]


@dataclass(frozen=True)
class Objective:
    """A distance between two images.

    Attributes:
        name: "mse", "ssim" or "lpips"; for a pipeline's own small network, for example, "lpips-emoji".
        title: what the number is, in words.
        distance: (reference, image) -> distance, >= 0. Both are float in [0, 1], shape (C, H, W) or (frames, C, H, W);
            for "mse", any shape.
    """

    name: str
    title: str
    distance: Callable[[torch.Tensor, torch.Tensor], float]


MSE: Final = Objective("mse", "mean squared image error", mean_square)


def objective_named(name: str, networks: Networks) -> Objective:
    """The objective of that name.

    Raises:
        BitPolicyError: the network that it needs is not here.
    """
    if name == "mse":
        return MSE
    if name == "ssim":
        return Objective(name, "1 - SSIM", lambda a, b: max(1 - _one("ssim", ssim, a, b), 0.0))
    own, metric = _perceptual(networks)
    return Objective(own, f"{own} distance", lambda a, b: _one(name, metric, a, b))


def _perceptual(networks: Networks) -> tuple[str, Metric]:
    """LPIPS if its network is here, otherwise the distance of the pipeline's own small network; and its name."""
    network = networks.lpips
    if not isinstance(network, Unavailable):
        return "lpips", network
    if networks.small is None or networks.uncalibrated is None:
        raise _unavailable("lpips", network)
    return f"lpips-{networks.small.name}", networks.uncalibrated


def _one(name: str, metric: Metric, reference: torch.Tensor, image: torch.Tensor) -> float:
    """The metric of one pair.

    Raises:
        BitPolicyError: it cannot be measured on such images.
    """
    if reference.dim() < 3:
        raise BitPolicyError(
            f"--objective {name} compares images, and this pipeline's results have shape {tuple(reference.shape)}; "
            "use --objective mse"
        )
    found = metric([reference], [image])
    if isinstance(found, Unavailable):
        raise _unavailable(name, found)
    (value,) = found.finite
    return value


def _unavailable(name: str, found: Unavailable) -> BitPolicyError:
    return BitPolicyError(f"--objective {name} cannot be measured: {found.reason}; {found.remedy}")
