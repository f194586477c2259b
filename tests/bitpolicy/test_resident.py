"""The memory of a packed pipeline: the bytes of its file, and the layouts that kernels prepare from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bitpolicy

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def loaded(finished: Any) -> Any:
    return bitpolicy.load_pipeline(finished.folder / "checkpoint")


def drawn(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    pipe("cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent")


def file_bytes(finished: Any) -> int:
    return sum(tensor.nbytes for tensor in load_file(finished.folder / "checkpoint" / UNET).values())


def test_it_holds_the_bytes_of_its_file(loaded: Any, finished: Any) -> None:
    before = bitpolicy.resident_bytes(loaded.unet)
    assert before == bitpolicy.resident_bytes(loaded.unet.half())
    assert before.stored == pytest.approx(file_bytes(finished), rel=0.01)
    loaded.to(torch.float32)
    drawn(loaded)
    assert bitpolicy.resident_bytes(loaded.unet).layouts == 0  # exact kernels keep none


def test_layouts_of_8_bit_kernels_are_counted_and_can_be_avoided(loaded: Any, finished: Any) -> None:
    loaded.to(torch.float32)
    layers = bitpolicy.set_compute(loaded, "int8")
    drawn(loaded)
    found = bitpolicy.resident_bytes(loaded.unet)
    weights = [loaded.unet.get_submodule(name.removeprefix("unet.")).weight_shape for name in layers]
    codes = sum(torch.Size(shape).numel() for shape in weights)
    assert found.layouts == 0 or codes <= found.layouts <= 2 * codes + 100 * sum(shape[0] for shape in weights)

    again = bitpolicy.load_pipeline(finished.folder / "checkpoint", torch.float32)
    bitpolicy.set_compute(again, "int8", low_memory=True)
    drawn(again)
    assert bitpolicy.resident_bytes(again.unet).layouts == 0
