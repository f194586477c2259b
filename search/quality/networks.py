"""Finds the networks that metrics need: in a folder the user names, in torch.hub's cache, or in the Hugging Face cache.

Nothing is downloaded. If a network is in none of these places, its metrics are `Unavailable`, with a remedy.

| network | file or folder | metrics |
|---|---|---|
| Inception | inception-2015-12-05.pt | fid, kid |
| AlexNet | alexnet-owt-7be5be79.pth | lpips |
| CLIP | clip/, or a folder that is a CLIP model | clip |
| a small one | features/, or a folder that is such a network | fid-NAME, kid-NAME, lpips-NAME |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.clip_score import Clip
from bitpolicy.search.quality.feature_network import FeatureNetwork, is_feature_network
from bitpolicy.search.quality.features import INCEPTION, Extractor
from bitpolicy.search.quality.perceptual import ALEXNET, Lpips, Uncalibrated
from bitpolicy.search.quality.psnr import Unavailable

_CLIPS = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32")
_URLS = {
    INCEPTION: f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}",
    ALEXNET: f"https://download.pytorch.org/models/{ALEXNET}",
}
T = TypeVar("T")


class Networks:
    """The networks available here. Each is loaded on first use.

    Attributes:
        features: a file or folder that the user named.
        pipeline: folder of the pipeline; it may have a small network in `features/`.
        device: where the networks compute.
    """

    def __init__(
        self, features: Path | None = None, pipeline: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.features, self.pipeline, self.device = features, pipeline, torch.device(device)

    def require(self) -> None:
        """Check `features` before anything is computed.

        Raises:
            BitPolicyError: the path does not exist, or has no known network.
        """
        if self.features is None:
            return
        if not self.features.exists():
            raise BitPolicyError(f"--features {self.features}: there is no such file or folder; give an existing one")
        if not any([self._file(INCEPTION, here=True), self._file(ALEXNET, here=True), self._small(), self._clip()]):
            raise BitPolicyError(
                f"--features {self.features} has no known network; it can contain {INCEPTION}, {ALEXNET}, "
                "a CLIP model in clip/, or what scripts/train_features.py wrote in features/"
            )

    @cached_property
    def inception(self) -> Extractor | Unavailable:
        return self._loaded(INCEPTION, lambda path: Extractor.inception(path, self.device))

    @cached_property
    def lpips(self) -> Lpips | Unavailable:
        return self._loaded(ALEXNET, lambda path: Lpips.load(path, self.device))

    @cached_property
    def clip(self) -> Clip | Unavailable:
        """The model that the user named, else the first of OpenAI's in the hub cache."""
        named = self._clip()
        problem = "no CLIP model is in the hub cache"
        for source in (named,) if named else _CLIPS:
            try:
                return Clip.load(source, self.device)
            except BitPolicyError as error:
                problem = str(error) if named else problem
        return Unavailable(problem, f"run `hf download {_CLIPS[1]}`, or give its folder with --features")

    @cached_property
    def small(self) -> FeatureNetwork | None:
        """The small network of `features` or of the pipeline; None if neither has one.

        Raises:
            BitPolicyError: it is damaged.
        """
        folder = self._small()
        return None if folder is None else FeatureNetwork.load(folder).to(self.device)

    @property
    def small_extractor(self) -> Extractor | None:
        return None if self.small is None else Extractor.small(self.small, self.device)

    @property
    def uncalibrated(self) -> Uncalibrated | None:
        return None if self.small is None else Uncalibrated(self.small, self.device)

    def _loaded(self, name: str, load: Callable[[Path], T]) -> T | Unavailable:
        path = self._file(name)
        remedy = f"download {_URLS[name]} to {_hub()}, or give its folder with --features"
        if path is None:
            return Unavailable(f"{name} is not here", remedy)
        try:
            return load(path)
        except BitPolicyError as error:
            return Unavailable(str(error), remedy)

    def _file(self, name: str, here: bool = False) -> Path | None:
        """`features` itself, or a file in it. Unless `here` is set, torch.hub's cache is searched too."""
        places = [] if here else [_hub() / name]
        if self.features is not None:
            places = [self.features if self.features.name == name else self.features / name, *places]
        return next((path for path in places if path.is_file()), None)

    def _small(self) -> Path | None:
        folders = [] if self.features is None else [self.features, self.features / "features"]
        if self.pipeline is not None:
            folders.append(self.pipeline / "features")
        return next(filter(is_feature_network, folders), None)

    def _clip(self) -> Path | None:
        folders = [] if self.features is None else [self.features, self.features / "clip"]
        return next(filter(_is_clip, folders), None)


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _is_clip(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "clip"
    except (OSError, ValueError, AttributeError):
        return False
