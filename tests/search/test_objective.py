"""What a study minimises: each objective against the metric of the same name, and what cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import BUNDLED_FOLDER
from bitpolicy.search.quality.metrics import perceptual_distance
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.objective import MSE, objective_named
from bitpolicy.search.quality.psnr import Psnr, Unavailable, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(3, 64, 64, generator=draw)
    return image, (image + 0.05 * torch.randn(image.shape, generator=draw)).clamp(0, 1)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network in torch's cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_mse_is_what_psnr_is_made_from(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert objective_named("mse", Networks()) is MSE
    (db,) = Psnr.of(pair[:1], pair[1:]).differing
    assert MSE.distance(*pair) == pytest.approx(10 ** (-db / 10))


@pytest.mark.parametrize("frames", [None, 3])
def test_ssim_is_one_minus_the_metric(pair: tuple[torch.Tensor, torch.Tensor], frames: int | None) -> None:
    a, b = pair if frames is None else (image.expand(frames, -1, -1, -1) for image in pair)
    objective, found = objective_named("ssim", Networks()), ssim([a], [b])
    assert not isinstance(found, Unavailable)
    assert objective.distance(a, b) == pytest.approx(1 - found.finite[0])
    assert 0.01 < objective.distance(a, b) < 1
    assert objective.distance(a, a) == 0


def test_lpips_is_that_of_the_pipelines_network_if_the_usual_one_is_not_here(
    pair: tuple[torch.Tensor, torch.Tensor], no_hub: None
) -> None:
    networks = Networks(pipeline=BUNDLED_FOLDER)
    objective, found = objective_named("lpips", networks), perceptual_distance(pair[:1], pair[1:], networks)
    assert not isinstance(found, Unavailable)
    assert (objective.name, objective.title) == ("lpips-emoji", "lpips-emoji distance")
    assert objective.distance(*pair) == found.finite[0] > 0
    assert objective.distance(pair[0], pair[0]) == 0


def test_without_any_network_lpips_is_refused_at_once(no_hub: None) -> None:
    with pytest.raises(BitPolicyError, match=r"^--objective lpips cannot be measured: alexnet.*download"):
        objective_named("lpips", Networks())


@pytest.mark.parametrize(
    ("shape", "said"),
    [((3, 8, 8), "8 pixels per side"), ((2, 9000), r"shape \(2, 9000\); use --objective mse"), ((9000,), "compares")],
)
def test_results_that_are_no_images_for_ssim_are_refused(shape: tuple[int, ...], said: str) -> None:
    result = torch.rand(shape)
    with pytest.raises(BitPolicyError, match=said):
        objective_named("ssim", Networks()).distance(result, result)
    assert MSE.distance(result, result) == 0
