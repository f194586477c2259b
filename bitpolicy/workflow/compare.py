"""compare.png: one column per prompt and seed. The reference is above; every row below it shows another version of the
pipeline, with the PSNR of each image, or the mel distance of each sound.

An image of any size and any number of channels fills a square cell. A video is shown as a few frames. A sound is shown
as its spectrogram, in dB below the loudest value in the column. The sounds of the first columns are also written as WAV
files, in a folder beside the picture.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.io import wavfile

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.search.quality.psnr import Paired
from bitpolicy.search.quality.sound import are_sounds, compared

PICTURES = 8  # columns, at most
_CELL, _GAP, _LINE = 160, 12, 16  # pixels
_HEARD = 3  # columns whose sounds are written
_THINNEST, _BETWEEN = 12, 2  # pixels: the short side of a very long image, and between the tiles of a cell
_INK, _PAPER = "#1f2328", "white"
_FRAMES, _CHANNELS = 4, 9  # limits for a video and for an image of many channels
_WINDOW, _RANGE = 1024, 80  # samples, dB
OWN = "this policy"  # label of the row that a search compares
_LONGEST = 1000  # characters of a prompt that are measured; enough to fill a cell

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """One row of the grid.

    Attributes:
        label: text to its left, in lines.
        results: one per column: an image, float (C, H, W) in [0, 1], a video, (frames, C, H, W), or a sound, (samples)
            or (channels, samples).
        closeness: to the first row; None for the first row itself.
    """

    label: Sequence[str]
    results: Sequence[torch.Tensor]
    closeness: Paired | None = None

    @classmethod
    def of(
        cls,
        name: str,
        nbytes: int,
        results: Sequence[torch.Tensor],
        reference: Sequence[torch.Tensor] | None = None,
        rate: int = 0,
    ) -> Row:
        """At most `PICTURES` results, with the size and, against a reference, their mean closeness in the label.

        Args:
            rate: samples a second of sounds.
        """
        shown, size = results[:PICTURES], f"{nbytes / 1e6:.3g} MB"
        if reference is None:
            return cls((name, size), shown)
        found = compared(reference[:PICTURES], shown, rate)
        return cls((name, size, in_words(found.mean, found)), shown, found)


@dataclass(frozen=True)
class _Layout:
    """Where things are, in pixels.

    Attributes:
        left: width of the labels.
        tops: upper edge of each row's cells.
        height: of the whole sheet.
    """

    left: int
    tops: tuple[int, ...]
    height: int

    @classmethod
    def of(cls, rows: Sequence[Row], length: Callable[[str], float]) -> _Layout:
        left = 2 * _GAP + ceil(max(length(line) for row in rows for line in row.label))
        tops, top = [], 2 * _LINE
        for row in rows:
            tops.append(top)
            top += _CELL + _GAP + (_LINE if row.closeness else 0)
        return cls(left, tuple(tops), top)

    def x(self, column: int) -> int:
        return self.left + column * (_CELL + _GAP)


def save_comparison(path: Path, captions: Sequence[str], rows: Sequence[Row]) -> None:
    """Write the grid.

    Args:
        captions: text above each column, e.g. the prompt.
        rows: the first one is the reference.
    """
    font = ImageFont.load_default(size=13)
    captions = captions[: len(rows[0].results)]
    place = _Layout.of(rows, font.getlength)
    sheet = Image.new("RGB", (place.x(len(captions)), place.height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, place.tops, strict=True):
        _draw_label(draw, row.label, top + _CELL // 2, font)
    for column, caption in enumerate(captions):
        x = place.x(column)
        middle = x + _CELL // 2
        draw.text((middle, _GAP), fitted(caption, font.getlength), _INK, font=font, anchor="mt")
        pictures = _pictures([row.results[column] for row in rows])
        for row, top, picture in zip(rows, place.tops, pictures, strict=True):
            sheet.paste(picture, (x + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
            if row.closeness is not None:
                below = in_words(row.closeness.per_image[column], row.closeness)
                draw.text((middle, top + _CELL + _LINE // 4), below, _INK, font=font, anchor="mt")
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")


def pairs_in(path: Path) -> list[tuple[Image.Image, Image.Image]]:
    """The cells of the reference and of the row below it, column by column, in a picture that a search saved.

    The labels' width is the only one that fits the picture's: it is less than a column wider than "this policy". A
    picture of another height has no pairs.

    Raises:
        BitPolicyError: it is not a picture.
    """
    try:
        sheet = Image.open(path).convert("RGB")
    except OSError as error:
        raise BitPolicyError(f"cannot read {path}: {error}; run the same search again") from error
    column, (upper, lower) = _CELL + _GAP, (2 * _LINE, 2 * _LINE + _CELL + _GAP)
    if sheet.height < lower + column or (sheet.height - lower) % (column + _LINE):
        return []
    narrowest = 2 * _GAP + ceil(ImageFont.load_default(size=13).getlength(OWN))
    left = narrowest + (sheet.width - narrowest) % column

    def cell(x: int, y: int) -> Image.Image:
        return sheet.crop((x, y, x + _CELL, y + _CELL))

    return [(cell(x, upper), cell(x, lower)) for x in range(left, sheet.width, column)]


def in_words(value: float | None, closeness: Paired) -> str:
    """One value, or the mean, of `closeness`; None means that the results are identical."""
    if value is None:
        return "identical"
    return f"{value:.1f} dB" if closeness.better == "higher" else f"differs by {value:.2g} dB"


def save_sounds(path: Path, rows: Sequence[Row], rate: int) -> Path | None:
    """Write the first sounds of each row as 16-bit WAV files, e.g. "1 original.wav"; returns their folder.

    Args:
        path: of the picture. The folder is beside it.
        rate: samples a second.
    """
    if not are_sounds(rows[0].results):
        return None
    folder = path.with_name(f"{path.stem}-sounds")
    folder.mkdir(exist_ok=True)
    for row in rows:
        for place, sound in enumerate(row.results[:_HEARD], 1):
            whole = torch.nan_to_num(sound).clamp(-1, 1).mul(2**15 - 1).round().short().cpu()
            wavfile.write(folder / f"{place} {row.label[0]}.wav", rate, whole.T.numpy())
    return folder


def _draw_label(draw: ImageDraw.ImageDraw, lines: Sequence[str], middle: int, font: Font) -> None:
    top = middle - len(lines) * (_LINE + 2) // 2
    for place, line in enumerate(lines):
        draw.text((_GAP, top + place * (_LINE + 2)), line, _INK, font=font, anchor="lt")


def _pictures(results: Sequence[torch.Tensor]) -> list[Image.Image]:
    """One RGB picture for each result of a column, at most as large as a cell."""
    results = [torch.nan_to_num(result.detach().float().cpu()) for result in results]
    if all(result.dim() < 3 for result in results):
        return [_fitted_to(picture, _CELL) for picture in _spectrograms(results)]
    return [_picture(result) for result in results]


def _picture(result: torch.Tensor) -> Image.Image:
    frames = result.flatten(0, -4) if result.dim() > 3 else result[None]
    places = torch.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().int().tolist()
    return _mosaic([tile for place in places for tile in _tiles(frames[place])])


def _tiles(image: torch.Tensor) -> list[Image.Image]:
    """The tiles of an image (C, H, W): one for up to four channels, otherwise a grey one for each channel."""
    if len(image) > 4:
        return [_rgb(channel[None]) for channel in image[:_CHANNELS]]
    return [_rgb(image)]


def _rgb(image: torch.Tensor) -> Image.Image:
    """One channel is grey, two are red and green, the fourth is opacity."""
    channels, *size = image.shape
    if channels == 1:
        image = image.expand(3, *size)
    elif channels == 2:
        image = torch.cat([image, torch.zeros(1, *size)])
    elif channels == 4:
        opacity = image[3:].clamp(0, 1)
        image = image[:3] * opacity + 1 - opacity
    pixels = (image.permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(pixels)


def _mosaic(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles of equal size, in a grid that fits into one cell."""
    across = ceil(sqrt(len(tiles)))
    side = (_CELL - (across - 1) * _BETWEEN) // across
    fitted_tiles = [_fitted_to(tile, side) for tile in tiles]
    width, height = fitted_tiles[0].size
    down = ceil(len(tiles) / across)
    sheet = Image.new("RGB", (across * (width + _BETWEEN) - _BETWEEN, down * (height + _BETWEEN) - _BETWEEN), _PAPER)
    for place, tile in enumerate(fitted_tiles):
        sheet.paste(tile, (place % across * (width + _BETWEEN), place // across * (height + _BETWEEN)))
    return sheet


def _fitted_to(picture: Image.Image, side: int) -> Image.Image:
    """The picture, scaled to fit into a square of `side` pixels. One that would be too thin to see is stretched."""
    scale = side / max(picture.size)
    size = [max(round(length * scale), min(_THINNEST, side)) for length in picture.size]
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return picture.resize((size[0], size[1]), smooth)


def _spectrograms(sounds: Sequence[torch.Tensor]) -> list[Image.Image]:
    """Spectrograms with time from left to right and frequency from bottom to top; channels are mixed."""
    levels = [_levels(sound) for sound in sounds]
    loudest = max(float(level.max()) for level in levels)
    colours = matplotlib.colormaps["magma"]
    shades = [((level - loudest) / _RANGE + 1).clamp(0, 1).flip(0).numpy() for level in levels]
    return [Image.fromarray((colours(shade)[..., :3] * 255).round().astype(np.uint8)) for shade in shades]


def _levels(sound: torch.Tensor) -> torch.Tensor:
    """A sound's short-time spectrum in dB, from the mean power of its channels; shape (_CELL, _CELL)."""
    channels = sound.reshape(-1, sound.shape[-1])
    length = channels.shape[1]
    window = min(_WINDOW, 2 ** max(4, length.bit_length() - 3))
    padded = torch.nn.functional.pad(channels, (0, max(0, window - length)))
    spectrum = torch.stft(padded, window, window // 4, window=torch.hann_window(window), return_complex=True)
    power = spectrum.abs().square().mean(0)[None, None]
    cell = torch.nn.functional.interpolate(power, (_CELL, _CELL), mode="area")[0, 0]
    return 10 * torch.log10(cell + 1e-12)


def fitted(text: str, length: Callable[[str], float]) -> str:
    """As much of `text` as fits on one line above a cell, with an ellipsis if it was cut.

    Args:
        length: width of a line of text in pixels.
    """
    line = " ".join(text.split())
    if len(line) <= _LONGEST and length(line) <= _CELL:
        return line
    line = line[:_LONGEST]
    kept = bisect_right(range(1, len(line) + 1), False, key=lambda count: length(f"{line[:count]}…") > _CELL)
    return f"{line[:kept].rstrip()}…"
