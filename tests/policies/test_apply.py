"""A policy applied to a model in memory: the same bits packed or not, and removed without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError, FormatError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers
from bitpolicy.kernels.quantizers.range_search import hqq, mse
from bitpolicy.policies.apply import pack, quantize_layer, quantized, to_storage
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization

INT4, INT8 = format_named("int4"), format_named("int8")
Model = Any
Choose = Callable[[Model], dict[str, Choice]]
Calibrate = Callable[[Model], dict[str, torch.Tensor]]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_packed_and_dequantized_layers_give_the_same_bits(
    toy_unet: Model,
    every_format_in_turn: Choose,
    calibrate: Calibrate,
    predict: Callable[[Model], torch.Tensor],
    storage: torch.dtype,
) -> None:
    to_storage(toy_unet, storage)
    choices, calibration = every_format_in_turn(toy_unet), Calibration(calibrate(toy_unet))
    reference = predict(toy_unet)
    with quantized(toy_unet, choices, quantization=Quantization(calibration=calibration, storage=storage)):
        expected = predict(toy_unet)
    assert not torch.equal(expected, reference)
    pack(toy_unet, choices, quantization=Quantization(calibration=calibration, storage=storage))
    packed = {name for name, module in toy_unet.named_modules() if isinstance(module, PackedLayer)}
    assert packed == {name for name, choice in choices.items() if choice.format.packed}
    assert torch.equal(predict(toy_unet), expected)


def test_the_model_is_as_before_after_the_block(
    toy_unet: Model, every_format_in_turn: Choose, calibrate: Calibrate, predict: Callable[[Model], torch.Tensor]
) -> None:
    before, reference = bits(toy_unet), predict(toy_unet)
    with quantized(
        toy_unet,
        every_format_in_turn(toy_unet),
        quantization=Quantization(calibration=Calibration(calibrate(toy_unet))),
    ):
        changed = {name for name, tensor in toy_unet.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}
    assert_same(bits(toy_unet), before)
    assert torch.equal(predict(toy_unet), reference)


def test_the_model_is_as_before_after_an_error_in_the_block(toy_unet: Model, every_format_in_turn: Choose) -> None:
    before = bits(toy_unet)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(toy_unet).items()}
    with pytest.raises(KeyboardInterrupt), quantized(toy_unet, choices, quantization=Quantization()):
        raise KeyboardInterrupt
    assert_same(bits(toy_unet), before)


def test_the_model_is_as_before_if_a_layer_cannot_be_quantized(toy_unet: Model) -> None:
    names = [name for name, _ in quantizable_layers(toy_unet)]
    toy_unet.get_submodule(names[-1]).weight.data[0] = float("inf")
    before = bits(toy_unet)
    with (
        pytest.raises(FormatError, match=f"layer {names[-1]}: .*keep this layer at fp16"),
        quantized(toy_unet, dict.fromkeys(names, Choice(INT4)), quantization=Quantization()),
    ):
        pass
    assert_same(bits(toy_unet), before)


def test_layers_at_fp16_and_layers_without_a_choice_are_left_alone(toy_unet: Model) -> None:
    before = bits(toy_unet)
    with quantized(toy_unet, {"conv_in": Choice(FP16), "conv_out": Choice(INT8)}, quantization=Quantization()):
        changed = [name for name, tensor in toy_unet.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["conv_out.weight", "conv_out.bias"]  # the bias is stored in float16


def test_a_corrected_bias_undoes_the_mean_error() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 4).half().float()
    x = torch.randn(32, 64) + 1
    stored = quantize_layer(
        "layer", layer, Choice(INT4, True), quantization=Quantization(calibration=Calibration({"layer": x.mean(0)}))
    )
    weight = INT4.dequantize(stored.tensors, (4, 64), torch.float32)
    plain_error = (x @ (weight - layer.weight).T).mean(0)
    error = (x @ weight.T + stored.bias.float() - layer(x)).mean(0)
    assert stored.bias.dtype == torch.float16
    assert error.abs().max() < 2**-11  # what float16 leaves of a bias
    assert plain_error.abs().max() > 10 * 2**-11


def test_codes_and_scales_do_not_depend_on_the_correction() -> None:
    layer = nn.Linear(64, 4)
    calibration = Calibration({"layer": torch.ones(64)})
    with_it, without = (
        quantize_layer("layer", layer, Choice(INT4, c), quantization=Quantization(calibration=calibration))
        for c in (True, False)
    )
    assert_same(with_it.tensors, without.tensors)
    assert torch.equal(without.bias, layer.bias.half())
    assert not torch.equal(with_it.bias, without.bias)


def test_the_weight_is_quantized_as_it_is_stored() -> None:
    """A policy applies to the stored model: a float32 weight and its float16 copy give the same codes."""
    layer = nn.Linear(64, 4)
    wide = quantize_layer("layer", layer, Choice(INT8), quantization=Quantization(storage=torch.bfloat16))
    assert_same(wide.tensors, INT8.quantize(layer.weight.detach().bfloat16()))


def test_a_layer_without_a_bias_has_nothing_to_correct() -> None:
    stored = quantize_layer("layer", nn.Linear(64, 4, bias=False), Choice(INT4, True), quantization=Quantization())
    assert stored.bias is None


def test_a_correction_without_its_mean_input_names_the_layer() -> None:
    with pytest.raises(BitPolicyError, match=r"layer mid\.conv: bias correction needs its mean input.*run the search"):
        quantize_layer("mid.conv", nn.Conv2d(4, 4, 3), Choice(INT4, True), quantization=Quantization())


# Quantizers


@pytest.fixture
def heavy() -> nn.Linear:
    """A layer with weights for which searching the grids pays off."""
    layer = nn.Linear(64, 4)
    layer.weight.data = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).pow(3).half().float()
    return layer


@pytest.mark.parametrize(("name", "by_itself"), [("mse", mse), ("hqq", hqq)])
def test_a_quantizer_that_needs_only_the_weight_needs_no_calibration(
    heavy: nn.Linear, name: str, by_itself: Callable[..., dict[str, torch.Tensor]]
) -> None:
    stored = quantize_layer("layer", heavy, Choice(INT4, quantizer=name), quantization=Quantization())
    assert_same(stored.tensors, by_itself(INT4, heavy.weight.detach()))


@pytest.mark.parametrize("quantizer", ["mse", "hqq", "gptq", "gptq-trajectory"])
@pytest.mark.parametrize("format", [format_named(n) for n in ("int4", "int3-rot", "nf4", "fp8", "int8")], ids=str)
def test_rounded_weights_of_the_calibration_are_stored_bit_for_bit(
    heavy: nn.Linear, quantizer: str, format: Any
) -> None:
    choice = Choice(format, True, quantizer)
    made = format.quantize(torch.randn(4, 64))  # of another weight, so that it cannot be made again
    rounded = {RoundedKey.of("layer", choice, s): t for s, t in made.items()}
    calibration = Calibration({"layer": torch.ones(64)}, rounded)
    stored = quantize_layer("layer", heavy, choice, quantization=Quantization(calibration=calibration))
    assert stored.tensors.keys() == made.keys()
    assert all(torch.equal(stored.tensors[s].view(torch.uint8), made[s].view(torch.uint8)) for s in made)
    delta = format.dequantize(made, (4, 64), torch.float32) - heavy.weight.detach()
    expected = heavy.bias.detach().double() - delta.double().sum(1)
    torch.testing.assert_close(stored.bias.double(), expected, rtol=2**-10, atol=2**-10)


def test_weights_rounded_for_another_choice_are_not_used(heavy: nn.Linear) -> None:
    made = INT4.quantize(torch.randn(4, 64))
    others = [("layer", Choice(INT4, quantizer="gptq")), ("layer.2", Choice(INT4, quantizer="mse"))]
    rounded = {RoundedKey.of(name, choice, s): t for name, choice in others for s, t in made.items()}
    calibration = Calibration(rounded=rounded)
    for quantizer, expected in (("mse", mse(INT4, heavy.weight.detach())), ("rtn", INT4.quantize(heavy.weight))):
        stored = quantize_layer(
            "layer", heavy, Choice(INT4, quantizer=quantizer), quantization=Quantization(calibration=calibration)
        )
        assert_same(stored.tensors, expected)


@pytest.mark.parametrize("quantizer", ["gptq", "gptq-trajectory"])
@pytest.mark.parametrize("missing", ["weight_packed", "weight_zero", "everything"])
def test_missing_weights_of_a_hessian_quantizer_are_an_error_with_the_remedy(
    heavy: nn.Linear, quantizer: str, missing: str
) -> None:
    choice = Choice(INT4, quantizer=quantizer)
    made = INT4.quantize(heavy.weight.detach())
    rest = {s: t for s, t in made.items() if missing not in (s, "everything")}
    kept = Calibration(rounded={RoundedKey.of("mid.to_q", choice, s): t for s, t in rest.items()})
    with pytest.raises(BitPolicyError, match=rf"layer mid\.to_q was rounded by {quantizer}, .*or set quantizer: rtn"):
        quantize_layer("mid.to_q", heavy, choice, quantization=Quantization(calibration=kept))


@pytest.mark.parametrize("quantizer", ["mse", "gptq"])
@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("weight_packed", torch.zeros(4, 33, dtype=torch.uint8)),
        ("weight_packed", torch.zeros(4, 32, dtype=torch.int8)),
        ("weight_scale", torch.ones(4, 1)),
        ("weight_zero", torch.zeros(5, 1, dtype=torch.uint8)),
    ],
    ids=["longer rows", "signed", "float32", "more rows"],
)
def test_weights_rounded_for_another_layer_are_refused(
    heavy: nn.Linear, quantizer: str, suffix: str, tensor: torch.Tensor
) -> None:
    choice = Choice(INT4, quantizer=quantizer)
    made = {**INT4.quantize(heavy.weight.detach()), suffix: tensor}
    calibration = Calibration(rounded={RoundedKey.of("layer", choice, s): t for s, t in made.items()})
    with pytest.raises(
        BitPolicyError, match=r"layer layer: .*calibration.*shapes of int\d.*; use the calibration\.safetensors"
    ):
        quantize_layer("layer", heavy, choice, quantization=Quantization(calibration=calibration))


def test_the_error_for_a_weight_that_is_not_finite_names_the_layer() -> None:
    layer = nn.Linear(64, 4)
    layer.weight.data[0] = float("nan")
    for quantizer in ("rtn", "mse", "hqq"):
        with pytest.raises(FormatError, match=r"layer mid\.to_q: .*keep this layer at fp16"):
            quantize_layer("mid.to_q", layer, Choice(INT4, quantizer=quantizer), quantization=Quantization())


def test_the_error_for_a_rotation_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(BitPolicyError, match="layer conv_in: "):
        quantize_layer("conv_in", nn.Conv2d(4, 8, 3), Choice(format_named("int4-rot")), quantization=Quantization())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_storage_changes_a_model_once(toy_unet: Model, storage: torch.dtype) -> None:
    exact = bits(toy_unet)
    to_storage(toy_unet, storage)
    rounded = bits(toy_unet)
    assert_same(rounded, {name: tensor.to(storage).float() for name, tensor in exact.items()})
    to_storage(toy_unet, storage)
    assert_same(bits(toy_unet), rounded)


def test_a_value_that_storage_cannot_hold_is_named(toy_unet: Model) -> None:
    toy_unet.conv_out.bias.data[0] = 1e6
    with pytest.raises(BitPolicyError, match=r"conv_out\.bias has values that torch.float16 cannot hold; .*bfloat16"):
        to_storage(toy_unet, torch.float16)
    to_storage(toy_unet, torch.bfloat16)
