"""Streamed weights compute what resident ones do, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpolicy
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.pipelines.loading import load_source
from bitpolicy.pipelines.offload import stream_weights
from bitpolicy.policies.target import Target

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}


def scores(pipe: Any) -> torch.Tensor:
    return bitpolicy.probe(pipe, call=CALL, prompts=["cat", "dog"], samples=2, vectors=1, quiet=True).error


def test_scores_and_images_are_the_same(half_pipeline: Callable[[], Any]) -> None:
    plain, streamed = half_pipeline(), half_pipeline()
    stream_weights(streamed, Target.of(streamed, ["unet"]), torch.device("cpu"))
    assert torch.equal(scores(plain), scores(streamed))
    images = [
        pipe("cat", output_type="pt", generator=torch.Generator().manual_seed(0), **CALL).images
        for pipe in (plain, streamed)
    ]
    assert torch.equal(*images)


def test_every_streamed_layer_reads_its_weight_at_each_call(half_pipeline: Callable[[], Any]) -> None:
    """Quantizing a weight while it is streamed takes effect at once."""
    pipe = half_pipeline()
    stream_weights(pipe, Target.of(pipe, ["unet"]), torch.device("cpu"))
    x = torch.ones(1, 4, 8, 8)
    (layer,) = [layer for name, layer in quantizable_layers(pipe.unet) if name == "conv_in"]
    before = layer(x)
    layer.weight.data = layer.weight.data * 2
    assert not torch.equal(layer(x), before)


def test_a_pipeline_is_loaded_streaming(toy: Path) -> None:
    source = load_source(str(toy), offload=True, device="cpu")
    assert source.pipe._execution_device == torch.device("cpu")
    assert "forward" in vars(source.pipe.unet.conv_in)


@pytest.mark.gpu
def test_the_device_never_holds_all_weights(half_pipeline: Callable[[], Any]) -> None:
    pipe = half_pipeline()
    expected = scores(half_pipeline())
    stream_weights(pipe, Target.of(pipe, ["unet"]), torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    found = scores(pipe)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    assert all(layer.weight.device.type == "cpu" for _, layer in quantizable_layers(pipe.unet))
