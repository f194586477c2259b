"""Features of pictures, computed as in clean-fid (Parmar et al. 2022): resized in float with PIL's bicubic filter.

Pictures in memory are not rounded to 8 bits first, unlike pictures in files: the error of rounding to 8 bits is as
large as the difference between two images at 59 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from PIL import Image

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.feature_network import FeatureNetwork
from bitpolicy.search.quality.frechet import Features
from bitpolicy.search.quality.psnr import Images, frames

INCEPTION = "inception-2015-12-05.pt"
_INCEPTION_SIZE = 299
_BATCH = 64
_SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Extractor:
    """A network that computes features of pictures.

    Attributes:
        name: "inception", or the name of a small network.
        size: side in pixels of its input.
        network: (B, 3, size, size), float in [0, 255] -> (B, d).
        device: where it computes.
    """

    name: str
    size: int
    network: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    @classmethod
    def inception(cls, path: Path, device: torch.device) -> Extractor:
        """The Inception network of FID and KID, a TorchScript file.

        Raises:
            BitPolicyError: the file is something else.
        """
        try:
            network = InceptionV3W(str(path.parent), download=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise BitPolicyError(
                f"{path} is not a TorchScript Inception network: {' '.join(str(error).split())[:200]}"
            ) from error
        return cls("inception", _INCEPTION_SIZE, network.eval().to(device), device)

    @classmethod
    def small(cls, network: FeatureNetwork, device: torch.device) -> Extractor:
        return cls(network.name, network.size, network.to(device), device)

    def of_images(self, images: Images) -> Features:
        """Features of images, float in [0, 1], shape (C, H, W). Each frame of a video, (frames, C, H, W), counts as
        one.

        Returns:
            shape (n, d), float32.
        """
        resized = self._resized(frame for image in images for frame in frames(image))
        parts = iter(lambda: list(islice(resized, _BATCH)), [])
        return np.concatenate([fid.get_batch_features(torch.stack(part), self.network, self.device) for part in parts])

    def of_folder(self, folder: Path) -> Features:
        """Features of all picture files in a folder and its subfolders, shape (n, d), float32. Transparency is ignored.

        Raises:
            BitPolicyError: there are fewer than two pictures, or one cannot be read.
        """
        files = picture_files(folder)
        options = {"num_workers": 0, "batch_size": _BATCH, "device": self.device, "verbose": False}
        try:
            return fid.get_files_features(files, self.network, custom_fn_resize=self._resizer(), **options)
        except (OSError, ValueError) as error:
            raise BitPolicyError(f"cannot read the pictures in {folder}: {error}; remove the broken file") from error

    def _resizer(self) -> Callable[[np.ndarray], np.ndarray]:
        return make_resizer("PIL", False, "bicubic", (self.size, self.size))

    def _resized(self, pictures: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        resize = self._resizer()
        for picture in pictures:
            pixels = resize(picture.permute(1, 2, 0).float().numpy() * 255)
            yield torch.from_numpy(pixels).permute(2, 0, 1)


def picture_files(folder: Path) -> list[str]:
    """Paths of all pictures in a folder and its subfolders, sorted.

    Raises:
        BitPolicyError: there are fewer than two.
    """
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        raise BitPolicyError(
            f"{folder} has {len(files)} pictures, but a distance between two sets needs at least 2; "
            f"add files that end in {', '.join(sorted(_SUFFIXES))}"
        )
    return files


def require_pictures(folder: Path) -> None:
    """Check a folder of pictures before anything is computed.

    Raises:
        BitPolicyError: it has fewer than two pictures, or the first cannot be read.
    """
    if not folder.is_dir():
        raise BitPolicyError(f"--real-images {folder}: there is no such folder; give a folder of pictures")
    first = picture_files(folder)[0]
    try:
        with Image.open(first) as picture:
            picture.load()
    except OSError as error:
        raise BitPolicyError(f"--real-images {folder}: {first} is not a picture: {error}; remove the file") from error
