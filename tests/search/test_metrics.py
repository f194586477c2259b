"""Every metric gives numbers or explains why it cannot; networks come from a named folder or a cache."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.clip_score import Clip
from bitpolicy.search.quality.feature_network import FeatureNetwork
from bitpolicy.search.quality.frechet import frechet_distance
from bitpolicy.search.quality.metrics import METRICS, Comparison, Sets, measure, parse_metrics, perceptual_distance
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.perceptual import ALEXNET
from bitpolicy.search.quality.psnr import Paired, Unavailable

PROMPTS = ["a cat", "a dog", "a tree", "a house"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every connection fails, and the caches are empty."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture
def about() -> Comparison:
    draw = torch.Generator().manual_seed(0)
    reference = [torch.rand(3, 48, 48, generator=draw) for _ in PROMPTS]
    images = [(image + 0.05 * torch.randn(3, 48, 48, generator=draw)).clamp(0, 1) for image in reference]
    return Comparison(reference, images, (reference, images), PROMPTS)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline folder with a small network in it."""
    torch.manual_seed(0)
    network = FeatureNetwork("toy", 32, (8, 12))
    folder = tmp_path / "pipeline" / "features"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(network.config()))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder.parent


class FakeInception(nn.Module):
    """Has Inception's interface: `.layers`, 299 pixels per side, 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(16), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.manual_seed(0)
    torch.jit.script(FakeInception()).save(str(path))
    return path


@pytest.fixture(scope="session")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The convolutions of a random AlexNet, which is all that LPIPS needs."""
    path = tmp_path_factory.mktemp("alexnet") / ALEXNET
    torch.manual_seed(0)
    weights = torchvision.models.alexnet(weights=None).features.state_dict(prefix="features.")
    torch.save(weights, path)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any) -> Path:
    """A random CLIP model that reads ASCII and takes 32 x 32 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = len(toy_tokenizer)
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    text = {**tower, **ends, "vocab_size": words, "max_position_embeddings": 16}
    torch.manual_seed(1)
    vision = {**tower, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clips") / "clip"
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=copy.deepcopy(toy_tokenizer)).save_pretrained(folder)
    return folder


# What is asked for


def test_metrics_are_names_separated_by_commas() -> None:
    assert parse_metrics("psnr, SSIM,psnr") == ("psnr", "ssim")
    assert parse_metrics("all") == METRICS


@pytest.mark.parametrize("text", ["", ",", "psnr,fit", "fid-emoji"])
def test_unknown_metrics_are_refused(text: str) -> None:
    with pytest.raises(BitPolicyError, match="psnr, ssim, lpips, latent, fid, kid, clip"):
        parse_metrics(text)


def test_all_metrics_without_any_network(about: Comparison) -> None:
    """Metrics that need no network are measured; the others have a remedy and no number."""
    found = measure(METRICS, about, Networks())
    assert {name for name, result in found.items() if isinstance(result, Paired)} == {"psnr", "ssim", "latent"}
    missing = {name: result for name, result in found.items() if isinstance(result, Unavailable)}
    assert set(missing) == {"lpips", "fid", "kid", "clip"}
    for result in missing.values():
        assert set(result.as_dict()) == {"unavailable", "remedy"}
        assert "--features" in result.remedy
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in missing["lpips"].remedy
    assert "/metrics/inception-2015-12-05.pt" in missing["fid"].remedy
    assert "hf download openai/clip" in missing["clip"].remedy


def test_all_metrics_with_every_network(
    about: Comparison, pipeline: Path, inception: Path, alexnet: Path, clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "networks"
    folder.mkdir()
    shutil.copy(inception, folder)
    shutil.copytree(clip, folder / "clip")
    shutil.copy(alexnet, folder)
    networks = Networks(folder, pipeline)
    networks.require()
    found = measure(METRICS, about, networks)
    names = ["psnr", "ssim", "lpips", "lpips-toy", "latent", "fid", "fid-toy", "kid", "kid-toy", "clip"]
    assert list(found) == names
    assert not any(isinstance(result, Unavailable) for result in found.values())
    written = json.loads(json.dumps({name: result.as_dict() for name, result in found.items()}, allow_nan=False))
    assert (written["fid"]["network"], written["fid"]["features"]) == ("inception", 2048)
    assert (written["fid-toy"]["network"], written["fid-toy"]["features"]) == ("toy", 12)
    assert written["clip"]["of_reference"] is not None
    assert all(result.name == name for name, result in found.items() if isinstance(result, Paired | Sets))


# Distances between sets


def test_identical_images_have_distance_zero(about: Comparison, pipeline: Path) -> None:
    same = Comparison(about.reference, [image.clone() for image in about.reference])
    found = measure(("fid", "kid", "lpips"), same, Networks(pipeline=pipeline))
    fid, kid, lpips = found["fid-toy"], found["kid-toy"], found["lpips-toy"]
    assert isinstance(fid, Sets)
    assert isinstance(kid, Sets)
    assert isinstance(lpips, Paired)
    assert fid.to_reference == pytest.approx(0, abs=1e-9)
    assert kid.to_reference == pytest.approx(0, abs=1e-9)
    assert lpips.mean == 0


def test_a_folder_of_real_images_is_compared_with_both(about: Comparison, pipeline: Path, tmp_path: Path) -> None:
    """The folder has the reference's own images, so their distance is zero up to 8-bit rounding."""
    real = tmp_path / "real.zip"  # clean-fid would mistake such a folder for an archive
    (real / "deeper").mkdir(parents=True)
    for i, image in enumerate(about.reference):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(real / ("deeper" if i else "") / f"{i}.PNG", format="PNG")
    (real / "notes.txt").write_text("no picture")
    found = measure(("fid", "kid"), Comparison(about.reference, about.images, real=real), Networks(pipeline=pipeline))
    for name in ("fid-toy", "kid-toy"):
        sets = found[name]
        assert isinstance(sets, Sets)
        assert (sets.n, sets.n_real) == (4, 4)
        assert sets.to_real is not None
        assert sets.reference_to_real is not None
        assert sets.reference_to_real < sets.to_real
    fid = found["fid-toy"]
    assert isinstance(fid, Sets)
    assert fid.reference_to_real == pytest.approx(0, abs=1e-3 * fid.to_reference)
    assert fid.to_real == pytest.approx(fid.to_reference, rel=0.05)


