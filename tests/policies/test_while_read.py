"""A full-precision model with a policy is packed while it is read: to the bits of the exported one, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from bitpolicy import BitPolicyConfig, Policy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.policy_records import ModelReference, Rule
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import save_calibration
from bitpolicy.policies.target import Target

WEIGHTS = "diffusion_pytorch_model.safetensors"
Predict = Callable[[Any], torch.Tensor]


def load(folder: Path, policy: Any, **options: Any) -> Any:
    config = BitPolicyConfig(policy=policy)
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", quantization_config=config, **options)


def same_tensors(found: nn.Module, expected: nn.Module) -> bool:
    a, b = found.state_dict(), expected.state_dict()
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="session")
def unrounded(new_toy_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of `exported` in its original float32; the policy is for its float16 version."""
    folder = tmp_path_factory.mktemp("full")
    new_toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy_file(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_calibration(exported.calibration, folder / "calibration.safetensors")
    about = exported.policy.provenance | {"calibration": exported.calibration.sha256}
    exported.policy.model_copy(update={"provenance": about}).save(folder / "policy.yaml")
    return folder / "policy.yaml"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_while_reading_equals_exporting_and_loading(
    exported: Any, unrounded: Path, policy_file: Path, dtype: torch.dtype | None
) -> None:
    packed = load(unrounded, policy_file, dtype=dtype)
    expected = UNet2DConditionModel.from_pretrained(exported.folder, subfolder="unet", dtype=dtype)
    assert same_tensors(packed, expected)
    dtypes = {name: m.compute_dtype for name, m in expected.named_modules() if isinstance(m, PackedLayer)}
    assert {name: m.compute_dtype for name, m in packed.named_modules() if isinstance(m, PackedLayer)} == dtypes


def test_a_model_packed_while_read_predicts_the_same_bits(
    exported: Any, unrounded: Path, policy_file: Path, predict: Predict
) -> None:
    expected = UNet2DConditionModel.from_pretrained(exported.folder, subfolder="unet", dtype=torch.float32)
    assert torch.equal(predict(load(unrounded, policy_file, dtype=torch.float32)), predict(expected))


def test_a_policy_in_memory_brings_its_calibration(exported: Any, unrounded: Path) -> None:
    packed = load(unrounded, exported.policy.with_calibration(exported.calibration))
    assert same_tensors(packed, UNet2DConditionModel.from_pretrained(exported.folder, subfolder="unet"))


def test_a_weight_and_its_bias_may_be_in_different_shards(
    exported: Any, unrounded: Path, policy_file: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(unrounded, subfolder="unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="30KB")
    index = json.loads((tmp_path / "unet" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    weights = (name for name in index if name.endswith(".weight"))
    assert any(index.get(f"{name[:-6]}bias", index[name]) != index[name] for name in weights)
    packed = load(tmp_path, policy_file)
    assert same_tensors(packed, UNet2DConditionModel.from_pretrained(exported.folder, subfolder="unet"))


def test_a_saved_model_is_an_ordinary_packed_checkpoint(
    exported: Any, unrounded: Path, policy_file: Path, tmp_path: Path
) -> None:
    load(unrounded, policy_file).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (exported.folder / "unet" / WEIGHTS).read_bytes()
    text = (tmp_path / "config.json").read_text()
    assert str(policy_file.parent) not in text
    assert "policy" not in json.loads(text)["quantization_config"]
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert same_tensors(again, UNet2DConditionModel.from_pretrained(exported.folder, subfolder="unet"))


@pytest.mark.parametrize("through", ["quant_backend", "quant_mapping"])
def test_a_pipeline_packs_the_component_that_is_named(
    exported: Any, unrounded: Path, policy_file: Path, draw: Predict, through: str
) -> None:
    config = PipelineQuantizationConfig(
        **{
            "quant_backend": {
                "quant_backend": "bitpolicy",
                "quant_kwargs": {"policy": str(policy_file)},
                "components_to_quantize": ["unet"],
            },
            "quant_mapping": {"quant_mapping": {"unet": BitPolicyConfig(policy=policy_file)}},
        }[through]
    )
    pipe = DiffusionPipeline.from_pretrained(unrounded, quantization_config=config, dtype=torch.float32)
    expected = DiffusionPipeline.from_pretrained(exported.folder, dtype=torch.float32)
    assert same_tensors(pipe.unet, expected.unet)
    assert not any(isinstance(module, PackedLayer) for module in pipe.text_encoder.modules())
    pipe.text_encoder, pipe.vae = expected.text_encoder, expected.vae  # rounded, as they were exported
    assert torch.equal(draw(pipe), draw(expected))


@pytest.fixture
def together(
    new_toy_pipeline: Callable[[], Any],
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]],
    policy_of: Callable[..., Policy],
) -> tuple[Any, Policy]:
    """A pipeline rounded to float16, and one policy with bias correction for its U-Net and its text encoder."""
    pipe = new_toy_pipeline()
    for name in ("unet", "text_encoder", "vae"):
        to_storage(getattr(pipe, name), torch.float16)
    both = Target.of(pipe, ["unet", "text_encoder"])
    choices = every_format_in_turn(both)
    layers = both.layers
    means = {
        name: torch.linspace(-1, 1, layers[name].weight[0].numel()).view(layers[name].weight.shape[1:])
        for name, choice in choices.items()
        if choice.bias_correction
    }
    policy = policy_of(both, choices)
    rules = [Rule(match="text_encoder.*k_proj", format="int8"), Rule(match="unet.*to_k", format="int8")]
    return pipe, policy.model_copy(update={"rules": rules}).with_calibration(means)


def test_a_policy_of_several_components_is_applied_to_each(
    together: tuple[Any, Policy], draw: Predict, tmp_path: Path
) -> None:
    pipe, policy = together
    pipe.save_pretrained(tmp_path / "full")
    export_pipeline(pipe, policy.model.components, policy, policy.calibration, tmp_path / "packed")
    config = BitPolicyConfig(policy=policy)
    found = DiffusionPipeline.from_pretrained(
        tmp_path / "full",
        quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config, "text_encoder": config}),
        dtype=torch.float32,
    )
    expected = DiffusionPipeline.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert same_tensors(found.unet, expected.unet)
    assert same_tensors(found.text_encoder, expected.text_encoder)
    assert torch.equal(draw(found), draw(expected))


def test_one_component_of_several_may_be_loaded_alone(together: tuple[Any, Policy], tmp_path: Path) -> None:
    pipe, policy = together
    pipe.save_pretrained(tmp_path / "full")
    export_pipeline(pipe, policy.model.components, policy, policy.calibration, tmp_path / "packed")
    expected = UNet2DConditionModel.from_pretrained(tmp_path / "packed", subfolder="unet")
    assert same_tensors(load(tmp_path / "full", policy), expected)


def test_a_component_with_other_weights_is_refused_even_if_another_fits(
    together: tuple[Any, Policy], tmp_path: Path
) -> None:
    pipe, policy = together
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0] += 1
    pipe.save_pretrained(tmp_path)
    with pytest.raises(BitPolicyError, match=r"made for toy \(CLIPTextModel, sha256 .*these weights have sha256"):
        CLIPTextModel.from_pretrained(
            tmp_path, subfolder="text_encoder", quantization_config=BitPolicyConfig(policy=policy)
        )


