"""A small convolutional network whose activations describe what a picture shows, for use when Inception is not
available.

    y_0 = p / 127.5 - 1,    y_l = relu(W_l * y_{l-1} + b_l),    f(p) = mean over positions of y_L

The first convolution keeps the size; each later one halves it. The Frechet and kernel distances use f(p). A perceptual
distance uses the y_l of all layers (Zhang et al. 2018, section 3). A folder contains `config.json` (name, size,
channels) and `model.safetensors`; `scripts/train_features.py` trains such a network on emoji.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_KIND = "bitpolicy.FeatureNetwork"


class FeatureNetwork(nn.Module):
    """A network from pictures to features. clean-fid accepts it as `custom_feat_extractor`.

    Attributes:
        name: appears in the names of metrics that use the network: `fid-emoji`.
        size: side in pixels to which pictures are resized.
        channels: per layer; the last is the length of the feature vector.
    """

    def __init__(self, name: str, size: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.name, self.size, self.channels = name, size, tuple(channels)
        widths = list(enumerate(pairwise((3, *self.channels))))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2 if i else 1, padding=1) for i, (a, b) in widths)

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """y_1 ... y_L.

        Args:
            pixels: shape (B, 3, H, W), float in [0, 255]; resized if H or W is not `size`.

        Returns:
            tensors of shape (B, channels[l], h, w) with h = w = size / 2^l.
        """
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        found = [pixels / 127.5 - 1]
        for conv in self.convs:
            found.append(torch.relu(conv(found[-1])))
        return found[1:]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """f(p), shape (B, channels[-1]), of `pixels` as in `maps`."""
        return self.maps(pixels)[-1].mean(dim=(2, 3))

    def config(self) -> dict[str, str | int | list[int]]:
        """The configuration that `load` reads in addition to the weights."""
        return {"kind": _KIND, "name": self.name, "size": self.size, "channels": list(self.channels)}

    @classmethod
    def load(cls, folder: Path) -> FeatureNetwork:
        """The network in a folder, float32, in eval mode, without gradients.

        Raises:
            BitPolicyError: the folder has no such network, or its weights are damaged.
        """
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            network = cls(config["name"], config["size"], config["channels"])
            network.load_state_dict({name: w.float() for name, w in load_file(folder / WEIGHTS).items()})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise BitPolicyError(
                f"{folder} has no readable feature network: {' '.join(str(error).split())[:300]}; "
                f"give the folder that scripts/train_features.py wrote ({CONFIG}, {WEIGHTS})"
            ) from error
        return network.eval().requires_grad_(False)


def is_feature_network(folder: Path) -> bool:
    """Whether a folder's configuration names such a network."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("kind") == _KIND
    except (OSError, ValueError, AttributeError):
        return False
