"""PSNR and SSIM against their definitions, identical images, intervals, and valid JSON numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from bitpolicy.search.quality.psnr import (
    Paired,
    Psnr,
    Unavailable,
    bootstrap_interval,
    frames,
    latent_mse,
    psnr,
    ssim,
)


def random_images(count: int, seed: int = 0, size: tuple[int, ...] = (3, 5, 7)) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=draw) for _ in range(count)]


# PSNR


def test_psnr_is_ten_log_ten_of_one_over_the_mean_squared_error() -> None:
    reference, images = random_images(4, seed=0), random_images(4, seed=1)
    found = Psnr.of(reference, images)
    for a, b, db in zip(reference, images, found.per_image, strict=True):
        squared = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
        assert db == pytest.approx(-10 * math.log10(sum(squared) / len(squared)), abs=1e-5)


@pytest.mark.parametrize("difference", [0.5, 0.1, 0.01])
def test_a_constant_difference_has_the_psnr_of_its_square(difference: float) -> None:
    black = torch.zeros(3, 4, 4)
    assert Psnr.of([black], [black + difference]).mean == pytest.approx(-20 * math.log10(difference), abs=1e-5)


def test_a_difference_too_small_for_8_bits_is_seen() -> None:
    reference = torch.full((3, 4, 4), 0.5)
    changed = reference.clone()
    changed[0, 0, 0] += 1e-6
    (db,) = Psnr.of([reference], [changed]).per_image
    assert db == pytest.approx(-10 * math.log10(1e-12 / 48), abs=0.5)


def test_identical_images_are_counted_apart() -> None:
    reference = random_images(4)
    images = [reference[0], reference[1] + 0.1, reference[2], reference[3] + 0.01]
    found = Psnr.of(reference, images)
    assert [db is None for db in found.per_image] == [True, False, True, False]
    assert found.mean == pytest.approx(30.0, abs=1e-3)
    assert found.min == pytest.approx(20.0, abs=1e-3)
    assert found.as_dict() == {"mean": 30.0, "min": 20.0, "n": 4, "identical": 2}


def test_only_identical_images_give_strict_json() -> None:
    reference = random_images(3)
    found = Psnr.of(reference, [image.clone() for image in reference])
    assert (found.mean, found.min) == (None, None)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text) == {"mean": None, "min": None, "n": 3, "identical": 3}


def test_there_must_be_as_many_images_as_references() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Psnr.of(random_images(2), random_images(1))


# SSIM


def ssim_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, on one channel, with SciPy's Gaussian of 11 pixels."""

    def local(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5, mode="mirror")

    c1, c2, m, n = 0.01**2, 0.03**2, local(a), local(b)
    va, vb, cov = local(a * a) - m * m, local(b * b) - n * n, local(a * b) - m * n
    return float((((2 * m * n + c1) * (2 * cov + c2)) / ((m * m + n * n + c1) * (va + vb + c2))).mean())


def test_ssim_equals_its_definition() -> None:
    reference, images = random_images(2, 0, (3, 24, 30)), random_images(2, 1, (3, 24, 30))
    images = [0.5 * a + 0.5 * b for a, b in zip(reference, images, strict=True)]
    found = ssim(reference, images)
    assert isinstance(found, Paired)
    for a, b, value in zip(reference, images, found.per_image, strict=True):
        channels = [ssim_by_definition(*pair) for pair in zip(a.double().numpy(), b.double().numpy(), strict=True)]
        assert value == pytest.approx(np.mean(channels), abs=1e-6)


def test_ssim_of_a_video_is_the_mean_over_its_frames() -> None:
    reference, images = random_images(4, 0, (3, 16, 16)), random_images(4, 1, (3, 16, 16))
    frame_by_frame, video = ssim(reference, images), ssim([torch.stack(reference)], [torch.stack(images)])
    assert isinstance(frame_by_frame, Paired)
    assert isinstance(video, Paired)
    assert video.mean == pytest.approx(frame_by_frame.mean, abs=1e-9)


def test_ssim_needs_images_as_large_as_its_window() -> None:
    small, large = random_images(1, size=(3, 10, 99)), random_images(1, size=(3, 11, 11))
    found = ssim(small, small)
    assert isinstance(found, Unavailable)
    assert "10 pixels" in found.reason
    assert "SSIM needs 11" in found.remedy
    found = ssim(large, large)
    assert isinstance(found, Paired)
    assert found.per_image == (pytest.approx(1.0),)


# What they have in common


def test_the_latent_error_is_the_mean_square() -> None:
    found = latent_mse([torch.zeros(4, 2, 2), torch.ones(4, 2, 2)], [torch.full((4, 2, 2), 0.5), torch.ones(4, 2, 2)])
    assert found.per_image == (0.25, 0.0)
    assert (found.mean, found.worst) == (0.125, 0.25)


@pytest.mark.parametrize(("better", "worst"), [("higher", 1.0), ("lower", 3.0)])
def test_the_worst_image_depends_on_which_way_is_better(better: str, worst: float) -> None:
    assert Paired("x", (3.0, None, 1.0, 2.0), better).worst == worst


def test_psnr_with_an_interval_agrees_with_psnr() -> None:
    reference = random_images(6)
    images = [reference[0], *(image + 0.01 * i for i, image in enumerate(reference[1:], 1))]
    found = psnr(reference, images)
    assert found.per_image == Psnr.of(reference, images).per_image
    assert found.mean == pytest.approx(Psnr.of(reference, images).mean)
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (written["n"], written["identical"], written["per_image"][0]) == (6, 1, None)
    assert written["interval"][0] < written["mean"] < written["interval"][1]


def test_metrics_of_identical_images_are_strict_json() -> None:
    found = Paired("psnr", (None, None), "higher", "dB").as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "mean": None,
        "worst": None,
        "interval": None,
        "better": "higher",
        "unit": "dB",
        "network": None,
        "n": 2,
        "identical": 2,
        "per_image": [None, None],
    }


def test_the_interval_has_its_nominal_coverage() -> None:
    draws = np.random.default_rng(0).normal(5, 2, (400, 40))
    intervals = [bootstrap_interval(row.tolist()) for row in draws]
    covered = [interval is not None and interval[0] <= 5 <= interval[1] for interval in intervals]
    assert 0.89 < np.mean(covered) < 0.98
    width = np.mean([interval[1] - interval[0] for interval in intervals if interval])
    assert width == pytest.approx(2 * 1.96 * 2 / math.sqrt(40), rel=0.1)


def test_the_interval_is_the_same_every_time_and_needs_two_values() -> None:
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_frames_of_images_videos_and_grey() -> None:
    assert frames(torch.rand(3, 4, 5)).shape == (1, 3, 4, 5)
    assert frames(torch.rand(7, 3, 4, 5)).shape == (7, 3, 4, 5)
    assert frames(torch.rand(1, 4, 5)).shape == (1, 3, 4, 5)
    grey, transparent = torch.rand(2, 1, 4, 5), torch.rand(1, 4, 4, 5)
    assert torch.equal(frames(grey), torch.cat([grey] * 3, dim=1))
    assert torch.equal(frames(transparent), transparent[:, :3])
