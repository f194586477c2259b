"""GGUF: blocks as the package gguf reads them, files as diffusers loads them."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_originals import ORIGINALS, Original

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import quantized, stored_weight, to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.exporters import gguf as exporter
from bitpolicy.policies.exporters.export import export_to
from bitpolicy.policies.exporters.exporter import Layer
from bitpolicy.policies.exporters.gguf import Gguf, block_type
from bitpolicy.policies.exporters.requantize import TargetError
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target

gguf = pytest.importorskip("gguf", reason="pip install gguf")

STORED = {  # format -> the type that holds it
    **dict.fromkeys(["int4-g32-sym", "int4-sym", "int4-channel-sym", "int3-g32-sym", "int2-sym"], "Q4_0"),
    **dict.fromkeys(["int5-g32-sym", "int5-g128-sym"], "Q5_0"),
    **dict.fromkeys(["int8", "int8-g32", "int8-g64", "int6-g32-sym", "int7-channel-sym"], "Q8_0"),
    **dict.fromkeys(["int4", "int4-g32", "int3-g64", "int2-channel-asym"], "Q4_1"),
    **dict.fromkeys(["int5", "int5-g32"], "Q5_1"),
}
AS_LARGE = {"int4-g32-sym", "int5-g32-sym", "int8-g32"}
BY_DIFFUSERS = [o for o in ORIGINALS if o.name in ("SD3Transformer2DModel", "AuraFlowTransformer2DModel")]
BY_DIFFUSERS += [o for o in ORIGINALS if o.name in ("WanTransformer3DModel", "LTXVideoTransformer3DModel")]


def layer_of(name: str, shape: tuple[int, int] = (6, 256)) -> Layer:
    return Layer("a.b", "Linear", shape, format_named(name))


def normal(shape: tuple[int, ...]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 0, shape[0])[:, None]
    return weight.half()


@pytest.mark.parametrize("name", STORED)
def test_blocks_hold_exactly_the_codes_and_scales(name: str) -> None:
    layer, weight = layer_of(name), normal((6, 256))
    assert Gguf().holds(layer)
    assert block_type(layer) == STORED[name]
    tensors = layer.format.quantize(weight)
    (made,) = Gguf().convert(layer, tensors, torch.float16).values()
    (spec,) = Gguf().specs(layer, torch.float16).values()
    assert (made.dtype, tuple(made.shape)) == (spec.dtype, spec.shape)
    read = gguf.dequantize(made.numpy(), gguf.GGMLQuantizationType[STORED[name]])
    expected = layer.format.dequantize(tensors, weight.shape, torch.float32).numpy()
    if STORED[name].endswith("_1") or name == "int8":  # m, and the float32 scale of int8, are rounded to float16
        assert np.abs(read - expected).max() <= 2**-11 * np.abs(expected).max()
    else:
        assert np.array_equal(read, expected)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert spec.nbytes >= stored
    assert (spec.nbytes == stored) == (name in AS_LARGE)


def test_gguf_rounds_to_the_same_codes_where_its_scales_are_ours() -> None:
    """Weights that are whole multiples of a scale, with the largest at its end: both have the same blocks."""
    codes = torch.randint(-8, 8, (6, 256), generator=torch.Generator().manual_seed(2))
    codes[:, ::32] = -8
    weight = (codes * 0.125).half()
    layer = layer_of("int4-g32-sym")
    (made,) = Gguf().convert(layer, layer.format.quantize(weight), torch.float16).values()
    theirs = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(gguf.dequantize(made.numpy(), gguf.GGMLQuantizationType.Q4_0), weight.float().numpy())
    assert np.array_equal(gguf.dequantize(theirs, gguf.GGMLQuantizationType.Q4_0), weight.float().numpy())


@pytest.mark.parametrize("name", "nf4 fp8 int8-asym int6-g32-asym int4-g32-rot int8-convrot64 mxfp8".split())
def test_other_formats_are_not_held(name: str) -> None:
    assert not Gguf().holds(layer_of(name))


def test_rows_are_whole_blocks_and_layers_linear() -> None:
    assert not Gguf().holds(layer_of("int4-g32-sym", (6, 72)))
    assert Gguf().holds(layer_of("int4-channel-sym", (6, 96)))
    assert not Gguf().holds(Layer("a", "Conv2d", (6, 64, 3, 3), format_named("int8")))
    assert Gguf().holds(Layer("a", "Conv2d", (6, 64, 3, 3), FP16))


def test_scales_beyond_float16_are_refused() -> None:
    layer = layer_of("int8")
    tensors = layer.format.quantize((normal((6, 256)).float() * 1e8).bfloat16())
    with pytest.raises(BitPolicyError, match=r"a\.b are beyond float16.*keep that layer fp16"):
        Gguf().convert(layer, tensors, torch.bfloat16)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BitPolicyError, match=r"pip install 'bitpolicy\[gguf\]'"):
        exporter._require_package()


# Read by diffusers


@pytest.mark.parametrize("original", BY_DIFFUSERS, ids=lambda original: original.name)
def test_diffusers_loads_the_file_and_multiplies_with_our_weights(
    original: Original, policy_of: Any, parts_of: Any, tmp_path: Path
) -> None:
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    torch.manual_seed(0)
    model = original.model().eval()
    to_storage(model, torch.float16)
    formats, choices = cycle(["int4-g32-sym", "int5-g32", "int8", "int4", "fp16"]), {}
    tied = {name: group[0] for group in Gguf().tied(config(model), dict(quantizable_layers(model))) for name in group}
    for name, layer in quantizable_layers(model):
        format = choices[tied[name]].format if tied.get(name) in choices else format_named(next(formats))
        choices[name] = Choice(format if Gguf().holds(Layer.of(name, layer, format)) else FP16)
    policy = policy_of(Target({"transformer": model}), choices)
    export_to("gguf", parts_of(transformer=model), policy, Calibration(), tmp_path / "out")
    model.save_config(tmp_path / "config")
    found = type(model).from_single_file(
        str(tmp_path / "out" / "transformer.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    with quantized(model, choices, quantization=Quantization()):
        expected = {name: tensor.clone() for name, tensor in model.named_parameters()}
    packed = 0
    for name, parameter in found.named_parameters():
        quantized_there = hasattr(parameter, "quant_type")
        packed += quantized_there
        weight = dequantize_gguf_tensor(parameter) if quantized_there else parameter
        off = (weight.float() - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9)
        assert off < 2e-3, name
    dequantized = tuple(type(model)._keep_in_fp32_modules or ())  # when it is loaded
    assert packed == sum(
        choice.format.packed and not any(part in name for part in dequantized) for name, choice in choices.items()
    )


def config(model: Any) -> dict[str, Any]:
    return {**model.config, "_class_name": type(model).__name__}


def test_a_class_without_an_architecture_is_refused(policy_of: Any, parts_of: Any, tmp_path: Path) -> None:
    (original,) = (o for o in ORIGINALS if o.name == "PixArtTransformer2DModel")
    model = original.model()
    choices = {name: Choice(FP16) for name, _ in quantizable_layers(model)}
    policy = policy_of(Target({"transformer": model}), choices)
    with pytest.raises(BitPolicyError, match="no architecture for PixArtTransformer2DModel"):
        export_to("gguf", parts_of(transformer=model), policy, Calibration(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_metadata_says_what_the_file_is(even_unet: Any, policy_of: Any, parts_of: Any, tmp_path: Path) -> None:
    unet = even_unet()
    policy = policy_of(unet, {name: Choice(FP16) for name, _ in quantizable_layers(unet)})
    export_to("gguf", parts_of(unet=unet), policy, Calibration(), tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "unet.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"sd1"
    assert b"policy_sha256" in bytes(reader.fields["bitpolicy"].parts[-1])


def test_merged_layers_in_different_formats_are_refused(policy_of: Any, parts_of: Any, tmp_path: Path) -> None:
    (original,) = (o for o in ORIGINALS if o.name == "SD3Transformer2DModel")
    model = original.model()
    choices = {name: Choice(format_named("int8-g32")) for name, _ in quantizable_layers(model)}
    group = max(Gguf().tied(config(model), choices), key=len)
    held = {
        name: choice if Gguf().holds(Layer.of(name, layer, choice.format)) else Choice(FP16)
        for (name, layer), choice in zip(quantizable_layers(model), choices.values(), strict=True)
    }
    held[group[0]] = Choice(format_named("int4-g32-sym"))
    policy = policy_of(Target({"transformer": model}), held)
    with pytest.raises(TargetError, match=group[0]):
        export_to("gguf", parts_of(transformer=model), policy, Calibration(), tmp_path / "out")


def test_stored_weights_are_those_of_the_quantizer() -> None:
    """The codes of a rounding method that is not rtn are kept."""
    weight = normal((6, 256))
    stored = stored_weight("a", weight, Choice(format_named("int4-g32-sym"), quantizer="mse"), Calibration())
    (made,) = Gguf().convert(layer_of("int4-g32-sym"), stored, torch.float16).values()
    read = gguf.dequantize(made.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(read, format_named("int4-g32-sym").dequantize(stored, weight.shape, torch.float32).numpy())
