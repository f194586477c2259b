"""Every test runs offline, on one thread for each worker, and without a display.

The fixtures are what several folders of tests share: tiny random pipelines, and a reader of packed weights that was
written from the specification alone.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

# Read by these libraries when they are imported, so set before any test module is.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two workers with a thread for each core would wait for each other; and one thread adds in one order."""
    import torch

    torch.set_num_threads(1)


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
            tokenizer=toy_tokenizer,
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


# A second reader of the wire format, weight by weight, which shares no code with ours.

WireReader = Callable[[str, Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray]


@pytest.fixture(scope="session")
def read_wire() -> WireReader:
    """`read_wire("int4-g32", tensors, shape)`: the float32 weight that the stored tensors stand for."""

    def read(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        if name.startswith("int4"):
            return _read_int4(tensors, shape, group=int(name.partition("-g")[2] or 64))
        if name == "int8":
            rows = zip(tensors["weight_packed"], tensors["weight_scale"], strict=True)
            return np.stack([codes.astype(np.float32) * scale for codes, scale in rows])
        return tensors["weight"].astype(np.float32)

    return read


def _read_int4(tensors: Mapping[str, np.ndarray], shape: tuple[int, ...], group: int) -> np.ndarray:
    """The channel runs fastest, then the kernel's last axis; the even k lies in the low nibble."""
    out, channels, *kernel = shape
    weight = np.zeros(shape, np.float32)
    for row in range(out):
        places = itertools.product(*map(range, kernel), range(channels))
        for k, (*tap, channel) in enumerate(places):
            byte = int(tensors["weight_packed"][row, k // 2])
            code = byte >> 4 if k % 2 else byte & 0xF
            zero = int(tensors["weight_zero"][row, k // group])
            weight[(row, channel, *tap)] = (code - zero) * np.float32(tensors["weight_scale"][row, k // group])
    return weight
