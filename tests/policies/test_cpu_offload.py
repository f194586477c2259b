"""diffusers' own offloading of a whole pipeline: packed models move to the device and draw the same image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from bitpolicy.kernels.layers import PackedLayer
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.parts import MemoryParts
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.policy import Choice, Policy

MODELS = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def checkpoint(
    new_toy_pipeline: Callable[[], Any],
    every_format_in_turn: Callable[[Any], dict[str, Choice]],
    policy_of: Callable[..., Policy],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pipeline with all three models packed."""
    pipe, folder = new_toy_pipeline(), tmp_path_factory.mktemp("packed") / "checkpoint"
    for name in MODELS:
        to_storage(getattr(pipe, name), torch.float16)
    together = MemoryParts(pipe, list(MODELS)).target
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(together).items()}
    export_pipeline(pipe, list(MODELS), policy_of(together, choices), Calibration(), folder)
    return folder


def drawn(pipe: Any) -> torch.Tensor:
    """The finished image, for which all three models run."""
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a red heart", num_inference_steps=2, output_type="pt", generator=seed).images


@pytest.mark.parametrize(
    ("way", "device"),
    [
        ("model", "cpu"),
        pytest.param("model", "cuda", marks=pytest.mark.gpu),
        pytest.param("sequential", "cuda", marks=pytest.mark.gpu),  # accelerate's fails on "cpu:0" with any pipeline
    ],
)
def test_an_offloaded_pipeline_draws_the_same_image(checkpoint: Path, way: str, device: str) -> None:
    expected = drawn(DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32).to(device))
    pipe = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    getattr(pipe, f"enable_{way}_cpu_offload")(device=device)
    assert torch.equal(drawn(pipe), expected)
    assert torch.equal(drawn(pipe), expected)  # what went away comes back
    packed = [layer for name in MODELS for layer in getattr(pipe, name).modules() if isinstance(layer, PackedLayer)]
    # diffusers lets buffers stay on the device in the sequential way, and what is packed is buffers
    assert {layer.weight_packed.device.type for layer in packed} == {"cpu" if way == "model" else device}
    parameters = [parameter for name in MODELS for parameter in getattr(pipe, name).parameters()]
    assert {parameter.device.type for parameter in parameters} == {"cpu" if way == "model" else "meta"}
