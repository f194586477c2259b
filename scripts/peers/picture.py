"""A picture of the errors: the first held-out images of some entries, each above its difference to FP16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peers.scoring import REFERENCE, Scores
from PIL import Image

KEPT, IMAGES, TIMES = 16, 10, 8  # images in the first files, images shown, factor for differences


def draw(scores: Scores, rows: Sequence[tuple[str, str]], path: Path) -> None:
    """Write a picture.

    Args:
        rows: (label, name of an entry that has been scored).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    exact = scores.images(REFERENCE, "held_out", KEPT)[:IMAGES]
    strips = [("FP16", exact)]
    for label, name in rows:
        images = scores.images(name, "held_out", KEPT)[:IMAGES]
        strips += [(label, images), (f"difference x {TIMES}", ((images - exact).abs() * TIMES).clamp(max=1))]
    figure, axes = pyplot.subplots(len(strips), 1, figsize=(IMAGES * 0.64 + 2, len(strips) * 0.66), dpi=80)
    for axis, (label, images) in zip(axes, strips, strict=True):
        axis.imshow(torch.cat([*images], dim=2).permute(1, 2, 0).numpy())
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    figure.tight_layout(pad=0.3, h_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    Image.open(path).convert("RGB").quantize(256).save(path)  # a third of the size, without a visible difference
