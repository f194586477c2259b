"""Which format is the nearest, and the error for layers in a format that the target does not hold."""

from __future__ import annotations

import pytest
import torch

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.exporters.exporter import Layer
from bitpolicy.policies.exporters.requantize import TargetError, nearest, refuse, relative_error, requantized
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.policies.policy import Choice


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()


@pytest.mark.parametrize(
    ("target", "shape", "name", "expected"),
    [
        ("comfy", (16, 128), "int8-g64", "int8"),
        ("comfy", (16, 128), "int6", "int6-channel-sym"),
        ("comfy", (16, 128), "fp8", "int8"),
        ("comfy", (16, 96), "int4", "int4-g32-sym"),  # 64 does not divide 96; three scales are as many bytes
        ("comfy", (16, 64, 3, 3), "int4", "fp16"),
        ("sdnq", (16, 128), "int4-rot", "int4"),
        ("torchao", (16, 64, 3, 3), "int5", "int5-channel"),
        ("modelopt", (16, 128), "int8-asym", "int8-g64"),  # a float32 for a channel is as many bytes, less exact
        ("modelopt", (16, 128), "int2-channel", "int3-channel-sym"),
        ("modelopt", (16, 48, 3, 3), "int4-g32", "int4-channel-sym"),
    ],
)
def test_the_nearest_has_as_many_bits_or_more_and_about_the_bytes(
    target: str, shape: tuple[int, ...], name: str, expected: str
) -> None:
    layer = Layer("a", "Linear" if len(shape) == 2 else "Conv2d", shape, format_named(name))
    assert nearest(exporter_named(target), layer, weight(*shape)).name == expected


def test_among_equally_close_formats_the_one_with_the_least_error_is_chosen() -> None:
    """int4-g32-sym and int4-sym are both an eighth of a bit from int4."""
    layer = Layer("a", "Linear", (16, 128), format_named("int4"))
    found = nearest(exporter_named("modelopt"), layer, weight(16, 128))
    near = {f: f.nbytes((16, 128), torch.float16) for f in map(format_named, ("int4-g32-sym", "int4", "int4-sym"))}
    sizes = [near[format_named(name)] for name in ("int4-g32-sym", "int4", "int4-sym")]
    assert sizes[0] - sizes[1] == sizes[1] - sizes[2] > 0
    assert found.name == "int4-g32-sym"


@pytest.mark.parametrize(("before", "after"), [("rtn", "rtn"), ("hqq", "hqq"), ("mse", "mse")])
def test_the_quantizer_stays_and_the_error_is_that_of_the_original(before: str, after: str) -> None:
    module = torch.nn.Linear(128, 16)
    layer = Layer.of("a", module, format_named("int6"))
    choice = Choice(format_named("int6"), True, before)
    one = requantized(exporter_named("comfy"), layer, module.weight.detach().half(), choice, Calibration())
    assert one.after == Choice(format_named("int6-channel-sym"), True, after)
    original = module.weight.detach().half()
    if before == "rtn":
        format = one.after.format
        assert one.error_after == relative_error(format, format.quantize(original), original)
    assert 0 < one.error_before < 0.02
    assert 0 < one.error_after < 0.03


def test_requantizing_to_fp16_drops_the_bias_correction() -> None:
    module = torch.nn.Conv2d(16, 8, 3)
    choice = Choice(format_named("int8"), bias_correction=True)
    layer = Layer.of("a", module, choice.format)
    one = requantized(exporter_named("comfy"), layer, module.weight.detach().half(), choice, Calibration())
    assert one.after == Choice(format_named("fp16"))
    assert one.error_after == 0.0


def test_layers_that_gptq_rounded_are_requantized_by_mse() -> None:
    module = torch.nn.Linear(128, 16)
    choice = Choice(format_named("int6"), quantizer="gptq")
    layer = Layer.of("a", module, choice.format)
    made = choice.format.quantize(module.weight.detach().half())
    kept = Calibration(rounded={RoundedKey.of("a", choice, suffix): tensor for suffix, tensor in made.items()})
    one = requantized(exporter_named("comfy"), layer, module.weight.detach().half(), choice, kept)
    assert one.after.quantizer == "mse"


def test_a_refusal_counts_layers_by_format_and_names_the_first_ones() -> None:
    layers = [
        Layer("a", "Linear", (8, 8), format_named("nf4")),
        Layer("b", "Conv2d", (8, 8, 3, 3), format_named("int8")),
        Layer("c", "Conv2d", (8, 8, 3, 3), format_named("int8")),
    ]
    message = (
        r"ComfyUI cannot hold 3 layers in the policy's formats \(1 in nf4, Linear; 2 in int8, Conv2d\): a, b, c\. "
        r".* --requantize, or search again with --target comfy --formats int4-convrot,.*,fp16; "
        r"`bitpolicy formats --target comfy`"
    )
    with pytest.raises(TargetError, match=message):
        refuse(exporter_named("comfy"), {layer.name: layer for layer in layers})
    refuse(exporter_named("comfy"), {})
