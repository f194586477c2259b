"""The operations of tests/toys/operations.py on one packed U-Net and one packed transformer, and on their pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from operations import OPERATIONS, PIPELINE_OPERATIONS
from torch import nn
from toy_pipelines import TOYS, Toy

from bitpolicy.kernels.layers import PackedLayer, PackedLinear
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.export import export_pipeline
from bitpolicy.policies.policy import Choice, Policy

COMPONENTS = {"StableDiffusionPipeline": "unet", "FluxPipeline": "transformer"}


class Case(NamedTuple):
    toy: Toy
    component: str
    folder: Path
    inputs: dict[str, Any]

    def model(self) -> Any:
        kind = type(getattr(DiffusionPipeline.from_pretrained(self.folder), self.component))
        return kind.from_pretrained(self.folder, subfolder=self.component, dtype=torch.float32)

    def draw(self, pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return pipe("a cat", **self.toy.call, **self.toy.extra, generator=seed, output_type="latent").images


def inputs_of(pipe: Any, component: str, toy: Toy) -> dict[str, Any]:
    """The keyword arguments of the first call that the pipeline makes."""
    calls: list[dict[str, Any]] = []

    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        calls.append({**dict(zip(names, args, strict=False)), **kwargs, "return_dict": False})

    hook = getattr(pipe, component).register_forward_pre_hook(note, with_kwargs=True)
    pipe("a cat", **toy.call, **toy.extra, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return calls[0]


@pytest.fixture(scope="module", params=COMPONENTS)
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]],
    policy_of: Callable[..., Policy],
) -> Case:
    toy, component = TOYS[request.param], COMPONENTS[request.param]
    pipe, folder = toy.new(), tmp_path_factory.mktemp("operations") / "pipeline"
    model = getattr(pipe, component)
    to_storage(model, torch.float16)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(model).items()}
    export_pipeline(pipe, component, policy_of(model, choices), {}, folder, component_dtype=torch.float32)
    return Case(toy, component, folder, inputs_of(pipe, component, toy))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_packed_model_goes_along(case: Case, operation: str) -> None:
    OPERATIONS[operation](case.model(), case.inputs)


@pytest.mark.parametrize("operation", PIPELINE_OPERATIONS)
def test_a_pipeline_with_a_packed_model_goes_along(case: Case, operation: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(case.folder, dtype=torch.float32)
    PIPELINE_OPERATIONS[operation](pipe, case.draw)


def test_a_model_with_fused_projections_is_saved_as_it_was(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / file).read_bytes() == (case.folder / case.component / file).read_bytes()


# The checks can fail


@pytest.mark.parametrize("operation", ["to_dtype", "half"])
def test_scales_that_are_cast_are_noticed(case: Case, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLayer, "_apply", nn.Module._apply)
    with pytest.raises(AssertionError):
        OPERATIONS[operation](case.model(), case.inputs)


@pytest.mark.parametrize("operation", ["dequantize", "lora", "lora_training", "input_gradient"])
def test_a_layer_that_multiplies_with_another_weight_is_noticed(
    case: Case, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(AssertionError):
        OPERATIONS[operation](case.model(), case.inputs)
