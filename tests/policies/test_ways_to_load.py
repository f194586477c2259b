"""Every way to load a packed model: files, shards, variants, dtypes, devices, automatic classes; every component.

Whatever the way, the model computes what the one that was exported computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import nn
from toy_pipelines import TOYS
from transformers import AutoModel as TransformersAutoModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.apply import quantized, to_storage
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target

Predict = Callable[[Any], torch.Tensor]
IDS = torch.arange(8)[None]


def packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in model.modules())


def state_is(found: nn.Module, expected: nn.Module) -> bool:
    a, b = found.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [None, "fp16"], ids=["no variant", "variant"])
@pytest.mark.parametrize("shards", ["10GB", "20KB"], ids=["one file", "shards"])
def test_files_and_dtypes(
    exported: Any,
    predict: Predict,
    tmp_path: Path,
    keyword: str,
    dtype: torch.dtype | None,
    variant: str | None,
    shards: str,
) -> None:
    source = UNet2DConditionModel.from_pretrained(exported.folder / "unet", dtype=dtype)
    plain = UNet2DConditionModel.from_pretrained(exported.folder / "unet")
    plain.save_pretrained(tmp_path, variant=variant, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards != "10GB")
    assert all(variant in path.name for path in tmp_path.glob("*.safetensors") if variant)
    found = UNet2DConditionModel.from_pretrained(tmp_path, variant=variant, **{keyword: dtype})
    assert packed(found)
    assert found.dtype == (dtype or torch.float16)
    assert state_is(found, source)
    assert torch.equal(predict(found), predict(source))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": torch.device("cpu")}, "cpu", None], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, None], ids=["low memory", "default"])
def test_device_maps(exported: Any, predict: Predict, device_map: Any, low_cpu_mem_usage: bool | None) -> None:
    options = {} if low_cpu_mem_usage is None else {"low_cpu_mem_usage": low_cpu_mem_usage}
    expected = UNet2DConditionModel.from_pretrained(exported.folder / "unet", dtype=torch.float32)
    found = UNet2DConditionModel.from_pretrained(
        exported.folder / "unet", dtype=torch.float32, device_map=device_map, **options
    )
    assert torch.equal(predict(found), predict(expected))


def test_automatic_classes(exported: Any, draw: Predict, predict: Predict) -> None:
    expected = DiffusionPipeline.from_pretrained(exported.folder, dtype=torch.float32)
    pipe = AutoPipelineForText2Image.from_pretrained(exported.folder, dtype=torch.float32)
    assert type(pipe) is StableDiffusionPipeline
    assert packed(pipe.unet)
    assert torch.equal(draw(pipe), draw(expected))
    model = AutoModel.from_pretrained(str(exported.folder), subfolder="unet", dtype=torch.float32)
    assert torch.equal(predict(model), predict(expected.unet))


@pytest.mark.parametrize("kind", [DiffusionPipeline, AutoPipelineForText2Image, StableDiffusionPipeline])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", [None, "fp16"], ids=["no variant", "variant"])
def test_whole_pipelines(
    exported: Any, predict: Predict, tmp_path: Path, kind: Any, dtype: torch.dtype | None, variant: str | None
) -> None:
    """Saved in shards, with and without a variant."""
    DiffusionPipeline.from_pretrained(exported.folder).save_pretrained(
        tmp_path, variant=variant, max_shard_size="100KB"
    )
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert all(variant in path.name for path in tmp_path.rglob("*.safetensors") if variant)
    pipe = kind.from_pretrained(tmp_path, variant=variant, dtype=dtype)
    expected = UNet2DConditionModel.from_pretrained(exported.folder, subfolder="unet", dtype=dtype)
    assert type(pipe) is StableDiffusionPipeline
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype or torch.float16}
    assert packed(pipe.unet)
    assert state_is(pipe.unet, expected)
    assert torch.equal(predict(pipe.unet), predict(expected))


def test_a_pipeline_moved_to_a_device_while_it_is_loaded(exported: Any, draw: Predict) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported.folder, dtype=torch.float32, device_map="cpu")
    assert packed(pipe.unet)
    expected = DiffusionPipeline.from_pretrained(exported.folder, dtype=torch.float32)
    assert torch.equal(draw(pipe), draw(expected))
    assert torch.equal(draw(expected.to("cpu")), draw(pipe))


# Every component


@pytest.fixture
def choose(every_format_in_turn: Callable[[nn.Module], dict[str, Choice]]) -> Callable[[Any], dict[str, Choice]]:
    def choices(model: nn.Module) -> dict[str, Choice]:
        to_storage(model, torch.float16)
        return {name: Choice(choice.format) for name, choice in every_format_in_turn(model).items()}

    return choices


def encoder(kind: type) -> Any:
    name = {CLIPTextModel: "StableDiffusionPipeline"}.get(kind, "StableDiffusion3Pipeline")
    return next(part for part in TOYS[name].new().components.values() if type(part) is kind)


def encode(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states[-1]


ENCODERS = [CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel]
every_encoder = pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.__name__)


@every_encoder
@pytest.mark.parametrize("shards", [10**10, 2_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_text_encoders(choose: Any, tmp_path: Path, kind: type, shards: int, dtype: Any) -> None:
    model = encoder(kind)
    choices = choose(model)
    nbytes = export_component(model, choices, tmp_path / "packed", shards, quantization=Quantization())
    with quantized(model, choices, quantization=Quantization()):
        model.save_pretrained(tmp_path / "plain")
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == 2_000)
    found = kind.from_pretrained(tmp_path / "packed", dtype=dtype)
    ordinary = kind.from_pretrained(tmp_path / "plain", dtype=torch.float16 if dtype == "auto" else dtype)
    assert found.dtype == ordinary.dtype
    assert sum(isinstance(module, PackedLayer) for module in found.modules()) == sum(
        choice.format.packed for choice in choices.values()
    )
    assert torch.equal(encode(found), encode(ordinary))
    assert found.num_parameters() == ordinary.num_parameters()
    assert nbytes == sum(sum(t.nbytes for t in load_file(file).values()) for file in files)


@every_encoder
def test_text_encoders_are_saved_again_byte_for_byte(choose: Any, tmp_path: Path, kind: type) -> None:
    model = encoder(kind)
    export_component(model, choose(model), tmp_path / "packed", quantization=Quantization())
    for dtype in ("auto", torch.float32):
        kind.from_pretrained(tmp_path / "packed", dtype=dtype).save_pretrained(tmp_path / "again")
        found, expected = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("again", "packed"))
        assert found == expected
        config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
        assert "checksums" not in config
        assert torch.equal(
            encode(kind.from_pretrained(tmp_path / "again", dtype=torch.float32)),
            encode(kind.from_pretrained(tmp_path / "packed", dtype=torch.float32)),
        )


@every_encoder
def test_text_encoders_move_cast_and_unpack(choose: Any, tmp_path: Path, kind: type) -> None:
    model = encoder(kind)
    export_component(model, choose(model), tmp_path, quantization=Quantization())
    found = kind.from_pretrained(tmp_path, dtype=torch.float32)
    expected = encode(found)
    for changed in (found.half(), found.to(torch.bfloat16), found.float()):
        assert packed(changed)
    assert {layer.compute_dtype for layer in found.modules() if isinstance(layer, PackedLayer)} == {torch.float32}
    found = kind.from_pretrained(tmp_path, dtype=torch.float32)
    found.dequantize()
    assert not packed(found)
    assert torch.equal(encode(found), expected)
    found.save_pretrained(tmp_path / "plain")
    assert torch.equal(encode(kind.from_pretrained(tmp_path / "plain", dtype=torch.float32)), expected)


def test_an_automatic_class_of_transformers(choose: Any, tmp_path: Path) -> None:
    model = encoder(CLIPTextModel)
    export_component(model, choose(model), tmp_path, quantization=Quantization())
    found = TransformersAutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert packed(found)
    assert torch.equal(encode(found), encode(CLIPTextModel.from_pretrained(tmp_path, dtype=torch.float32)))


def test_a_weight_that_two_layers_share_is_not_packed(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=True)
    model = T5ForConditionalGeneration(small)
    choices = {name: Choice(format_named("int4")) for name, _ in quantizable_layers(model)}
    assert "lm_head" not in choices
    choices["lm_head"] = Choice(format_named("int4"))
    with pytest.raises(BitPolicyError, match=r"\.weight is .*another layer and cannot be packed; give it fp16"):
        export_component(model, choices, tmp_path, quantization=Quantization())


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_an_autoencoder(choose: Any, tmp_path: Path, dtype: torch.dtype | None) -> None:
    vae = TOYS["StableDiffusionPipeline"].new().vae
    choices = choose(vae)
    nbytes = export_component(vae, choices, tmp_path / "vae", quantization=Quantization())
    formats = {name: choice.format for name, choice in choices.items()}
    assert nbytes == ByteAccount.of(Target({"unet": vae}), torch.float16).total(formats)
    found = AutoencoderKL.from_pretrained(tmp_path / "vae", dtype=dtype)
    assert packed(found)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    if dtype is torch.float32:
        with torch.no_grad(), quantized(vae, choices, quantization=Quantization()):
            expected = vae(pixels).sample
        with torch.no_grad():
            assert torch.equal(found(pixels).sample, expected)
    found.save_pretrained(tmp_path / "again")
    again, first = ((tmp_path / f / "diffusion_pytorch_model.safetensors").read_bytes() for f in ("again", "vae"))
    assert again == first


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_a_pipeline_with_every_component_packed(
    choose: Any, draw: Predict, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    pipe = TOYS["StableDiffusionPipeline"].new()
    pipe.save_pretrained(tmp_path)
    names = ("unet", "vae", "text_encoder")
    choices = {name: choose(getattr(pipe, name)) for name in names}
    for name in names:
        for file in (tmp_path / name).iterdir():
            file.unlink()
        export_component(getattr(pipe, name), choices[name], tmp_path / name, quantization=Quantization())
    found = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert {name: packed(getattr(found, name)) for name in names} == dict.fromkeys(names, True)
    assert {getattr(found, name).dtype for name in names} == {dtype or torch.float16}
    if dtype is torch.float32:
        with (
            quantized(pipe.unet, choices["unet"], quantization=Quantization()),
            quantized(pipe.vae, choices["vae"], quantization=Quantization()),
            quantized(pipe.text_encoder, choices["text_encoder"], quantization=Quantization()),
        ):
            expected = draw(pipe)
        assert torch.equal(draw(found), expected)
    found.save_pretrained(tmp_path / "again")
    for name in names:
        (file,) = (tmp_path / name).glob("*.safetensors")
        assert (tmp_path / "again" / name / file.name).read_bytes() == file.read_bytes()
