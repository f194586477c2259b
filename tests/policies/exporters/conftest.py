"""A U-Net whose channels are multiples of the group size, and a policy of everything that a target holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.kernels.quantizers.bias_correction import mean_patch
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.checkpoints.parts import MemoryParts, Parts
from bitpolicy.policies.exporters.exporter import Exporter, Layer
from bitpolicy.policies.policy import Choice

MANY = (
    "int4 int8 int4-convrot nvfp4 int4-g32 int8-convrot64 mxfp8 fp8-tensor int3 int4-channel-sym int5-channel-sym "
    "int2-g128 int6 fp8 int4-g32-sym int5 int7-sym int8-g64 int8-asym int4-sym fp16 nf4 int6-rot"
).split()
"""Formats of many kinds, of which each target gets those that it holds."""


@pytest.fixture(scope="session")
def even_unet() -> Callable[[], Any]:
    """Makes a UNet2DConditionModel with 64 and 128 channels, rounded to float16."""

    def build() -> Any:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=16,
            norm_num_groups=8,
        ).eval()
        to_storage(unet, torch.float16)
        return unet

    made = build()
    return lambda: copy.deepcopy(made)


@pytest.fixture(scope="session")
def parts_of() -> Callable[..., Parts]:
    """`parts_of(unet=model)`: the parts of a pipeline with only this model."""

    def parts(**models: Any) -> Parts:
        pipe: Any = SimpleNamespace(**models, components=models)
        return MemoryParts(pipe, list(models))

    return parts


@pytest.fixture(scope="session")
def predict_even() -> Callable[[Any], torch.Tensor]:
    """The prediction of such a U-Net for a fixed input, float32."""
    draw = torch.Generator().manual_seed(5)
    sample, states = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 7, 64, generator=draw)

    def prediction(unet: Any) -> torch.Tensor:
        with torch.no_grad():
            return unet(sample, 500, encoder_hidden_states=states).sample

    return prediction


@pytest.fixture(scope="session")
def held_choices() -> Callable[[Exporter, Any], dict[str, Choice]]:
    """Each layer in the next format of `MANY` that the target holds for it; every second bias is corrected."""

    def choices(exporter: Exporter, unet: Any) -> dict[str, Choice]:
        found, turns = {}, cycle(MANY)
        for i, (name, module) in enumerate(quantizable_layers(unet)):
            here = Layer.of(name, module, FP16)
            for _, format in zip(MANY, map(format_named, turns), strict=False):
                if format.fits(here.shape) and exporter.holds(here.stored_as(format)):
                    break
            found[name] = Choice(format, format.packed and i % 2 == 0)
        return found

    return choices


@pytest.fixture(scope="session")
def even_means(even_unet: Callable[[], Any], predict_even: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean inputs of its layers in one call."""
    unet, patches = even_unet(), {}
    for name, layer in quantizable_layers(unet):
        layer.register_forward_hook(
            lambda layer, args, _, name=name: patches.__setitem__(name, mean_patch(layer, args[0]))
        )
    predict_even(unet)
    return patches
