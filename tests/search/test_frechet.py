"""The Frechet distance against closed forms, SciPy and clean-fid; the kernel distance against clean-fid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from cleanfid import fid
from PIL import Image

from bitpolicy.search.quality.feature_network import FeatureNetwork
from bitpolicy.search.quality.features import Extractor
from bitpolicy.search.quality.frechet import Features, frechet_distance
from bitpolicy.search.quality.kernel_distance import kernel_distance, paired_kernel_distance

Draw = Callable[..., Features]


@pytest.fixture
def draw() -> Draw:
    """`draw(n, d)`: features with a random mean and covariance."""
    random = np.random.default_rng(0)
    return lambda n, d: random.normal(size=(n, d)) @ random.normal(size=(d, d)) + random.normal(size=d)


def with_moments(mean: Features, deviation: Features, n: int) -> Features:
    """Features with exactly this mean and this diagonal covariance."""
    raw = np.random.default_rng(1).normal(size=(n, len(mean)))
    orthogonal = np.linalg.qr(raw - raw.mean(0))[0] * np.sqrt(n - 1)
    return orthogonal * deviation + mean


# Frechet


def test_it_equals_the_closed_form_for_diagonal_gaussians() -> None:
    random = np.random.default_rng(2)
    m, s, n, t = random.normal(size=5), random.uniform(1, 2, 5), random.normal(size=5), random.uniform(1, 2, 5)
    found = frechet_distance(with_moments(m, s, 40), with_moments(n, t, 60))
    assert found == pytest.approx(((m - n) ** 2).sum() + ((s - t) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 20), (30, 50, 20), (12, 9, 20), (2, 2, 3)])
def test_it_agrees_with_the_root_of_the_product(draw: Draw, n: int, m: int, d: int) -> None:
    """Heusel's formula computed with SciPy, also with few pictures, for which the product is singular."""
    x, y = draw(n, d), draw(m, d)
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sum(np.sqrt(np.clip(scipy.linalg.eigvals(s @ t).real, 0, None)))
    if min(n, m) > d:
        assert np.trace(scipy.linalg.sqrtm(s @ t)).real == pytest.approx(root, rel=1e-9)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_it_is_a_distance(draw: Draw) -> None:
    x, y = draw(50, 20), draw(40, 20)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    assert frechet_distance(x, x + 3.0) == pytest.approx(9 * 20, rel=1e-10)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * frechet_distance(x, y), rel=1e-10)


def test_it_detects_a_difference_of_a_millionth(draw: Draw) -> None:
    """With fewer pictures than features, the root of a product loses this in rounding errors."""
    x = draw(20, 50)
    assert frechet_distance(x, x * (1 + 1e-6)) == pytest.approx(
        1e-12 * (np.square(x.mean(0)).sum() + np.trace(np.cov(x, rowvar=False))), rel=0.1, abs=1e-11
    )


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, paired_kernel_distance])
def test_one_picture_has_no_distribution(distance: Callable[..., float], draw: Draw) -> None:
    with pytest.raises(ValueError, match="found 1 and 1"):
        distance(draw(1, 3), draw(1, 3))


# Kernel


def test_it_is_the_unbiased_estimator_of_its_definition(draw: Draw) -> None:
    x, y = draw(9, 4), draw(9, 4)

    def k(a: Features, b: Features) -> float:
        return float((a @ b / 4 + 1) ** 3)

    apart = list(itertools.permutations(range(9), 2))
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in apart) / len(apart)
    independent = within - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(independent, rel=1e-9)
    paired = within - 2 * sum(k(x[i], y[j]) for i, j in apart) / len(apart)
    assert paired_kernel_distance(x, y) == pytest.approx(paired, rel=1e-9)


def test_it_equals_clean_fids(draw: Draw) -> None:
    x, y = draw(30, 6), draw(45, 6)
    np.random.seed(0)
    expected = fid.kernel_distance(x, y)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert (np.random.get_state()[1] == before).all(), "the caller's random stream is left alone"


def test_equal_pairs_have_distance_zero(draw: Draw) -> None:
    x = draw(1500, 6)  # more than one block of rows
    scale = ((x * x).sum(1) / 6 + 1).mean() ** 3
    assert paired_kernel_distance(x, x) == pytest.approx(0, abs=1e-12 * scale)
    assert kernel_distance(x[:30], x[:30]) < -0.1, "clean-fid's, meant for independent sets, is below zero there"


def test_it_grows_with_the_difference(draw: Draw) -> None:
    x, noise = draw(60, 5), draw(60, 5)
    found = [paired_kernel_distance(x, x + size * noise) for size in (0.01, 0.1, 0.3, 1.0)]
    assert found == sorted(found)
    assert found[0] > 0


# Through clean-fid's own functions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders with pictures of two sizes."""
    random = np.random.default_rng(3)
    made = []
    for name, size in (("first", 64), ("second", 40)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(12):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
        made.append(folder)
    return made[0], made[1]


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor.small(FeatureNetwork("toy", 64, (8, 16, 24)).eval().requires_grad_(False), torch.device("cpu"))


@pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18), reason="clean-fid calls sqrtm(disp=False)"
)
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_the_complete_computation_agrees_with_clean_fid(folders: tuple[Path, Path], extractor: Extractor) -> None:
    """With few pictures, clean-fid's matrix root is off by about 1e-4."""
    first, second = folders
    expected = fid.compute_fid(
        str(first),
        str(second),
        custom_feat_extractor=extractor.network,
        custom_fn_resize=extractor._resizer(),
        device=torch.device("cpu"),
        num_workers=0,
        verbose=False,
    )
    found = frechet_distance(extractor.of_folder(first), extractor.of_folder(second))
    assert found > 0
    assert found == pytest.approx(expected, rel=1e-3)


def test_pictures_in_memory_and_in_files_have_the_same_features(
    folders: tuple[Path, Path], extractor: Extractor
) -> None:
    for folder in folders:
        arrays = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        images = [torch.from_numpy(array.copy()).permute(2, 0, 1) / 255 for array in arrays]
        np.testing.assert_allclose(extractor.of_images(images), extractor.of_folder(folder), rtol=1e-4, atol=1e-5)


def test_a_video_counts_frame_by_frame_and_grey_as_rgb(extractor: Extractor) -> None:
    video, grey = torch.rand(5, 3, 20, 20), torch.rand(1, 20, 20)
    found = extractor.of_images([video, grey])
    assert found.shape == (6, 24)
    expected = extractor.of_images([*video, grey.expand(3, -1, -1)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_more_pictures_than_one_batch(extractor: Extractor) -> None:
    images = [torch.rand(3, 64, 64) for _ in range(70)]
    found = extractor.of_images(images)
    np.testing.assert_allclose(found[66:], extractor.of_images(images[66:]), rtol=1e-4, atol=1e-5)
