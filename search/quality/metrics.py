"""Every measure of image quality behind one call. Each requested metric gives numbers, or the reason why it cannot.

One metric can give two results. `psnr` also gives the mel distance of sounds, as `mel`. `fid` gives the distance in
Inception's features and, if the pipeline comes with a small network of its own, also the distance in that network's
features, as `fid-emoji`. Their scales differ, so their names do.
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
from bitpolicy.search.quality.sound import are_sounds, mel_distance

METRICS = ("psnr", "ssim", "lpips", "latent", "fid", "kid", "clip")
Distance = Callable[[Features, Features], float]
_SETS: dict[str, tuple[Distance, Distance]] = {  # for independent sets, and for paired sets
    "fid": (frechet_distance, frechet_distance),
    "kid": (kernel_distance, paired_kernel_distance),
}


@dataclass(frozen=True)
class Comparison:
    """The images to compare.

    Attributes:
        reference: images of the unquantized pipeline, shape (C, H, W) or (frames, C, H, W), float in [0, 1], CPU.
        images: images of the quantized pipeline, with the same prompts and seeds.
        latents: final latents of both, if known.
        prompts: one per image; None if the pipeline takes no text.
        real: a folder of pictures to compare both with.
        rate: samples a second, if the results are sounds, shape (samples) or (channels, samples).
    """

    reference: Images
    images: Images
    latents: tuple[Images, Images] | None = None
    prompts: Sequence[str] | None = None
    real: Path | None = None
    rate: int = 0


@dataclass(frozen=True)
class Sets:
    """A distance between sets of images.

    Attributes:
        name: of the metric: "fid", "kid-emoji".
        network: the network whose features were compared.
        features: the number of features of a picture.
        n: pictures of the pipeline, counting each frame of a video.
        to_reference: distance between the quantized pipeline's images and the reference's.
        to_real: distance between the quantized pipeline's images and the folder's; None without a folder.
        reference_to_real: distance between the reference's images and the folder's, to compare `to_real` with.
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
        """The result as strict JSON values."""
        values = {name: six_digits(getattr(self, name)) for name in ("to_reference", "to_real", "reference_to_real")}
        counts = {"n": self.n, "n_real": self.n_real, "features": self.features}
        return {**values, "better": "lower", "network": self.network, **counts}


Result = Paired | Sets | Unavailable


@dataclass
class _Seen:
    """Features of a comparison, computed once per network for all metrics."""

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
    """Parse names separated by commas, or "all".

    Raises:
        BitPolicyError: a name is unknown.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in (*METRICS, "all")]
    if unknown or not names:
        raise BitPolicyError(
            f"--metrics {text!r} is not a list of metrics; "
            f"choose from {', '.join(METRICS)}, separated by commas, or all"
        )
    return METRICS if "all" in names else tuple(names)


def measure(metrics: Iterable[str], comparison: Comparison, networks: Networks) -> dict[str, Result]:
    """Each metric's result by name, in the order requested. Results of a small network follow those of the standard
    one.

    Args:
        metrics: some of `METRICS`.
    """
    seen = _Seen(comparison)
    return {name: result for metric in metrics for name, result in _of(metric, comparison, networks, seen)}


def perceptual_distance(reference: Images, images: Images, networks: Networks) -> Paired | Unavailable:
    """LPIPS if its backbone is available and the images are large enough, else the distance of the pipeline's small
    network.

    The result's `name` says which: "lpips", or for example "lpips-emoji". `per_image` has the numbers.
    """
    found = _lpips(reference, images, networks)
    if isinstance(found, Unavailable) and networks.uncalibrated is not None:
        return networks.uncalibrated(reference, images)
    return found


def _of(metric: str, about: Comparison, networks: Networks, seen: _Seen) -> Iterator[tuple[str, Result]]:
    if metric == "psnr":
        yield metric, psnr(about.reference, about.images)
        if are_sounds(about.reference):
            yield "mel", mel_distance(about.reference, about.images, about.rate)
    elif metric != "latent" and are_sounds(about.reference):
        yield metric, Unavailable("it compares pictures, and the results are sounds", "take psnr, which includes mel")
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
        return Unavailable("the images were not made from text", "leave out clip for such a pipeline")
    network = networks.clip
    return network if isinstance(network, Unavailable) else network(about.reference, about.images, about.prompts)


def _sets(metric: str, name: str, extractor: Extractor, seen: _Seen) -> Result:
    features = seen.through(extractor)
    x, y, real = features["reference"], features["images"], features.get("real")
    if len(x) < 2:
        return Unavailable("there is only one image", "compare at least two; --images 256 or more for a stable number")
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
