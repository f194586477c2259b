"""Constraints that the user fixes in advance."""

from __future__ import annotations

import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.search.constraints import joined, not_held, pinned, require_one_pin, shared_qkv
from bitpolicy.sensitivity.inventory import Layer


def layer(name: str, shape: tuple[int, ...] = (64, 64)) -> Layer:
    return Layer(name, "Linear" if len(shape) == 2 else "Conv2d", shape, True, "other", "ends")


LAYERS = [
    layer(name)
    for name in (
        "conv_in",
        "time_embedding.linear_1",
        "block.0.attn.to_q",
        "block.0.attn.to_k",
        "block.0.attn.to_v",
        "block.0.attn.to_out.0",
        "block.1.attn.to_q",
        "block.1.attn.add_k_proj",
        "block.1.attn.add_v_proj",
    )
]


def test_a_glob_keeps_every_layer_it_matches_and_later_ones_win() -> None:
    found = pinned(["*attn*=int8", "block.0.attn.to_q=fp16", "conv_in=int4-g32"], LAYERS)
    assert found["conv_in"] == format_named("int4-g32")
    assert found["block.0.attn.to_q"] == FP16
    assert {name for name, f in found.items() if f == format_named("int8")} == {
        x.name for x in LAYERS if "attn" in x.name and x.name != "block.0.attn.to_q"
    }
    assert "time_embedding.linear_1" not in found


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("conv_in", "is not GLOB=FORMAT"),
        ("=fp16", "is not GLOB=FORMAT"),
        ("conv_inn=fp16", "matches none of the 9 layers"),
        ("conv_in=int9", "unknown format 'int9'"),
    ],
)
def test_an_invalid_rule_is_refused_with_the_reason(rule: str, reason: str) -> None:
    with pytest.raises(BitPolicyError, match=reason):
        pinned([rule], LAYERS)


def test_a_format_that_does_not_fit_the_shape_is_refused() -> None:
    with pytest.raises(BitPolicyError, match=r"narrow .*\(8, 3\).* int4-rot "):
        pinned(["narrow=int4-rot"], [layer("narrow", (8, 3))])


def test_query_key_and_value_of_one_attention_are_grouped() -> None:
    assert shared_qkv(LAYERS) == [
        ["block.0.attn.to_q", "block.0.attn.to_k", "block.0.attn.to_v"],
        ["block.1.attn.add_k_proj", "block.1.attn.add_v_proj"],
    ]


def test_formats_a_program_cannot_hold_are_barred_per_layer() -> None:
    layers = [layer("to_q"), layer("conv", (64, 64, 3, 3))]
    formats = [format_named(name) for name in ("int4", "int8", "nf4", "fp16")]
    found = {(name, format.name) for name, format in not_held("comfy", layers, formats, {})}
    assert found == {("to_q", "nf4"), ("conv", "int4"), ("conv", "int8"), ("conv", "nf4")}
    assert {(name, f.name) for name, f in not_held("sdnq", layers, formats, {})} == {("to_q", "nf4"), ("conv", "nf4")}


def test_merged_layers_take_no_format_with_one_scale_for_the_whole_tensor() -> None:
    layers, formats = [layer("to_q"), layer("proj")], [format_named(name) for name in ("nvfp4", "fp8-tensor", "mxfp8")]
    found = {(name, format.name) for name, format in not_held("comfy", layers, formats, {}, merged={"to_q"})}
    assert found == {("to_q", "nvfp4"), ("to_q", "fp8-tensor")}


def test_keeping_a_format_the_program_cannot_hold_is_refused() -> None:
    layers, int8 = [layer("conv", (64, 64, 3, 3))], format_named("int8")
    with pytest.raises(BitPolicyError, match=r"--keep conv=int8: ComfyUI cannot hold that; `bitpolicy formats --tar"):
        not_held("comfy", layers, [int8], {"conv": int8})


def test_groups_that_overlap_become_one() -> None:
    assert joined([["a", "b"], ["c"], ["d", "e"], ["e", "b", "f"]]) == [["c"], ["a", "b", "d", "e", "f"]]
    assert joined([]) == []


def test_layers_that_share_a_format_cannot_be_kept_at_two() -> None:
    int8 = format_named("int8")
    require_one_pin([["a", "b", "c"]], {"a": int8, "c": int8, "d": FP16})
    with pytest.raises(BitPolicyError, match=r"a and c must share a format, .* --keep gives them int8 and fp16"):
        require_one_pin([["a", "b", "c"]], {"a": int8, "c": FP16})