# Text encoders


def encoder_and_choices(kind: type, every_format_in_turn: Callable[[nn.Module], dict[str, Choice]]) -> tuple[Any, Any]:
    from toy_pipelines import TOYS

    pipe = TOYS["StableDiffusionPipeline" if kind is CLIPTextModel else "StableDiffusion3Pipeline"].new()
    model = next(part for part in pipe.components.values() if type(part) is kind)
    return model, every_format_in_turn(model)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(CLIPTextModel, ""), (CLIPTextModel, "text_model."), (T5EncoderModel, "")],  # files of CLIP's come with both names
    ids=["CLIP", "CLIP, older names", "T5"],
)
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_text_encoder_is_packed_as_it_would_be_exported(
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]],
    kind: type,
    dtype: Any,
    prefix: str,
    tmp_path: Path,
) -> None:
    model, choices = encoder_and_choices(kind, every_format_in_turn)
    means = {
        name: torch.linspace(-1, 1, layer.in_features)
        for name, layer in quantizable_layers(model)
        if choices[name].bias_correction
    }
    storage = torch.float16
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    renamed = {f"{prefix}{name.removeprefix(prefix)}": tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    to_storage(model, storage)
    about = ModelReference(
        id="toy", component="text_encoder", class_name=kind.__name__, sha256=weights_hash(model, storage)
    )
    policy = Policy.of(choices, model=about).with_calibration(means)
    export_component(
        model, choices, tmp_path / "packed", quantization=Quantization(calibration=Calibration(means), storage=storage)
    )

    found = kind.from_pretrained(tmp_path / "full", dtype=dtype, quantization_config=BitPolicyConfig(policy=policy))
    expected = kind.from_pretrained(tmp_path / "packed", dtype=torch.float32 if dtype == "auto" else dtype)
    assert any(isinstance(module, PackedLayer) for module in found.modules())
    assert same_tensors(found, expected)
    found.save_pretrained(tmp_path / "again")
    if dtype is not torch.bfloat16:  # which holds less than the storage dtype
        again = (tmp_path / "again" / "model.safetensors").read_bytes()
        assert again == (tmp_path / "packed" / "model.safetensors").read_bytes()
    assert same_tensors(kind.from_pretrained(tmp_path / "again", dtype=torch.float32), found.float())


# What does not go together


def changed(policy: Policy, **fields: Any) -> Policy:
    return policy.model_copy(update={"model": policy.model.model_copy(update=fields)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda p: changed(p, class_name="FluxTransformer2DModel"),
            "made for the unet of toy, a FluxTransformer2DModel, .*a UNet2DConditionModel; .*components_to_quantize",
        ),
        (
            lambda p: changed(p, sha256="0" * 64),
            "made for toy .*sha256 000000000000.*these weights have sha256 .*load that model, or run search-policy",
        ),
        (
            lambda p: p.model_copy(update={"layers": p.layers | {"conv_inn": p.layers["conv_out"]}}),
            "names layer 'conv_inn', which this model does not have; did you mean 'conv_in'?",
        ),
    ],
    ids=["class", "weights", "layer"],
)
def test_a_policy_for_another_model_is_refused(
    exported: Any, unrounded: Path, change: Callable[[Policy], Policy], complaint: str
) -> None:
    policy = change(exported.policy).with_calibration(exported.calibration)
    with pytest.raises(BitPolicyError, match=complaint):
        load(unrounded, policy)


