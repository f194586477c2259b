"""Every measure of image quality under one call: each asked metric becomes numbers, or says why it cannot.

A metric may become two: `fid` asks for the distance in Inception's features, and where the pipeline brings a small
network of its own, for the distance in that network's features, too, as `fid-emoji`. Their scales differ, so their
names do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.features import Extractor
from bitpolicy.search.quality.frechet import Features, frechet_distance
from bitpolicy.search.quality.kernel_distance import kernel_distance, paired_kernel_distance
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Images, Paired, Unavailable, latent_mse, psnr, six_digits, ssim

METRICS = ("psnr", "ssim", "lpips", "latent", "fid", "kid", "clip")
Distance = Callable[[Features, Features], float]
_SETS: dict[str, tuple[Distance, Distance]] = {  # for independent sets, and for sets of pairs
    "fid": (frechet_distance, frechet_distance),
    "kid": (kernel_distance, paired_kernel_distance),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        reference: images of the unquantized pipeline, shape (C, H, W) or (frames, C, H, W), float in [0, 1], CPU.
        images: of the quantized one, same prompts and seeds.
        latents: final latents of both, if they are known.
        prompts: one for each image, None where the pipeline takes no text.
        real: a folder of pictures that both are compared with.
    """

    reference: Images
    images: Images
    latents: tuple[Images, Images] | None = None
    prompts: Sequence[str] | None = None
    real: Path | None = None


@dataclass(frozen=True)
class Sets:
    """A distance between sets of images.

    Attributes:
        name: of the metric: "fid", "kid-emoji".
        network: whose features were compared.
        features: how many a picture has.
        n: pictures of the pipeline, frames of videos counted.
        to_reference: between the quantized pipeline's images and the reference's.
        to_real: between the quantized pipeline's and the folder's; None without a folder.
        reference_to_real: between the reference's and the folder's: what `to_real` has to be compared with.
        n_real: pictures in the folder.
    """

    name: str
    network: str
    features: int
    n: int
    to_reference: float
    to_real: float | None = None
    reference_to_real: float | None = None
    n_real: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        values = {name: six_digits(getattr(self, name)) for name in ("to_reference", "to_real", "reference_to_real")}
        counts = {"n": self.n, "n_real": self.n_real, "features": self.features}
        return {**values, "better": "lower", "network": self.network, **counts}


Result = Paired | Sets | Unavailable


@dataclass
class _Seen:
    """Features of a comparison through one network, computed once for all metrics."""

    comparison: Comparison
    found: dict[str, dict[str, Features]] = field(default_factory=dict)

    def through(self, extractor: Extractor) -> dict[str, Features]:
        if extractor.name not in self.found:
            pictures = {"reference": self.comparison.reference, "images": self.comparison.images}
            features = {name: extractor.of_images(images) for name, images in pictures.items()}
            if self.comparison.real is not None:
                features["real"] = extractor.of_folder(self.comparison.real)
            self.found[extractor.name] = features
        return self.found[extractor.name]


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names separated by commas, or "all".

    Raises:
        BitPolicyError: one is unknown.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in (*METRICS, "all")]
    if unknown or not names:
        raise BitPolicyError(f"--metrics {text!r}: write some of {', '.join(METRICS)}, separated by commas, or all")
    return METRICS if "all" in names else tuple(names)


def measure(metrics: Iterable[str], comparison: Comparison, networks: Networks) -> dict[str, Result]:
    """Each metric's result by name, in the order asked; a distance through a small network follows its own.

    Args:
        metrics: some of `METRICS`.
    """
    seen = _Seen(comparison)
    return {name: result for metric in metrics for name, result in _of(metric, comparison, networks, seen)}


def perceptual_distance(reference: Images, images: Images, networks: Networks) -> Paired | Unavailable:
    """LPIPS if its backbone is here and the images are large enough, else the distance of the pipeline's small network.

    `name` of what is returned says which: "lpips", or for example "lpips-emoji". `per_image` has the numbers.
    """
    found = _lpips(reference, images, networks)
    if isinstance(found, Unavailable) and networks.uncalibrated is not None:
        return networks.uncalibrated(reference, images)
    return found


def _of(metric: str, about: Comparison, networks: Networks, seen: _Seen) -> Iterator[tuple[str, Result]]:
    if metric == "psnr":
        yield metric, psnr(about.reference, about.images)
    elif metric == "ssim":
        yield metric, ssim(about.reference, about.images)
    elif metric == "latent":
        yield metric, _latent(about)
    elif metric == "clip":
        yield metric, _clip(about, networks)
    elif metric == "lpips":
        yield metric, _lpips(about.reference, about.images, networks)
        if networks.uncalibrated is not None:
            found = networks.uncalibrated(about.reference, about.images)
            yield found.name, found
    else:
        extractor = networks.inception
        yield metric, extractor if isinstance(extractor, Unavailable) else _sets(metric, metric, extractor, seen)
        if (small := networks.small_extractor) is not None:
            yield f"{metric}-{small.name}", _sets(metric, f"{metric}-{small.name}", small, seen)


def _lpips(reference: Images, images: Images, networks: Networks) -> Paired | Unavailable:
    network = networks.lpips
    return network if isinstance(network, Unavailable) else network(reference, images)


def _latent(about: Comparison) -> Result:
    if about.latents is None:
        return Unavailable("the final latents were not kept", "compare through `bitpolicy eval`, which keeps them")
    reference, latents = about.latents
    return latent_mse(reference, latents)


def _clip(about: Comparison, networks: Networks) -> Result:
    if about.prompts is None or not any(about.prompts):
        return Unavailable("the images were not made from text", "leave clip out for such a pipeline")
    network = networks.clip
    return network if isinstance(network, Unavailable) else network(about.reference, about.images, about.prompts)


def _sets(metric: str, name: str, extractor: Extractor, seen: _Seen) -> Result:
    features = seen.through(extractor)
    x, y, real = features["reference"], features["images"], features.get("real")
    if len(x) < 2:
        return Unavailable("there is only one image", "compare at least two; --images 256 or more for a steady number")
    independent, paired = _SETS[metric]
    found = Sets(name, extractor.name, x.shape[1], len(x), paired(x, y))
    if real is None:
        return found
    return Sets(
        name,
        extractor.name,
        x.shape[1],
        len(x),
        found.to_reference,
        independent(y, real),
        independent(x, real),
        len(real),
    )
