"""CLIPScore: how well an image fits its prompt (Hessel et al. 2021, section 3), computed by torchmetrics.

    score = max(100 cos(E_image, E_text), 0)

E are the embeddings of a CLIP model. The score of the reference's images is reported next to that of the quantized
pipeline's: one score alone says little, and scores from different CLIP models cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.quality.psnr import Images, Paired, frames


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its processor.

    Attributes:
        name: its hub id or folder.
        model: with the interface that torchmetrics expects.
        processor: likewise.
        device: where it computes.
    """

    name: str
    model: nn.Module
    processor: Any
    device: torch.device

    @classmethod
    def load(cls, source: str | Path, device: torch.device, name: str | None = None) -> Clip:
        """Load from a folder or the hub cache. Nothing is downloaded.

        Raises:
            BitPolicyError: it is not there, or is not a CLIP model.
        """
        try:
            model = CLIPModel.from_pretrained(str(source), local_files_only=True).eval().requires_grad_(False)
            processor = CLIPProcessor.from_pretrained(str(source), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
            raise BitPolicyError(f"{source} is not a CLIP model: {' '.join(str(error).split())[:200]}") from error
        return cls(name or str(source), _Tensors(model).to(device), _Truncated(processor, model), device)

    def __call__(self, reference: Images, images: Images, prompts: Sequence[str]) -> Paired:
        """Scores of `images`, together with the mean score of `reference`.

        Args:
            reference, images: shape (C, H, W), or (frames, C, H, W), float in [0, 1].
            prompts: one per image.
        """
        found = tuple(self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True))
        before = fmean(self._score(image, prompt) for image, prompt in zip(reference, prompts, strict=True))
        return Paired("clip", found, "higher", network=self.name, of_reference=before)

    @torch.no_grad()
    def _score(self, image: torch.Tensor, prompt: str) -> float:
        """The score of an image, or the mean over the frames of a video."""
        pictures = [(frame * 255).round().to(self.device, torch.uint8) for frame in frames(image).clamp(0, 1)]
        return fmean(float(clip_score(picture, prompt, lambda: (self.model, self.processor))) for picture in pictures)


class _Tensors(nn.Module):
    """CLIP with the interface that torchmetrics expects: transformers 5 returns features inside an output object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_image_features(pixels))

    def get_text_features(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_text_features(tokens, attention_mask=mask))


class _Truncated:
    """A processor that truncates long prompts: torchmetrics would cut off the end token, which CLIP reads."""

    def __init__(self, processor: Any, model: Any) -> None:
        self._processor, self._longest = processor, model.config.text_config.max_position_embeddings

    def __call__(self, text: list[str] | None = None, **options: Any) -> Any:
        if text is None:
            return self._processor(**options)
        return self._processor(text=text, truncation=True, max_length=self._longest, **options)


def _tensor(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output
