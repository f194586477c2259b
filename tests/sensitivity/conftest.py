"""Fixtures: toy pipelines with a chosen scheduler and dtype, and a format that only nudges a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from bitpolicy.kernels.formats.format import Format, Shape, TensorSpec
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import to_storage
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories


@pytest.fixture(scope="session")
def new_trajectories(new_toy_pipeline: Callable[[], Any]) -> Callable[..., Trajectories]:
    """`new_trajectories(scheduler, dtype, **call)`: a new toy pipeline with float16 values and three guided steps."""

    def new(scheduler: Any = DDIMScheduler, dtype: torch.dtype = torch.float32, **call: Any) -> Trajectories:
        pipe = new_toy_pipeline()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        to_storage(pipe.unet, torch.float16)
        if dtype != torch.float32:
            pipe.to(dtype)
            pipe.prepare_latents = _in_float32(pipe.prepare_latents)
        return Trajectories(pipe, ["unet"], {"num_inference_steps": 3, "guidance_scale": 3.0, **call})

    return new


def _in_float32(prepare_latents: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same noise for every dtype. Before 2.15, torch draws different numbers in float16 and float32."""

    def prepare(
        batch: int, channels: int, height: int, width: int, dtype: torch.dtype, *others: Any, **named: Any
    ) -> torch.Tensor:
        return prepare_latents(batch, channels, height, width, torch.float32, *others, **named).to(dtype)

    return prepare


@dataclass(frozen=True)
class Nudge(Format):
    """A format that turns W into W + D, with a fixed random D for each shape. A test chooses the size of D."""

    def delta(self, shape: Shape) -> torch.Tensor:
        draw = torch.Generator().manual_seed(sum(n * 1009**i for i, n in enumerate(shape)))
        return 0.05 * torch.randn(*shape, generator=draw)

    def parameters(self) -> dict[str, Any]:
        return {"kind": "nudge"}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(torch.float32, tuple(shape))}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return (tensors["weight"].double() + self.delta(shape)).to(dtype)


@pytest.fixture(scope="session")
def nudge() -> Nudge:
    return Nudge("nudge")


@pytest.fixture(scope="session")
def random_calibration() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """A made-up mean input for every layer of a model."""

    def calibration(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(7)
        layers = quantizable_layers(model)
        return {name: torch.randn(layer.weight.shape[1:], generator=draw) for name, layer in layers}

    return calibration