def test_a_missing_calibration_is_an_error_if_it_is_needed(unrounded: Path, policy_file: Path, tmp_path: Path) -> None:
    alone = shutil.copy(policy_file, tmp_path / "policy.yaml")
    with pytest.raises(BitPolicyError, match=r"calibration\.safetensors is missing.*keep the two together"):
        load(unrounded, alone)


def test_a_calibration_that_is_not_needed_may_be_missing(
    exported: Any, unrounded: Path, policy_of: Callable[..., Policy], tmp_path: Path
) -> None:
    plain = {name: Choice(choice.format) for name, choice in exported.choices.items()}
    policy_of(exported.pipe.unet, plain).save(tmp_path / "policy.yaml")
    assert any(isinstance(module, PackedLayer) for module in load(unrounded, tmp_path / "policy.yaml").modules())


def test_a_missing_policy_is_an_error(unrounded: Path, tmp_path: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"cannot read policy .*no\.yaml"):
        load(unrounded, tmp_path / "no.yaml")


def test_without_a_policy_an_ordinary_model_is_not_packed(unrounded: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"this model is not packed; make a checkpoint .*or give the policy"):
        load(unrounded, None)


def test_a_checkpoint_cannot_name_a_policy(exported: Any, policy_file: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.folder / "unet", tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["policy"] = str(policy_file)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitPolicyError, match=r"quantization_config names a policy"):
        UNet2DConditionModel.from_pretrained(folder)


def test_files_that_lack_a_tensor_are_refused(unrounded: Path, policy_file: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unrounded / "unet", tmp_path / "unet")
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BitPolicyError, match=r"lack conv_in\.weight; download them again"):
        load(tmp_path, policy_file)


def test_the_error_for_a_value_beyond_float16_names_the_tensor(
    exported: Any, unrounded: Path, policy_of: Callable[..., Policy], tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(unrounded, subfolder="unet")
    with torch.no_grad():
        unet.conv_norm_out.weight[0] = 1e6
    unet.save_pretrained(tmp_path / "unet")
    policy = policy_of(unet, exported.choices).with_calibration(exported.calibration)
    with pytest.raises(BitPolicyError, match=r"conv_norm_out\.weight has values that torch\.float16 cannot hold"):
        load(tmp_path, policy)
