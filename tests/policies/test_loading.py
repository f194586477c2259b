"""diffusers loads exported models: packed as stored, with the bits that were searched, and usable like any other."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from bitpolicy import load_pipeline
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import export_diffusers_model
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization

WEIGHTS = "diffusion_pytorch_model.safetensors"
Predict = Callable[[Any], torch.Tensor]


def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)


def packed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))
    return {f"{name}.{suffix}": t for name, layer in layers for suffix, t in layer.packed_tensors().items()}


def resident(model: nn.Module) -> int:
    held = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def broken(exported: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the exported denoiser with something changed in its config or its tensors."""

    def change(
        config: Callable[[dict[str, Any]], object] = lambda config: None,
        tensors: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    ) -> Path:
        folder = shutil.copytree(exported.folder / "unet", tmp_path / "broken")
        settings = json.loads((folder / "config.json").read_text())
        config(settings["quantization_config"])
        (folder / "config.json").write_text(json.dumps(settings))
        held = load_file(folder / WEIGHTS)
        tensors(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return change


def test_without_a_dtype_the_model_in_memory_equals_the_file(exported: Any) -> None:
    unet = load(exported.folder / "unet")
    assert_same(unet.state_dict(), load_file(exported.folder / "unet" / WEIGHTS))
    assert resident(unet) == exported.nbytes
    assert unet.dtype == torch.float16


def test_bfloat16_stays_bfloat16(exported: Any, tmp_path: Path) -> None:
    export_diffusers_model(
        exported.pipe.unet,
        exported.choices,
        tmp_path,
        quantization=Quantization(calibration=exported.calibration, storage=torch.bfloat16),
    )
    unet = load(tmp_path)
    assert_same(unet.state_dict(), load_file(tmp_path / WEIGHTS))
    assert unet.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_applies_to_everything_that_is_not_packed(exported: Any, dtype: torch.dtype) -> None:
    stored = load_file(exported.folder / "unet" / WEIGHTS)
    unet = load(exported.folder / "unet", dtype)
    packed = packed_tensors(unet)
    assert_same(packed, {name: stored[name] for name in packed})
    others = {name: tensor for name, tensor in unet.state_dict().items() if name not in packed}
    assert_same(others, {name: stored[name].to(dtype) for name in others})
    layers = [module for module in unet.modules() if isinstance(module, PackedLayer)]
    assert {layer.compute_dtype for layer in layers} == {layer.weight.dtype for layer in layers} == {dtype}


def test_a_loaded_model_predicts_the_bits_that_were_searched(exported: Any, predict: Predict) -> None:
    with quantized(exported.pipe.unet, exported.choices, quantization=Quantization(calibration=exported.calibration)):
        expected = predict(exported.pipe.unet)
    assert torch.equal(predict(load(exported.folder / "unet", torch.float32)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_loaded_model_predicts_the_bits_of_an_ordinary_one_with_its_weights(
    exported: Any, predict: Predict, dtype: torch.dtype
) -> None:
    ordinary = copy.deepcopy(exported.pipe.unet)
    with quantized(exported.pipe.unet, exported.choices, quantization=Quantization(calibration=exported.calibration)):
        ordinary.load_state_dict(exported.pipe.unet.state_dict())
    assert torch.equal(predict(load(exported.folder / "unet", dtype)), predict(ordinary.to(dtype)))


def test_the_pipeline_draws_the_bits_that_were_searched(exported: Any, draw: Callable[[Any], torch.Tensor]) -> None:
    with quantized(exported.pipe.unet, exported.choices, quantization=Quantization(calibration=exported.calibration)):
        expected = draw(exported.pipe)
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(exported.folder, torch_dtype=torch.float32)), expected)
    assert torch.equal(draw(load_pipeline(exported.folder, torch.float32)), expected)
    assert not torch.equal(draw(exported.pipe), expected)


def test_load_pipeline_keeps_the_denoiser_as_stored(exported: Any) -> None:
    pipe = load_pipeline(str(exported.folder), device="cpu")
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.unet.dtype == torch.float16
    assert resident(pipe.unet) == exported.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None], ids=str)
def test_a_loaded_pipeline_draws_an_image(exported: Any, dtype: torch.dtype | None) -> None:
    pipe = load_pipeline(exported.folder, dtype)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red heart", num_inference_steps=1, output_type="pt").images
    assert image.shape == (1, 3, 16, 16)
    assert torch.isfinite(image).all()
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype or torch.float16}


def test_a_bfloat16_pipeline_stays_in_bfloat16(
    toy_pipeline: Any, policy_of: Callable[..., Any], tmp_path: Path
) -> None:
    choices = {name: Choice(format_named("int4")) for name, _ in quantizable_layers(toy_pipeline.unet)}
    policy = policy_of(toy_pipeline.unet, choices, torch.bfloat16)
    export_pipeline(toy_pipeline, ["unet"], policy, Calibration(), tmp_path / "out", component_dtype=torch.bfloat16)
    pipe = load_pipeline(tmp_path / "out")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("most", [5_000, 50_000])
