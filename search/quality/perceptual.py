"""Perceptual distance: how different two pictures are to a network (Zhang et al. 2018, section 3, equation 1).

    d(x, x0) = sum_l mean_{h,w} |w_l * (y_l - y_l0)|^2

y_l is the activation of layer l, scaled to unit length across channels at every position. There are two networks:

* LPIPS itself: AlexNet, with w_l fitted to human judgement, which torchmetrics ships. Its backbone must be downloaded.
* A small network that comes with a pipeline, with w_l^2 = 1 / 2L. The distance is then the mean over layers and
positions
  of 1 - cos, in [0, 1]. It is not fitted to human judgement ("uncalibrated") and its scale differs from that of LPIPS,
  so it has another name: `lpips-emoji`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.feature_network import FeatureNetwork
from bitpolicy.search.quality.psnr import Images, Paired, Unavailable, frames

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's
_SMALLEST = 32  # pixels per side that AlexNet's strides and pools need
_EPSILON = 1e-8  # below this squared length, an activation counts as zero


@dataclass(frozen=True)
class Lpips:
    """LPIPS with AlexNet.

    Attributes:
        network: torchmetrics' implementation, with its weights.
        device: where it computes.
    """

    network: nn.Module
    device: torch.device

    @classmethod
    def load(cls, backbone: Path, device: torch.device) -> Lpips:
        """Load with torchvision's AlexNet from a file.

        Raises:
            BitPolicyError: the file is something else.
        """
        network = _NoTrainLpips(pretrained=True, net="alex", pnet_rand=True)  # the w_l, with a random backbone
        try:
            saved = torch.load(backbone, map_location="cpu", weights_only=True)
            names = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
            network.net.load_state_dict({name: saved[source] for name, source in names.items()})
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, UnpicklingError) as error:
            raise BitPolicyError(f"{backbone} is not torchvision's AlexNet: {_short(error)}") from error
        return cls(network.eval().requires_grad_(False).to(device), device)

    def __call__(self, reference: Images, images: Images) -> Paired | Unavailable:
        smallest = min(min(image.shape[-2:]) for image in reference)
        if smallest < _SMALLEST:
            return Unavailable(
                f"the images have {smallest} pixels per side", f"LPIPS needs {_SMALLEST}: generate larger images"
            )
        found = tuple(self._distance(a, b) for a, b in zip(reference, images, strict=True))
        return Paired("lpips", found, "lower", network="AlexNet")

    @torch.no_grad()
    def _distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = (frames(image).to(self.device, torch.float32) for image in (a, b))
        return float(self.network(a, b, normalize=True).mean())


@dataclass(frozen=True)
class Uncalibrated:
    """The same distance in the layers of a small network.

    Attributes:
        network: the network whose activations are compared.
        device: where it computes.
    """

    network: FeatureNetwork
    device: torch.device

    def __call__(self, reference: Images, images: Images) -> Paired:
        found = tuple(self._distance(a, b) for a, b in zip(reference, images, strict=True))
        return Paired(f"lpips-{self.network.name}", found, "lower", network=self.network.name)

    @torch.no_grad()
    def _distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        maps = [self.network.maps(frames(image).to(self.device, torch.float32) * 255) for image in (a, b)]
        layers = [(_unit(ya) - _unit(yb)).square().sum(1).mean() / 2 for ya, yb in zip(*maps, strict=True)]
        return float(torch.stack(layers).mean())


Perceptual = Lpips | Uncalibrated


def _unit(activations: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w), scaled to unit length across C."""
    return activations / (activations.square().sum(1, keepdim=True) + _EPSILON).sqrt()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
