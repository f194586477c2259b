"""Pipelines that are built or run in an unusual way, at toy size: what each of them showed about the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import stages
import torch
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from toy_pipelines import EVERY
from toy_subject import subject_of

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.pipelines.loading import storage_dtype
from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.loading.diffusers_files import skeleton
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.step_cost import time_plain, time_probed
from bitpolicy.sensitivity.probes.stepwise import LocalSketches
from bitpolicy.sensitivity.rounding.candidates import candidates


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPAGPipeline",  # exchanges attention processors while its loop runs
        "StableDiffusionGLIGENPipeline",  # switches layers off in the middle of it
        "KandinskyV22CombinedPipeline",  # calls two pipelines, each of which stops gradients
    ],
)
def test_gradients_are_those_of_the_call(name: str, tmp_path: Path) -> None:
    stages.probe(EVERY[name], tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionControlNetXSPipeline",
        "StableCascadeDecoderPipeline",
        "WuerstchenPriorPipeline",
        "WuerstchenCombinedPipeline",
        "KandinskyV22PriorPipeline",
    ],
)
def test_layers_outside_usual_blocks_have_a_role(name: str, tmp_path: Path) -> None:
    stages.layers(EVERY[name], tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline-two",
        "KandinskyV22ControlnetPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "StableDiffusionGLIGENPipeline",
    ],
)
def test_the_error_without_inputs_shows_a_request_that_would_do(name: str, tmp_path: Path) -> None:
    stages.inputs(EVERY[name], tmp_path)


def test_the_timed_steps_are_those_of_the_denoiser() -> None:
    """A prior with a loop of its own comes before it."""
    subject = subject_of(EVERY["StableUnCLIPPipeline"])
    trajectories, sample = subject.trajectories, subject.samples[0]
    probe = LocalSketches(trajectories, candidates((format_named("int4"),)), quantization=Quantization())
    for timing in (time_plain(trajectories, [sample]), time_probed(trajectories, probe, sample)):
        assert timing.steps == subject.call["num_inference_steps"]
        assert timing.step > 0


def test_every_model_of_a_component_is_exported(tmp_path: Path) -> None:
    toy = EVERY["StableDiffusionControlNetPipeline-two"]
    toy.new().save_pretrained(tmp_path)
    parts = FolderParts(tmp_path)
    sizes = parts.others(torch.float32)
    assert sizes["controlnet"] == sizes["controlnet_1"] > 0
    (tmp_path / "out").mkdir()
    parts.write_others(torch.float16, tmp_path / "out")
    for name in ("controlnet", "controlnet_1"):
        assert diffusers.ControlNetModel.from_pretrained(tmp_path / "out" / name).dtype == torch.float16


def test_a_model_of_a_pipeline_module_is_built_from_its_config() -> None:
    """diffusers does not export it."""
    model: Any = skeleton("StableUnCLIPImageNormalizer", {"embedding_dim": 5}, "stable_diffusion")
    assert isinstance(model, StableUnCLIPImageNormalizer)
    assert model.mean.shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_storage_dtype_is_that_of_a_denoiser_of_any_name(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe: Any = EVERY["StableCascadePriorPipeline"].new()
    pipe.prior.to(dtype)
    pipe.save_pretrained(tmp_path)
    assert storage_dtype(tmp_path) == dtype