def test_shards_load_as_one_file(exported: Any, tmp_path: Path, most: int) -> None:
    export_diffusers_model(
        exported.pipe.unet,
        exported.choices,
        tmp_path,
        most,
        quantization=Quantization(calibration=exported.calibration),
    )
    assert_same(load(tmp_path).state_dict(), load(exported.folder / "unet").state_dict())


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.to(torch.float32), torch.float32),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda m: m.float().half(), torch.float16),
        (lambda m: copy.deepcopy(m), torch.float16),
        (lambda m: copy.deepcopy(m).float(), torch.float32),
    ],
    ids=["to", "float", "to device and dtype", "there and back", "copy", "copy and float"],
)
def test_a_loaded_model_moves_like_any_other(
    exported: Any, predict: Predict, move: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    unet = load(exported.folder / "unet")
    before = {name: tensor.clone() for name, tensor in packed_tensors(unet).items()}
    moved = move(unet)
    assert_same(packed_tensors(moved), before)
    assert moved.dtype == dtype
    assert torch.equal(predict(moved), predict(load(exported.folder / "unet", dtype)))


def test_a_pipeline_can_be_moved_and_converted_to_another_class(
    exported: Any, draw: Callable[[Any], torch.Tensor]
) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported.folder)
    expected = draw(load_pipeline(exported.folder, torch.float32))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert torch.equal(draw(StableDiffusionPipeline.from_pipe(other, torch_dtype=torch.float32)), expected)
    assert torch.equal(draw(pipe.to(torch.float32)), expected)


def test_a_loaded_model_is_saved_again_as_it_is(exported: Any, predict: Predict, tmp_path: Path) -> None:
    unet = load(exported.folder / "unet")
    unet.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / WEIGHTS), load_file(exported.folder / "unet" / WEIGHTS))
    again, first = (json.loads((f / "config.json").read_text()) for f in (tmp_path, exported.folder / "unet"))
    first["quantization_config"].pop("checksums")  # of the bytes that export wrote
    assert again["quantization_config"] == first["quantization_config"]
    assert torch.equal(predict(load(tmp_path, torch.float32)), predict(unet.float()))


def test_a_loaded_pipeline_is_saved_again_as_it_is(
    exported: Any, draw: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    pipe = load_pipeline(exported.folder)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(load_pipeline(tmp_path, torch.float32)), draw(pipe.to(torch.float32)))


def test_dequantizing_gives_ordinary_layers_and_the_same_prediction(exported: Any, predict: Predict) -> None:
    unet = load(exported.folder / "unet", torch.float32)
    expected = predict(unet)
    plain = unet.dequantize()
    assert not any(isinstance(module, PackedLayer) for module in plain.modules())
    assert plain.state_dict().keys() == exported.pipe.unet.state_dict().keys()
    assert torch.equal(predict(plain), expected)


def test_a_dequantized_model_is_saved_and_loaded_as_an_ordinary_one(
    exported: Any, predict: Predict, tmp_path: Path
) -> None:
    plain = load(exported.folder / "unet", torch.float32).dequantize()
    plain.save_pretrained(tmp_path)
    assert torch.equal(predict(load(tmp_path)), predict(plain))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero", "bias"])
def test_a_missing_tensor_is_named(exported: Any, broken: Callable[..., Path], suffix: str) -> None:
    name = next(n for n in load_file(exported.folder / "unet" / WEIGHTS) if n.endswith(f".{suffix}"))
    with pytest.raises(BitPolicyError, match=f"lacks 1 tensors, e.g. {name}; download or export it again"):
        load(broken(tensors=lambda tensors: tensors.pop(name)))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_a_tensor_of_another_shape_is_named(exported: Any, broken: Callable[..., Path], suffix: str) -> None:
    name = f"conv_in.{suffix}"
    complaint = rf"{name} has shape \(1, 1\), .*the config says .*; the checkpoint is damaged"
    with pytest.raises(BitPolicyError, match=complaint):
        load(broken(tensors=lambda tensors: tensors.update({name: tensors[name][:1, :1].clone()})))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda config: config.update(format_version=2),
            "the checkpoint has format_version 2, .* reads 1; install a newer bitpolicy",
        ),
        (
            lambda config: config["layers"].update({"conv_middle": "int8"}),
            "the checkpoint packs layer 'conv_middle', which UNet2DConditionModel does not have",
        ),
        (lambda config: config["layers"].update(conv_in="int9"), "unknown format 'int9'; write int2 to int8"),
        (
            lambda config: config["formats"]["int4"].update(group=16),
            "'int4' was written as .*'group': 16.*; use the bitpolicy that wrote it",
        ),
        (lambda config: config["formats"].pop("int8"), "'int8' was written as {}"),
    ],
    ids=["version", "layer", "format", "parameters", "no parameters"],
)
def test_a_config_that_does_not_fit_is_refused(
    broken: Callable[..., Path], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    with pytest.raises(BitPolicyError, match=complaint):
        load(broken(config=change))


def test_an_ordinary_model_is_not_packed_without_a_policy(exported: Any, tmp_path: Path) -> None:
    exported.pipe.unet.save_pretrained(tmp_path)
    with pytest.raises(BitPolicyError, match="this model is not packed; make a checkpoint with search-policy or"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=BitPolicyConfig())


def test_a_config_is_read_back_as_it_was_written(exported: Any) -> None:
    config = BitPolicyConfig.of(exported.choices, torch.bfloat16)
    again = BitPolicyConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.storage_dtype == "bfloat16"
    assert {name: again.format_of(name) for name in again.layers} == {
        name: choice.format for name, choice in exported.choices.items() if choice.format.packed
    }


def test_a_folder_that_is_not_a_pipeline_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BitPolicyError, match="is not a diffusers pipeline folder"):
        load_pipeline(tmp_path)


def test_a_pipeline_loaded_without_a_dtype_keeps_the_storage_dtype_in_every_model_and_draws(exported: Any) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported.folder)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}
    pipe.set_progress_bar_config(disable=True)
    image = pipe("cat", num_inference_steps=1, output_type="pt").images
    assert torch.isfinite(image).all()
