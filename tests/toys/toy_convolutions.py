"""Every kind of linear and convolution layer that torch has, one by one and in a model of diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

KINDS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(8, 8),
    "Conv1d": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "Conv1d, grouped": lambda: nn.Conv1d(8, 8, 3, padding=1, groups=2),
    "Conv1d, strided": lambda: nn.Conv1d(8, 8, 3, stride=2, padding=1),
    "Conv1d, dilated": lambda: nn.Conv1d(8, 8, 3, padding=2, dilation=2),
    "Conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "Conv2d, grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "Conv2d, depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "Conv2d, strided": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "Conv2d, dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "Conv2d, padded to the same size": lambda: nn.Conv2d(8, 8, (1, 3), padding="same"),
    "Conv2d, padded by reflection": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "Conv3d": lambda: nn.Conv3d(8, 8, 3, padding=1),
    "Conv3d, grouped": lambda: nn.Conv3d(8, 8, 3, padding=1, groups=2),
    "Conv3d, strided": lambda: nn.Conv3d(8, 8, 3, stride=(1, 2, 2), padding=1),
    "Conv3d, dilated": lambda: nn.Conv3d(8, 8, 3, padding=2, dilation=2),
    "Conv3d, padded by replication": lambda: nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 8, 2, stride=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(8, 8, (1, 2, 2), stride=(1, 2, 2)),
}


def sample_for(kind: str) -> torch.Tensor:
    """An input that such a layer takes: (2, 8) and as many axes of 6 as it sees."""
    return torch.randn(2, 8, *[6] * _axes(kind), generator=torch.Generator().manual_seed(1))


def _axes(kind: str) -> int:
    return next((int(digit) for digit in "123" if f"{digit}d" in kind), 0)


class ToyConvolutions(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """All kinds of layer in parallel; the result is their outputs side by side, each scaled to a spread of one."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for make in KINDS.values())

    def forward(self, sample: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """`sample`: shape (B, 8, 6, 6, 6); the layers of fewer axes see its first places."""
        outputs = []
        for kind, layer in zip(KINDS, self.layers, strict=True):
            found = layer(sample[(..., *[0] * (3 - _axes(kind)))]).flatten(1)
            outputs.append(found / found.std())
        return (torch.cat(outputs, 1),)
