"""Names of formats: parsing, the shortest form, and the errors for wrong names."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError, FormatError
from bitpolicy.kernels.formats.named import (
    CONVROT,
    FP16,
    HARDWARE,
    INT8,
    affine,
    all_formats,
    format_named,
    from_parameters,
    parse_formats,
)
from bitpolicy.kernels.names import DEFAULT_FORMATS


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("int4,int8,fp16", ["int4", "int8", "fp16"]),
        ("int8", ["int8", "fp16"]),
        ("fp16,int4", ["int4", "fp16"]),
        (" INT4 , int8 ,", ["int4", "int8", "fp16"]),
        ("int4 int4-g32", ["int4", "int4-g32", "fp16"]),
        ("int4,int4,int8,int4", ["int4", "int8", "fp16"]),
        ("int4-g64-asym,int4,int4-g64,int4-asym", ["int4", "fp16"]),
        (["int8", "int4"], ["int8", "int4", "fp16"]),
        ("nvfp4,int8,fp8-row,mxfp4", ["nvfp4", "int8", "fp8", "mxfp4", "fp16"]),
        ("nf4,fp8,int3-channel-sym,int6-rot", ["nf4", "fp8", "int3-channel-sym", "int6-rot", "fp16"]),
        (DEFAULT_FORMATS, ["int4", "int8", "fp16"]),
        ("fp16", ["fp16"]),
    ],
)
def test_names_are_parsed_in_order_with_fp16_last(text: str | list[str], names: list[str]) -> None:
    assert [format.name for format in parse_formats(text)] == names


@pytest.mark.parametrize("text", ["all", " ALL ", "int4,all", ["int8", "all"]])
def test_all_means_every_format(text: str | list[str]) -> None:
    assert parse_formats(text) == all_formats()


@pytest.mark.parametrize("text", ["", " ", ",", []])
def test_an_empty_list_is_refused_with_an_example(text: str | list[str]) -> None:
    with pytest.raises(FormatError, match="--formats int4,int8,fp16"):
        parse_formats(text)


def test_every_format_is_found_by_its_own_name_and_its_parameters() -> None:
    for format in (*all_formats(), *HARDWARE):
        assert format_named(format.name) == format
        assert format_named(format.name.upper()).name == format.name
        assert from_parameters(format.name, format.parameters()) == format


def test_every_combination_of_width_group_symmetry_and_rotation_exists_once() -> None:
    formats = all_formats()
    assert formats[-1] is FP16
    assert set(formats).isdisjoint(HARDWARE)
    assert len({format.name for format in formats}) == len(formats)
    parameters = [tuple(sorted(format.parameters().items())) for format in formats]
    assert len(set(parameters)) == len(formats)
    found = {
        (p["bits"], p["group"], p["symmetric"], "rotation" in p) for p in map(dict, parameters) if p["kind"] == "affine"
    }
    groups = (32, 64, 128, "channel")
    every = set(itertools.product(range(2, 9), groups, (True, False), (False, True)))
    assert found == {(b, g, s, r) for b, g, s, r in every if not (r and g == "channel")}
    assert {format.name for format in formats if format.parameters()["kind"] != "affine"} == {"nf4", "fp8", "fp16"}


def test_names_are_as_short_as_possible() -> None:
    """If any part of a name is removed, the rest means something else or is invalid."""
    for format in all_formats():
        first, *options = format.name.split("-")
        for left_out in range(len(options)):
            shorter = "-".join([first, *options[:left_out], *options[left_out + 1 :]])
            assert _meaning(shorter) != format, format.name


def _meaning(name: str) -> Any:
    try:
        return format_named(name)
    except FormatError:
        return None


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("int4-g64-asym", "int4"),
        ("int4-g64", "int4"),
        ("int4-asym", "int4"),
        ("int4-g64-sym", "int4-sym"),
        ("int2-g32-asym", "int2-g32"),
        ("int3-channel-asym", "int3-channel"),
        ("int5-g64-sym-rot", "int5-sym-rot"),
        ("int5-g64-asym-rot", "int5-rot"),
        ("int8-channel-sym", "int8"),
        ("int8-channel", "int8"),
        ("int8-sym", "int8"),
        ("int8-channel-asym", "int8-asym"),
        ("int8-g64-sym", "int8-g64"),
        ("int8-g64-sym-rot", "int8-g64-rot"),
        ("fp8-row", "fp8"),
        (" Int8-G128-Asym ", "int8-g128-asym"),
    ],
)
def test_defaults_may_be_written_out(written: str, name: str) -> None:
    assert format_named(written).name == name
    assert format_named(written) == format_named(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("int4", {"kind": "affine", "bits": 4, "group": 64, "symmetric": False}),
        ("int8", {"kind": "affine", "bits": 8, "group": "channel", "symmetric": True}),
        ("int8-g32-asym", {"kind": "affine", "bits": 8, "group": 32, "symmetric": False}),
        ("int3-g128-sym", {"kind": "affine", "bits": 3, "group": 128, "symmetric": True}),
        ("int2-channel", {"kind": "affine", "bits": 2, "group": "channel", "symmetric": False}),
        ("int6-rot", {"kind": "affine", "bits": 6, "group": 64, "symmetric": False, "rotation": "hadamard"}),
        ("nf4", {"kind": "codebook", "bits": 4, "codebook": "nf4", "group": 64}),
        ("fp8", {"kind": "float", "bits": 8, "variant": "e4m3", "group": "channel"}),
        ("fp8-tensor", {"kind": "float", "bits": 8, "variant": "e4m3", "group": "tensor"}),
        ("mxfp8", {"kind": "float", "bits": 8, "variant": "e4m3", "group": 32, "scale": "e8m0"}),
        ("mxfp4", {"kind": "float", "bits": 4, "variant": "e2m1", "group": 32, "scale": "e8m0"}),
        (
            "nvfp4",
            {"kind": "float", "bits": 4, "variant": "e2m1", "group": 16, "scale": "e4m3", "tensor_scale": "float32"},
        ),
        ("fp16", {"kind": "float", "bits": 16}),
    ],
)
def test_a_policy_records_what_a_name_means(name: str, parameters: dict[str, object]) -> None:
    assert format_named(name).parameters() == parameters


def test_parameters_make_the_format_under_its_shortest_name() -> None:
    assert affine(8, None, True) is INT8
    assert affine(8, None, False).name == "int8-asym"
    assert affine(4, 64, False) == format_named("int4")
    assert affine(4, 64, True, rotated=True).name == "int4-sym-rot"


@pytest.mark.parametrize(
    "name",
    [
        *("int1", "int9", "int", "int4_g32", "int4-g7", "int4-g", "int4-g256", "4", "int4;int8", "int16", "fp4", "nf3"),
        *(
            "int4-sym-g32",
            "int4-rot-sym",
            "int4-sym-asym",
            "int4-sym-sym",
            "int4-g32-g64",
            "int4-",
            "nf4-g32",
            "fp8-rot",
        ),
        *("int44", "uint4", "int4-asymm", "int4-g032"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        FormatError, match=rf"unknown format '{name}'; write int2 to int8.* -rot; nf4, fp8, fp16; or all"
    ):
        format_named(name)


@pytest.mark.parametrize("name", ["int4-channel-rot", "int8-rot", "int8-sym-rot", "int2-channel-sym-rot"])
def test_rotating_a_whole_row_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(FormatError, match=f"unknown format '{name}': .*32, 64 or 128 weights; add -g64"):
        format_named(name)


def test_a_format_error_is_a_user_error() -> None:
    assert issubclass(FormatError, BitPolicyError)


def test_names_are_case_insensitive() -> None:
    assert format_named(" FP16 ") is FP16


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("int4", {"kind": "affine", "bits": 4, "group": 32, "symmetric": False}),
        ("int4", {"kind": "affine", "bits": 4, "group": 64}),
        ("int8", {"kind": "affine", "bits": 8, "group": "channel", "symmetric": True, "rotation": "hadamard"}),
        ("int4-rot", {"kind": "affine", "bits": 4, "group": 64, "symmetric": False}),
        ("nf4", {"kind": "codebook", "bits": 4, "codebook": "fp4", "group": 64}),
        ("fp16", {}),
    ],
)
def test_a_name_with_other_parameters_is_refused(name: str, parameters: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="use the bitpolicy that wrote it"):
        from_parameters(name, parameters)


def test_bytes_grow_with_the_width_and_shrink_with_the_group_size() -> None:
    shape, half = (64, 48, 3, 3), torch.float16  # K = 432: seven runs of 64
    sizes = [affine(bits, 64, False).nbytes(shape, half) for bits in range(2, 9)]
    assert sizes == [64 * (432 * bits // 8 + 7 * 3) for bits in range(2, 9)]
    assert affine(3, 32, True).nbytes(shape, half) == 64 * (162 + 14 * 2)
    assert affine(3, 128, True).nbytes(shape, half) == 64 * (162 + 4 * 2)
    assert affine(3, None, True).nbytes(shape, half) == 64 * (162 + 2)
    assert format_named("nf4").nbytes(shape, half) == 64 * (216 + 7 * 2)
    assert format_named("fp8").nbytes(shape, half) == format_named("int8").nbytes(shape, half) == 64 * (432 + 4)
    assert format_named("fp8-tensor").nbytes(shape, half) == 64 * 432 + 4
    assert format_named("mxfp8").nbytes(shape, half) == 64 * (432 + 14)
    assert format_named("mxfp4").nbytes(shape, half) == 64 * (216 + 14)
    assert format_named("nvfp4").nbytes(shape, half) == 64 * (216 + 27) + 4
    assert FP16.nbytes(shape, half) == 64 * 432 * 2


def test_a_format_equals_its_copies_and_names_no_address() -> None:
    for format in (*all_formats(), *HARDWARE, *CONVROT):
        copied = copy.deepcopy(format)
        assert (copied, hash(copied)) == (format, hash(format)), format.name
        assert " at 0x" not in repr(format)
