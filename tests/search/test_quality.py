"""PSNR from its definition, identical images apart, and numbers that JSON can hold."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bitpolicy.search.quality import Psnr


def random_images(count: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 5, 7, generator=draw) for _ in range(count)]


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


def test_nothing_but_identical_images_is_strict_json() -> None:
    reference = random_images(3)
    found = Psnr.of(reference, [image.clone() for image in reference])
    assert (found.mean, found.min) == (None, None)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text) == {"mean": None, "min": None, "n": 3, "identical": 3}


def test_as_many_images_as_references_are_needed() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Psnr.of(random_images(2), random_images(1))
