"""How close images are to the reference's beyond PSNR: `bitpolicy.search.quality.metrics`, each entry measured once.

What is not to be had here (Inception's weights, LPIPS's backbone) is left out of the table and named below it; the
distances in the features of the pipeline's own small network are always there.
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
        per_image: metric -> value of each pair; LPIPS is better the lower it is.
        per_set: metric -> distance between the two sets, the lower the better.
        missing: metric -> why it is not to be had.
    """

    per_image: dict[str, list[float]]
    per_set: dict[str, float]
    missing: dict[str, str]


def measured(reference: torch.Tensor, images: torch.Tensor, pipeline: Path, kept: Path) -> Measured:
    """Measure, or read what was measured before from `kept`.

    Args:
        reference, images: shape (n, C, H, W), in [0, 1].
        pipeline: folder whose `features/` holds the small network.
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
