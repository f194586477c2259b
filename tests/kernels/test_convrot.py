"""ComfyUI's rotated formats, against the explicit matrix and, if it is installed, comfy-kitchen."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch

from bitpolicy.kernels.formats.convrot import regular_hadamard
from bitpolicy.kernels.formats.named import CONVROT, all_formats, format_named, from_parameters

FORMATS = pytest.mark.parametrize("format", CONVROT, ids=lambda f: f.name)
FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)


def matrix(size: int) -> np.ndarray:
    powers = int(np.log2(size)) // 2
    return reduce(np.kron, [FOUR] * powers) / np.sqrt(size)


def weight(rows: int = 6, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_butterflies_equal_the_matrix_and_are_their_own_inverse(size: int) -> None:
    rows = weight()
    expected = rows.double().numpy().reshape(6, -1, size) @ matrix(size)
    np.testing.assert_allclose(regular_hadamard(rows, size).numpy(), expected.reshape(6, -1), atol=1e-5)
    torch.testing.assert_close(regular_hadamard(regular_hadamard(rows, size), size), rows)


@FORMATS
def test_codes_are_within_half_a_step_in_the_rotated_domain(format: Any) -> None:
    original = weight()
    stored = format.quantize(original)
    back = format.dequantize(stored, original.shape, torch.float32)
    apart = (back - original).double().numpy().reshape(6, -1, format.size) @ matrix(format.size)
    assert np.all(np.abs(apart.reshape(6, -1)) <= 0.501 * stored["weight_scale"].numpy()[:, None])
    assert float((back - original).norm() / original.norm()) < (0.02 if format.bits == 8 else 0.2)


@FORMATS
def test_stored_bytes_match_the_specification_and_the_name_is_known(format: Any) -> None:
    specs = format.tensors((6, 512), torch.float16)
    stored = format.quantize(weight())
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == {
        n: (s.dtype, s.shape) for n, s in specs.items()
    }
    assert format.nbytes((6, 512), torch.float16) == 6 * 512 * format.bits // 8 + 6 * 4
    assert from_parameters(format.name, format.parameters()) == format == format_named(format.name.upper())
    assert format not in all_formats()


@FORMATS
@pytest.mark.parametrize("shape", [(6, 100), (6, 512, 1, 1), (6, 512, 3)], ids=str)
def test_it_fits_only_linear_layers_with_whole_blocks(format: Any, shape: tuple[int, ...]) -> None:
    assert format.fits((6, 512))
    assert not format.fits(shape)


@FORMATS
def test_a_hessian_is_rotated_like_the_rows(format: Any) -> None:
    inputs = weight(40)
    hessian = inputs.mT @ inputs
    rotated = regular_hadamard(inputs, format.size)
    torch.testing.assert_close(format.rotated_hessian(hessian), rotated.mT @ rotated, atol=1e-3, rtol=1e-4)


@FORMATS
def test_comfy_kitchen_rounds_and_reads_the_same_codes(format: Any) -> None:
    layouts = pytest.importorskip("comfy_kitchen.tensor", reason="pip install comfy-kitchen")
    original = weight()
    ours = format.codes(format.quantize(original), original.shape)
    if format.bits == 8:
        theirs, params = layouts.TensorWiseINT8Layout.quantize(
            original, per_channel=True, convrot=True, convrot_groupsize=format.size
        )
    else:
        packed, params = layouts.TensorCoreConvRotW4A4Layout.quantize(original, convrot_groupsize=format.size)
        nibbles = torch.stack((packed & 15, packed.view(torch.uint8) >> 4), dim=-1).flatten(-2).to(torch.int8)
        theirs = torch.where(nibbles > 7, nibbles - 16, nibbles)
    assert float((ours != theirs).float().mean()) < 1e-3, "ties may fall either way"
    torch.testing.assert_close(params.scale.flatten(), format.quantize(original)["weight_scale"])
