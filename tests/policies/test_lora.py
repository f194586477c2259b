"""LoRA on packed layers: peft adds, fuses and removes its adapters, and the layers stay packed throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import PackedLayer
from bitpolicy.policies.checkpoints.pipeline import export_pipeline

LORA = "pytorch_lora_weights.safetensors"  # diffusers before 0.41 does not look for it offline
TARGETS = ["to_q", "to_out.0", "conv1", "conv_in", "proj_in"]
Predict = Callable[[Any], torch.Tensor]


def adapter() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=TARGETS)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for layer in packed_layers(model).values() for t in layer.packed_tensors().values()]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def packed(exported: Any) -> Any:
    return UNet2DConditionModel.from_pretrained(exported.folder / "unet", torch_dtype=torch.float32)


@pytest.fixture
def plain(exported: Any) -> Any:
    """The same weights in ordinary layers."""
    return UNet2DConditionModel.from_pretrained(exported.folder / "unet", torch_dtype=torch.float32).dequantize()


@pytest.fixture
def lora(plain: Any, tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA file, and the ordinary U-Net that it was saved from."""
    torch.manual_seed(2)
    plain.add_adapter(adapter())
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(plain))
    return tmp_path, plain


def test_an_adapter_on_packed_layers_computes_what_it_computes_on_ordinary_ones(
    packed: Any, plain: Any, predict: Predict
) -> None:
    before, held = predict(packed), codes(packed)
    for unet in (packed, plain):
        torch.manual_seed(2)
        unet.add_adapter(adapter())
    assert distance(predict(packed), before) > 0.01
    assert torch.equal(predict(packed), predict(plain))
    assert all(torch.equal(a, b) for a, b in zip(codes(packed), held, strict=True))


def test_adapters_reach_packed_linears_and_packed_convolutions(packed: Any) -> None:
    packed.add_adapter(adapter())
    under = {type(layer).__name__ for name, layer in packed_layers(packed).items() if name.endswith("base_layer")}
    assert under == {"PackedLinear", "PackedConv2d"}
    trainable = [name for name, parameter in packed.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_an_adapter_can_be_trained_on_packed_layers(packed: Any) -> None:
    packed.add_adapter(adapter())
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    packed(sample, 10, encoder_hidden_states=text).sample.square().mean().backward()
    gradients = {name: p.grad for name, p in packed.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


def test_a_lora_file_is_loaded_and_unloaded(exported: Any, lora: tuple[Path, Any], predict: Predict) -> None:
    folder, plain = lora
    pipe = DiffusionPipeline.from_pretrained(exported.folder, torch_dtype=torch.float32)
    before = predict(pipe.unet)
    pipe.load_lora_weights(folder, weight_name=LORA)
    assert torch.equal(predict(pipe.unet), predict(plain))
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe.unet), before)


def test_fusing_merges_the_adapter_and_unfusing_removes_it(
    exported: Any, lora: tuple[Path, Any], predict: Predict
) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported.folder, torch_dtype=torch.float32)
    before = predict(pipe.unet)
    names = {name: layer.format for name, layer in packed_layers(pipe.unet).items()}
    pipe.load_lora_weights(lora[0], weight_name=LORA)
    adapted = predict(pipe.unet)

    pipe.fuse_lora()
    fused = predict(pipe.unet)
    assert not torch.equal(fused, adapted), "it was quantized anew"
    assert distance(fused, adapted) < 0.5 * distance(before, adapted)

    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert distance(predict(pipe.unet), before) < 0.5 * distance(adapted, before)
    assert {name: layer.format for name, layer in packed_layers(pipe.unet).items()} == names
    for layer in packed_layers(pipe.unet).values():
        announced = layer.format.tensors(layer.weight_shape, torch.float16)
        assert {s: t.dtype for s, t in layer.packed_tensors().items()} == {s: t.dtype for s, t in announced.items()}


def test_a_fused_model_without_its_adapter_is_saved_and_loaded(
    exported: Any, lora: tuple[Path, Any], predict: Predict, tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported.folder, torch_dtype=torch.float32)
    pipe.load_lora_weights(lora[0], weight_name=LORA)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.unet.save_pretrained(tmp_path / "fused")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "fused", torch_dtype=torch.float32)
    assert torch.equal(predict(again), predict(pipe.unet))


def test_saving_a_model_with_an_adapter_is_refused(packed: Any, tmp_path: Path) -> None:
    packed.add_adapter(adapter())
    with pytest.raises(BitPolicyError, match=r"an adapter on it, e\.g\. on conv_in; unload it"):
        packed.save_pretrained(tmp_path / "adapted")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_pipeline_with_an_adapter_is_neither_exported_nor_searched(
    new_toy_pipeline: Callable[[], Any], exported: Any, tmp_path: Path, component: str
) -> None:
    """For a text encoder with an adapter, transformers would write only the adapter."""
    pipe = new_toy_pipeline()
    targets = {"unet": TARGETS, "text_encoder": ["q_proj"]}[component]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), getattr(pipe, component))
    needles = rf"the {component} has an adapter .*, e\.g\. on .*pipe\.unload_lora_weights\(\), .*pipe\.fuse_lora\(\)"
    with pytest.raises(BitPolicyError, match=needles):
        bitpolicy.export(pipe, exported.policy, tmp_path / "out")
    with pytest.raises(BitPolicyError, match=needles):
        export_pipeline(pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "out")
    with pytest.raises(BitPolicyError, match=needles):
        bitpolicy.search(pipe, "50%")
    assert list(tmp_path.iterdir()) == []
