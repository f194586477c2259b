"""compare.png: the reference above, the quantized pipeline below, the same prompts and seeds, PSNR under each pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bitpolicy.policies.atomic import written_aside

_CELL, _GAP, _LEFT, _LINE = 160, 12, 96, 16  # pixels
_INK, _PAPER = "#1f2328", "white"


def save_comparison(
    path: Path,
    captions: Sequence[str],
    rows: Sequence[tuple[str, Sequence[torch.Tensor]]],
    psnr: Sequence[float | None],
) -> None:
    """Write the grid.

    Args:
        captions: one above each column, e.g. the prompt.
        rows: (label, images), images float (3, H, W) in [0, 1]; the first row is the reference.
        psnr: dB under each column, None where the pair is identical.
    """
    font = ImageFont.load_default(size=13)
    width = _LEFT + len(captions) * (_CELL + _GAP)
    height = 2 * _LINE + _GAP + len(rows) * (_CELL + _GAP) + 2 * _LINE
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = _LEFT + column * (_CELL + _GAP) + _CELL // 2
        draw.text((x, _GAP), _fitted(caption, font), _INK, font=font, anchor="mt")
        below = "identical" if psnr[column] is None else f"{psnr[column]:.1f} dB"
        draw.text((x, height - 2 * _LINE), below, _INK, font=font, anchor="mt")
    for row, (label, images) in enumerate(rows):
        y = 2 * _LINE + row * (_CELL + _GAP)
        draw.text((_GAP, y + _CELL // 2), label, _INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(_picture(image), (_LEFT + column * (_CELL + _GAP), y))
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")


def _picture(image: torch.Tensor) -> Image.Image:
    pixels = (image.permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    smooth = Image.Resampling.LANCZOS if max(picture.size) > _CELL else Image.Resampling.BICUBIC
    picture.thumbnail((_CELL, _CELL), smooth)
    scale = _CELL / max(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), smooth)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > _CELL:
        text = text[:-2].rstrip("…") + "…"
    return text
