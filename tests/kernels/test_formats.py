"""Names of formats: how they are read, and what a wrong one is told."""

from __future__ import annotations

import pytest

from bitpolicy.kernels.errors import BitPolicyError, FormatError
from bitpolicy.kernels.formats import DEFAULT, FP16, format_named, from_parameters, parse_formats


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("int4,int8,fp16", ["int4", "int8", "fp16"]),
        ("int8", ["int8", "fp16"]),
        ("fp16,int4", ["int4", "fp16"]),
        (" INT4 , int8 ,", ["int4", "int8", "fp16"]),
        ("int4 int4-g32", ["int4", "int4-g32", "fp16"]),
        ("int4,int4,int8,int4", ["int4", "int8", "fp16"]),
        (["int8", "int4"], ["int8", "int4", "fp16"]),
        (DEFAULT, ["int4", "int8", "fp16"]),
        ("fp16", ["fp16"]),
    ],
)
def test_a_list_of_names_is_read_in_order_with_fp16_at_the_end(text: str | list[str], names: list[str]) -> None:
    assert [format.name for format in parse_formats(text)] == names


@pytest.mark.parametrize("text", ["", " ", ",", []])
def test_no_format_at_all_is_told_what_to_write(text: str | list[str]) -> None:
    with pytest.raises(FormatError, match="--formats int4,int8,fp16"):
        parse_formats(text)


@pytest.mark.parametrize("name", ["int3", "int4_g32", "int4-g7", "4", "int4;int8"])
def test_an_unknown_name_is_told_which_there_are(name: str) -> None:
    with pytest.raises(FormatError, match=rf"unknown format '{name}'; write any of int4, int4-g32, .*int8, fp16"):
        format_named(name)


def test_a_format_error_is_a_mistake_of_the_user() -> None:
    assert issubclass(FormatError, BitPolicyError)


def test_names_are_read_in_any_case() -> None:
    assert format_named(" FP16 ") is FP16


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("int4", {"kind": "affine", "bits": 4, "group": 32, "symmetric": False}),
        ("int4", {"kind": "affine", "bits": 4, "group": 64}),
        ("int8", {"kind": "affine", "bits": 8, "group": "channel", "symmetric": True, "rotation": "hadamard"}),
        ("fp16", {}),
    ],
)
def test_a_name_that_meant_something_else_is_refused(name: str, parameters: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="use the bitpolicy that wrote it"):
        from_parameters(name, parameters)
