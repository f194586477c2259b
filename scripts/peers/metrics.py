"""Metrics other than PSNR of how close images are to the reference (`bitpolicy.search.quality.metrics`), measured once.

Metrics that are unavailable (Inception's weights, LPIPS's backbone) are left out of the table and listed below it. The
distances in the features of the pipeline's own small network are always available.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from bitpolicy.search.quality.metrics import Comparison, Sets, measure
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Paired

ASKED = ("ssim", "lpips", "fid")


@dataclass(frozen=True)
class Measured:
    """One entry's metrics.

    Attributes:
        per_image: metric -> value for each pair of images; for LPIPS, lower is better.
        per_set: metric -> distance between the two sets; lower is better.
        missing: metric -> why it is unavailable.
    """

    per_image: dict[str, list[float]]
    per_set: dict[str, float]
    missing: dict[str, str]


def measured(reference: torch.Tensor, images: torch.Tensor, pipeline: Path, kept: Path) -> Measured:
    """Measures, or reads an earlier measurement from `kept`.

    Args:
        reference, images: shape (n, C, H, W), in [0, 1].
        pipeline: folder whose `features/` contains the small network.
    """
    if kept.is_file():
        return Measured(**json.loads(kept.read_text()))
    results = measure(ASKED, Comparison(list(reference), list(images)), Networks(pipeline=pipeline))
    found = Measured({}, {}, {})
    for name, result in results.items():
        if isinstance(result, Paired):
            found.per_image[name] = [float("nan") if value is None else value for value in result.per_image]
        elif isinstance(result, Sets):
            found.per_set[name] = result.to_reference
        else:
            found.missing[name] = result.reason
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(vars(found)) + "\n")
    return found
