"""Every test runs offline, on one thread for each worker, and without a display.

The fixtures are what several folders of tests share: tiny random pipelines, and a reader of packed weights that was
written from the specification alone.
"""

from __future__ import annotations

import atexit
import copy
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Read by these libraries when they are imported, so set before any test module is.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and the processes that tests start, share what is compiled
    os.environ["BITPOLICY_CACHE"] = tempfile.mkdtemp(prefix="bitpolicy-tests-")
    atexit.register(shutil.rmtree, os.environ["BITPOLICY_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import scipy.linalg
from toy_formats import E2M1_LEVELS, NF4_LEVELS


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two workers with a thread for each core would wait for each other; and one thread adds in one order."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Compiling takes minutes, each worker collects all tests, and most runs want a few."""
    before = _are_compiled()
    yield
    if _are_compiled() and not before:
        raise pytest.UsageError("the C++ kernels were compiled while tests were collected; do it in a fixture")


def _are_compiled() -> bool:
    extension = sys.modules.get("bitpolicy.kernels.cpu.extension")
    return extension is not None and extension._loaded.cache_info().currsize > 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


# Tiny models with random weights: they draw noise, but with the real classes. float32, in eval mode, new for each test.


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A CLIPTokenizer that knows printable ASCII, a letter a token."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


@pytest.fixture(scope="session")
def new_toy_unet() -> Callable[[], Any]:
    """Makes a UNet2DConditionModel of two levels with cross attention, shortcuts and resampling: 83 layers."""

    def new() -> Any:
        import torch
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()

    return new


@pytest.fixture(scope="session")
def new_toy_pipeline(toy_tokenizer: Any, new_toy_unet: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a StableDiffusionPipeline around such a U-Net that draws 16 x 16 pixels with DDIM."""

    def new() -> Any:
        import torch
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
        from transformers import CLIPTextConfig, CLIPTextModel

        unet = new_toy_unet()
        words = len(toy_tokenizer)
        text = CLIPTextConfig(
            vocab_size=words,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
        )
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        pipe = StableDiffusionPipeline(
            vae=vae.eval(),
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=copy.deepcopy(toy_tokenizer),  # saving it in a processor leaves a mark on it
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return new


@pytest.fixture
def toy_unet(new_toy_unet: Callable[[], Any]) -> Any:
    return new_toy_unet()


@pytest.fixture
def toy_pipeline(new_toy_pipeline: Callable[[], Any]) -> Any:
    return new_toy_pipeline()


# A second reader of the storage layout, weight by weight, which shares no code with ours.

StoredReader = Callable[[str, Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray]
Levels = Callable[[int, int, int], np.float32]
"""The level that a code, a row and a place along it name."""


@pytest.fixture(scope="session")
def read_stored() -> StoredReader:
    """`read_stored("int4-g32", tensors, shape)`: the float32 weight that the stored tensors stand for.

    Tensors are numpy arrays, float8 ones by their bytes. Exact but for rotated weights, which are rotated in float64.
    """

    def read(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        if name in ("int8", "fp8"):
            values = tensors["weight_packed"]
            values = values.astype(np.float32) if name == "int8" else np.vectorize(_e4m3, otypes=[np.float32])(values)
            return np.stack([row * scale for row, scale in zip(values, tensors["weight_scale"], strict=True)])
        if name == "fp16":
            return tensors["weight"].astype(np.float32)
        if name == "fp8-tensor":
            return np.vectorize(_e4m3, otypes=[np.float32])(tensors["weight_packed"]) * tensors["weight_scale"]
        if name in ("mxfp8", "mxfp4", "nvfp4"):
            return _from_stream(tensors, shape, 8 if name == "mxfp8" else 4, _scaled_float_levels(name, tensors))
        if name == "nf4":
            return _from_stream(tensors, shape, 4, _nf4_levels(tensors))
        return _read_affine(name, tensors, shape)

    return read


def _e4m3(byte: int) -> float:
    """One sign bit, four of the exponent with bias 7, three of the mantissa; no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 0xF, byte & 0b111
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (int(exponent) - 7)
    return -size if sign else size


def _scaled_float_levels(name: str, tensors: Mapping[str, np.ndarray]) -> Levels:
    """Small floats times the power of two of 32 weights, or the e4m3 number of 16 weights and the tensor's float32."""

    def level(code: int, row: int, k: int) -> np.float32:
        value = np.float32(_e4m3(code) if name == "mxfp8" else E2M1_LEVELS[code])
        if name == "nvfp4":
            return value * (np.float32(_e4m3(tensors["weight_scale"][row, k // 16])) * tensors["weight_scale_2"])
        return value * np.float32(2.0 ** (int(tensors["weight_scale"][row, k // 32]) - 127))

    return level


def _nf4_levels(tensors: Mapping[str, np.ndarray]) -> Levels:
    levels, scale = np.array(NF4_LEVELS, np.float32), tensors["weight_scale"]
    return lambda code, row, k: levels[code] * np.float32(scale[row, k // 64])


def _read_affine(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """int<bits>[-g<group> | -channel][-sym | -asym][-rot]: what is left out is g64-asym, for int8 channel-sym."""
    width, *options = name.split("-")
    bits = int(width.removeprefix("int"))
    symmetric = "sym" in options or (bits == 8 and "asym" not in options)
    groups = [option for option in options if option == "channel" or option[1:].isdigit()] or ["g64"]
    if groups == ["g64"] and bits == 8 and "g64" not in options:
        groups = ["channel"]
    group = math.prod(shape[1:]) if groups == ["channel"] else int(groups[0][1:])

    def level(code: int, row: int, k: int) -> np.float32:
        zero = 2 ** (bits - 1) if symmetric else int(tensors["weight_zero"][row, k // group])
        return (code - zero) * np.float32(tensors["weight_scale"][row, k // group])

    assert ("weight_zero" in tensors) == (not symmetric)
    return _from_stream(tensors, shape, bits, level, group if "rot" in options else 1)


def _from_stream(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, ...], bits: int, level: Levels, rotated: int = 1
) -> np.ndarray:
    """The channel runs fastest, then the kernel's last axis; a row is one number, its lowest bits the first code."""
    out, channels, *kernel = shape
    length = math.prod(shape[1:])
    rows = np.zeros((out, length), np.float32)
    for row in range(out):
        stream = int.from_bytes(tensors["weight_packed"][row].tobytes(), "little")
        assert stream >> (length * bits) == 0, "the padding is not zero"
        for k in range(length):
            rows[row, k] = level(stream >> (k * bits) & (2**bits - 1), row, k)
    if rotated > 1:
        rotation = scipy.linalg.hadamard(rotated).astype(np.float64) / math.sqrt(rotated)
        rows = (rows.reshape(out, -1, rotated).astype(np.float64) @ rotation).reshape(out, length).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(out, *kernel, channels), -1, 1))
