"""The pipeline that ships inside the package: its size, its licence, and that it draws without a network.

Skipped in a tree in which it has not been trained yet (scripts/train_reference.py --assemble).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpolicy.pipelines.loading import BUNDLED, BUNDLED_FOLDER, load_source
from bitpolicy.pipelines.prompting import default_requests
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow.plan import default_call

pytestmark = pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model_index.json").is_file(), reason="the bundled pipeline is not in this tree"
)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bundled() -> Any:
    """Loaded as `search-policy --budget 5MB` loads it, with every connection refused."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", refuse)
        yield load_source(device="cpu")


@pytest.fixture(scope="module")
def images(bundled: Any) -> dict[str, torch.Tensor]:
    """Four guided steps of three prompts."""
    samples = [Sample(prompt, 0) for prompt in ("red heart", "cat face", "pizza")]
    loop = Trajectories(bundled.pipe, ["unet"], default_call(bundled.pipe, bundled=True) | {"num_inference_steps": 4})
    return {sample.prompt: image for sample, (image, _) in zip(samples, loop.images(samples), strict=True)}


def test_the_denoiser_has_11_to_12_megabytes_of_float16() -> None:
    tensors = load_file(BUNDLED_FOLDER / UNET).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert 11e6 <= sum(tensor.nbytes for tensor in tensors) <= 12e6


def test_the_whole_folder_has_at_most_24_megabytes() -> None:
    assert sum(path.stat().st_size for path in BUNDLED_FOLDER.rglob("*") if path.is_file()) <= 24e6


def test_it_is_a_stable_diffusion_pipeline_with_every_kind_of_layer(bundled: Any) -> None:
    assert type(bundled.pipe).__name__ == "StableDiffusionPipeline"
    assert (bundled.id, bundled.components, bundled.storage) == (BUNDLED, ["unet"], torch.float16)
    roles = {layer.role for layer in inventory(bundled.target)}
    assert {"input_stem", "conv", "shortcut", "resample", "timestep_embedding", "output_head"} <= roles
    assert {"attention_qkv", "cross_attention_qkv", "feed_forward"} <= roles
    assert "other" not in roles


def test_it_draws_the_prompts_and_not_a_constant(images: dict[str, torch.Tensor]) -> None:
    for image in images.values():
        assert image.shape == (3, 64, 64)
        assert torch.isfinite(image).all()
        assert image.std() > 0.05
    heart, cat, pizza = images.values()
    assert (heart - cat).abs().mean() > 0.02
    assert (cat - pizza).abs().mean() > 0.02


def test_a_red_heart_is_red(images: dict[str, torch.Tensor]) -> None:
    red, green, blue = images["red heart"][:, 24:40, 24:40].mean((1, 2)).tolist()
    assert red > green + 0.1
    assert red > blue + 0.1


@pytest.mark.parametrize(
    ("name", "words"), [("README.md", ("Noto", "Apache", "license: apache-2.0")), ("LICENSE", ("Apache License",))]
)
def test_it_states_its_origin_and_licence(name: str, words: tuple[str, ...]) -> None:
    text = (BUNDLED_FOLDER / name).read_text(encoding="utf-8")
    assert [word for word in words if word not in text] == []


def test_its_prompts_fit_its_text_encoder(bundled: Any) -> None:
    limit = bundled.pipe.tokenizer.model_max_length
    prompts = default_requests(bundled.pipe, bundled=True)
    tokens = {prompt: len(bundled.pipe.tokenizer(prompt).input_ids) for prompt in prompts}
    assert {prompt: count for prompt, count in tokens.items() if count > limit} == {}


def test_its_tokenizer_knows_the_words_of_its_prompts(bundled: Any) -> None:
    """CLIP's tokenizer writes its end token for unknown words."""
    tokenizer = bundled.pipe.tokenizer
    for prompt in default_requests(bundled.pipe, bundled=True):
        words = tokenizer(prompt, add_special_tokens=False).input_ids
        assert words
        assert {tokenizer.unk_token_id, tokenizer.eos_token_id}.isdisjoint(words)


def test_a_dry_run_needs_no_model_and_no_network(command: Callable[..., Any], here: Path) -> None:
    outcome = command("--budget", "5MB", "--dry-run")
    assert outcome.code == 0
    for shown in (BUNDLED, "16 calibration", "nothing was written", "'num_inference_steps': 20"):
        assert shown in outcome.out
    assert list(here.iterdir()) == []