def test_one_image_has_no_distribution(about: Comparison, pipeline: Path) -> None:
    alone = Comparison(about.reference[:1], about.images[:1])
    found = measure(("fid",), alone, Networks(pipeline=pipeline))["fid-toy"]
    assert isinstance(found, Unavailable)
    assert "--images" in found.remedy


def test_inception_gets_the_299_pixels_that_clean_fid_gives_it(about: Comparison, inception: Path) -> None:
    found = measure(("fid",), about, Networks(inception))["fid"]
    network = torch.jit.load(str(inception)).layers

    def features(images: Any) -> np.ndarray:
        pixels = [
            np.stack([np.asarray(Image.fromarray(c, mode="F").resize((299, 299), Image.Resampling.BICUBIC)) for c in i])
            for i in ((image * 255).numpy() for image in images)
        ]
        with torch.no_grad():
            return network((torch.from_numpy(np.stack(pixels)).clamp(0, 255) - 128) / 128).numpy()

    assert isinstance(found, Sets)
    expected = frechet_distance(features(about.reference), features(about.images))
    assert found.to_reference == pytest.approx(expected, rel=1e-4)


# CLIPScore


def test_clip_score_is_a_hundred_times_the_cosine(about: Comparison, clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    found = measure(("clip",), about, Networks(clip))["clip"]
    assert isinstance(found, Paired)
    assert found.network == str(clip)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)

    @torch.no_grad()
    def score(image: torch.Tensor, prompt: str) -> float:
        picture = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        output = model(**processor(text=[prompt], images=[picture], return_tensors="pt"))
        return max(0.0, 100 * float(nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)))

    for images, values in ((about.images, found.per_image), (about.reference, None)):
        expected = [score(image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
        if values is None:
            assert found.of_reference == pytest.approx(np.mean(expected), abs=1e-2)
        else:
            assert list(values) == pytest.approx(expected, abs=1e-2)
    assert max(value or 0 for value in found.per_image) > 0, "all cosines are negative: this would test nothing"


def test_clip_reads_a_long_prompt_to_its_end_token(clip: Path) -> None:
    loaded = Clip.load(clip, torch.device("cpu"))
    tokens = loaded.processor(text=["x" * 40], return_tensors="pt", padding=True)["input_ids"]
    assert tokens.shape == (1, 16)
    assert int(tokens[0, -1]) == loaded.model.config.text_config.eos_token_id


@pytest.mark.parametrize("prompts", [None, ["", "", "", ""]])
def test_clip_needs_text(about: Comparison, clip: Path, prompts: list[str] | None) -> None:
    found = measure(("clip",), Comparison(about.reference, about.images, None, prompts), Networks(clip))["clip"]
    assert isinstance(found, Unavailable)
    assert "not made from text" in found.reason


def test_the_latent_metric_needs_kept_latents(about: Comparison) -> None:
    assert isinstance(
        measure(("latent",), Comparison(about.reference, about.images), Networks())["latent"], Unavailable
    )


# Where networks come from


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_networks_are_found_in_torch_hubs_cache(about: Comparison, hub: Path, inception: Path, alexnet: Path) -> None:
    shutil.copy(inception, hub)
    shutil.copy(alexnet, hub)
    found = measure(("lpips", "fid"), about, Networks())
    assert isinstance(found["lpips"], Paired)
    assert isinstance(found["fid"], Sets)


@pytest.mark.parametrize(("name", "metric"), [(ALEXNET, "lpips"), ("inception-2015-12-05.pt", "fid")])
def test_a_damaged_file_makes_its_metric_unavailable(about: Comparison, tmp_path: Path, name: str, metric: str) -> None:
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    found = measure((metric,), about, Networks(tmp_path))[metric]
    assert isinstance(found, Unavailable)
    assert str(tmp_path / name) in found.reason
    assert "download" in found.remedy


def test_a_damaged_clip_model_makes_its_metric_unavailable(about: Comparison, clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"")
    found = measure(("clip",), about, Networks(tmp_path))["clip"]
    assert isinstance(found, Unavailable)
    assert str(tmp_path / "clip") in found.reason


def test_the_user_can_name_a_small_network(about: Comparison, pipeline: Path) -> None:
    for path in (pipeline, pipeline / "features"):
        networks = Networks(path)
        networks.require()
        assert "fid-toy" in measure(("fid",), about, networks)


def test_a_folder_without_any_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BitPolicyError, match="inception-2015-12-05"):
        Networks(tmp_path).require()
    with pytest.raises(BitPolicyError, match="no such file or folder"):
        Networks(tmp_path / "nothing").require()


# The perceptual distance


def test_the_perceptual_distance_says_what_it_used(about: Comparison, pipeline: Path, hub: Path, alexnet: Path) -> None:
    before = perceptual_distance(about.reference, about.images, Networks(pipeline=pipeline))
    assert isinstance(before, Paired)
    assert (before.name, len(before.per_image)) == ("lpips-toy", 4)
    shutil.copy(alexnet, hub)
    after = perceptual_distance(about.reference, about.images, Networks(pipeline=pipeline))
    assert isinstance(after, Paired)
    assert after.name == "lpips"
    small = [image[:, :16, :16] for image in about.reference]
    on_small = perceptual_distance(small, small, Networks(pipeline=pipeline))
    assert isinstance(on_small, Paired)
    assert on_small.name == "lpips-toy", "AlexNet needs larger images"


def test_without_any_network_the_perceptual_distance_is_unavailable(about: Comparison) -> None:
    assert isinstance(perceptual_distance(about.reference, about.images, Networks()), Unavailable)
