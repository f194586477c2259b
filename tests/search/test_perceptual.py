"""Perceptual distance against its equation, with LPIPS' weights and with the small network; that network's file."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.feature_network import FeatureNetwork, is_feature_network
from bitpolicy.search.quality.perceptual import ALEXNET, Lpips, Uncalibrated
from bitpolicy.search.quality.psnr import Paired, Unavailable

CPU = torch.device("cpu")


def random_images(count: int, seed: int, size: int = 64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(3, size, size, generator=draw) for _ in range(count)]


# LPIPS


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A random AlexNet, and its file in torchvision's form."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    path = tmp_path_factory.mktemp("checkpoints") / ALEXNET
    torch.save(network.state_dict(), path)
    return network, path


@torch.no_grad()
def lpips_by_definition(network: nn.Module, a: torch.Tensor, b: torch.Tensor) -> float:
    """Zhang et al. 2018, equation 1, with the channel weights from torchmetrics' file."""
    shipped = files("torchmetrics") / "functional" / "image" / "lpips_models" / "alex.pth"
    weights = torch.load(str(shipped), map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((2 * image - 1) - shift[:, None, None]) / scale[:, None, None] for image in (a, b))
    total, taps = 0.0, {1: 0, 4: 1, 7: 2, 9: 3, 11: 4}  # the ReLUs of the five convolutions
    for i, layer in enumerate(list(network.features)[:12]):
        x, y = layer(x), layer(y)
        if i in taps:
            u, v = x / x.norm(dim=0, keepdim=True), y / y.norm(dim=0, keepdim=True)
            w = weights[f"lin{taps[i]}.model.1.weight"].flatten()
            total += float((w[:, None, None] * (u - v) ** 2).nan_to_num().sum(0).mean())
    return total


def test_lpips_equals_its_equation_with_the_backbone_from_the_file(alexnet: tuple[nn.Module, Path]) -> None:
    network, path = alexnet
    reference, images = random_images(3, 0), random_images(3, 1)
    found = Lpips.load(path, CPU)(reference, images)
    assert isinstance(found, Paired)
    assert (found.name, found.network, found.better) == ("lpips", "AlexNet", "lower")
    expected = [lpips_by_definition(network, a, b) for a, b in zip(reference, images, strict=True)]
    assert found.per_image == pytest.approx(expected, rel=1e-3)


def test_lpips_refuses_images_too_small_for_alexnet(alexnet: tuple[nn.Module, Path]) -> None:
    lpips = Lpips.load(alexnet[1], CPU)
    small, enough = random_images(1, 0, 31), random_images(1, 0, 32)
    assert isinstance(lpips(small, small), Unavailable)
    found = lpips(enough, enough)
    assert isinstance(found, Paired)
    assert found.per_image == (0.0,)


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_a_file_that_is_not_alexnet_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / ALEXNET
    if content is None:
        torch.save({"other": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(BitPolicyError, match="torchvision's AlexNet"):
        Lpips.load(path, CPU)


# The small network


@pytest.fixture
def small() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork("toy", 32, (8, 12, 16)).eval().requires_grad_(False)


def test_the_network_equals_its_equation(small: FeatureNetwork) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 255
    y = pixels / 127.5 - 1
    for conv, stride in zip(small.convs, (1, 2, 2), strict=True):
        y = nn.functional.conv2d(y, conv.weight, conv.bias, stride=stride, padding=1).clamp(min=0)
    assert [m.shape[1:] for m in small.maps(pixels)] == [(8, 32, 32), (12, 16, 16), (16, 8, 8)]
    torch.testing.assert_close(small(pixels), y.mean((2, 3)))


def test_the_distance_is_the_mean_of_one_minus_the_cosine(small: FeatureNetwork) -> None:
    reference, images = random_images(2, 0, 32), random_images(2, 1, 32)
    found = Uncalibrated(small, CPU)(reference, images)
    assert (found.name, found.network) == ("lpips-toy", "toy")
    for a, b, value in zip(reference, images, found.per_image, strict=True):
        pairs = zip(small.maps(a[None] * 255), small.maps(b[None] * 255), strict=True)
        layers = [1 - nn.functional.cosine_similarity(x, y, dim=1).mean() for x, y in pairs]
        assert value == pytest.approx(float(sum(layers) / 3), rel=1e-3)


def test_the_distance_grows_with_the_difference_and_is_zero_without(small: FeatureNetwork) -> None:
    reference, noise = random_images(1, 0, 32), random_images(1, 1, 32)[0] - 0.5
    distance = Uncalibrated(small, CPU)
    assert distance(reference, reference).per_image == (0.0,)
    found = [distance(reference, [reference[0] + size * noise]).per_image[0] for size in (0.001, 0.01, 0.1, 0.5)]
    assert found == sorted(found)
    assert 0 < found[0] < 1e-4
    assert found[-1] <= 1


def test_a_network_can_be_saved_and_loaded(small: FeatureNetwork, tmp_path: Path) -> None:
    assert not is_feature_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small.config()))
    save_file({name: w.half() for name, w in small.state_dict().items()}, tmp_path / "model.safetensors")
    assert is_feature_network(tmp_path)
    back = FeatureNetwork.load(tmp_path)
    assert (back.name, back.size, back.channels) == ("toy", 32, (8, 12, 16))
    pixels = torch.rand(1, 3, 32, 32) * 255
    torch.testing.assert_close(back(pixels), small(pixels), rtol=1e-2, atol=1e-2)
    assert not any(weight.requires_grad for weight in back.parameters())


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "convs.0.weight"])
def test_a_damaged_network_is_refused(small: FeatureNetwork, tmp_path: Path, missing: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small.config()))
    save_file({n: w for n, w in small.state_dict().items() if n != missing}, tmp_path / "model.safetensors")
    if (tmp_path / missing).exists():
        (tmp_path / missing).unlink()
    with pytest.raises(BitPolicyError, match=r"scripts/train_features\.py"):
        FeatureNetwork.load(tmp_path)


# The bundled network

SHIPPED = Path(__file__).parents[2] / "bitpolicy" / "models" / "emoji" / "features"


def test_the_shipped_network_has_at_most_2_megabytes_of_float16() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 2e6
    assert {tensor.dtype for tensor in load_file(SHIPPED / "model.safetensors").values()} == {torch.float16}
    network = FeatureNetwork.load(SHIPPED)
    assert (network.name, network.size, network.channels[-1]) == ("emoji", 64, 128)


def test_the_shipped_network_ranks_damage_as_people_do() -> None:
    """On a picture of discs, more noise or blur means more distance, and a shift by a pixel less than deletion."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((rows - 32) ** 2 + (columns - 30) ** 2 < 400).float()
    picture = torch.stack([1 - 0.1 * disc, 1 - 0.3 * disc, 1 - 0.8 * disc])
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    distance = Uncalibrated(FeatureNetwork.load(SHIPPED), CPU)

    def of(image: torch.Tensor) -> float:
        (found,) = distance([picture], [image.clamp(0, 1)]).per_image
        assert found is not None
        return found

    found = [of(picture + size * noise) for size in (0, 0.001, 0.01, 0.05, 0.2)]
    assert found == sorted(found)
    assert found[0] == 0
    assert of(picture.roll(1, 2)) < of(picture.roll(8, 2)) < of(torch.ones_like(picture))
