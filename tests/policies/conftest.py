"""One exported pipeline, which the tests of checkpoints read and do not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_formats import FEW

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.kernels.quantizers.bias_correction import mean_patch
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.components import to_text
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.target import Target


@dataclass(frozen=True)
class Exported:
    """A pipeline rounded to float16, a policy that gives its layers every format in turn, and the checkpoint."""

    pipe: Any
    choices: dict[str, Choice]
    calibration: Calibration
    policy: Policy
    folder: Path
    nbytes: int


@pytest.fixture(scope="session")
def every_format_in_turn() -> Callable[[torch.nn.Module], dict[str, Choice]]:
    """Choices for all layers of a model; every second packed layer has its bias corrected. A layer that a format does
    not fit gets INT4."""

    def choices(model: torch.nn.Module) -> dict[str, Choice]:
        turns = enumerate(zip(quantizable_layers(model), cycle(FEW), strict=False))
        found = {}
        for i, ((name, layer), format) in turns:
            fitting = format if format.fits(layer.weight.shape) else format_named("int4")
            found[name] = Choice(fitting, fitting.packed and i % 2 == 0)
        return found

    return choices


@pytest.fixture(scope="session")
def policy_of() -> Callable[..., Policy]:
    """The policy that gives a U-Net, or a target, these choices."""

    def policy(
        studied: torch.nn.Module | Target, choices: dict[str, Choice], storage: torch.dtype = torch.float16
    ) -> Policy:
        target = studied if isinstance(studied, Target) else Target({"unet": studied})
        model = ModelReference(
            id="toy",
            component=to_text(target),
            class_name=to_text(target.class_names),
            sha256=to_text(target.weights_hashes(storage).values()),
        )
        return Policy.of(choices, model=model, storage_dtype=str(storage).removeprefix("torch."))

    return policy


@pytest.fixture(scope="session")
def calibrate() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """The mean inputs of a U-Net's layers in one call."""

    def calibration(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
        patches: dict[str, torch.Tensor] = {}

        def watch(name: str, layer: torch.nn.Module) -> Any:
            return layer.register_forward_hook(
                lambda _, args, __: patches.__setitem__(name, mean_patch(layer, args[0]))
            )

        hooks = [watch(name, layer) for name, layer in quantizable_layers(unet)]
        with torch.no_grad():
            unet(**unet_inputs(torch.float32))
        for hook in hooks:
            hook.remove()
        return patches

    return calibration


def unet_inputs(dtype: torch.dtype) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=draw).to(dtype),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=draw).to(dtype),
    }


@pytest.fixture(scope="session")
def predict() -> Callable[[Any], torch.Tensor]:
    """A U-Net's prediction for a fixed input, in its own dtype."""

    def prediction(unet: Any) -> torch.Tensor:
        with torch.no_grad():
            return unet(**unet_inputs(unet.dtype)).sample

    return prediction


@pytest.fixture(scope="session")
def draw() -> Callable[[Any], torch.Tensor]:
    """The final latents of two guided steps for a fixed prompt and seed."""

    def latents(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return pipe("a red heart", num_inference_steps=2, output_type="latent", generator=seed).images

    return latents


@pytest.fixture(scope="session")
def exported(
    new_toy_pipeline: Callable[[], Any],
    every_format_in_turn: Callable[[Any], dict[str, Choice]],
    calibrate: Callable[[Any], dict[str, torch.Tensor]],
    policy_of: Callable[..., Policy],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    pipe = new_toy_pipeline()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        to_storage(model, torch.float16)
    choices = every_format_in_turn(pipe.unet)
    calibration = Calibration(calibrate(pipe.unet))
    policy = policy_of(pipe.unet, choices)
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    nbytes = export_pipeline(pipe, ["unet"], policy, calibration, folder, component_dtype=torch.float16)
    return Exported(pipe, choices, calibration, policy, folder, nbytes)


@pytest.fixture(scope="module")
def saved(new_toy_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(dtype, **arguments)`: the pipeline that `exported` was made from, as written by save_pretrained."""

    def save(dtype: torch.dtype, **arguments: Any) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "pipeline"
        pipe = new_toy_pipeline()
        for model in (pipe.unet, pipe.vae, pipe.text_encoder):
            torch.nn.Module.to(model, torch.float16).to(dtype)
        pipe.tokenizer.backend_tokenizer.no_padding()  # of the last call of whatever test came before
        pipe.tokenizer.backend_tokenizer.no_truncation()
        pipe.save_pretrained(folder, **arguments)
        return folder

    return save


@pytest.fixture(scope="module")
def half(saved: Callable[..., Path]) -> Path:
    return saved(torch.float16)
