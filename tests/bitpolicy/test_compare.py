"""compare.png: one column per prompt, the reference above, PSNR below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitpolicy.workflow.compare import _CELL, _GAP, _LEFT, _LINE, fitted, save_comparison


def constant(red: float, green: float, blue: float, size: int = 16) -> torch.Tensor:
    return torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, size, size).contiguous()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def middle(sheet: np.ndarray, column: int, row: int) -> list[int]:
    y = 2 * _LINE + row * (_CELL + _GAP) + _CELL // 2
    return sheet[y, _LEFT + column * (_CELL + _GAP) + _CELL // 2].tolist()


@pytest.mark.parametrize("size", [16, 64, 512])
def test_each_image_is_in_its_place(tmp_path: Path, size: int) -> None:
    reference = [constant(1, 0, 0, size), constant(0, 1, 0, size)]
    images = [constant(0, 0, 1, size), constant(1, 1, 1, size)]
    rows = [("8 MB", reference), ("3 MB", images)]
    save_comparison(tmp_path / "compare.png", ["cat", "dog"], rows, [12.3, None])
    sheet = pixels(tmp_path / "compare.png")
    assert middle(sheet, 0, 0) == [255, 0, 0]
    assert middle(sheet, 1, 0) == [0, 255, 0]
    assert middle(sheet, 0, 1) == [0, 0, 255]
    assert [path.name for path in tmp_path.iterdir()] == ["compare.png"]


def test_a_picture_has_one_column_per_prompt(tmp_path: Path) -> None:
    image = constant(0.5, 0.5, 0.5)
    widths = []
    for count in (1, 2, 8):
        rows = [("a", [image] * count), ("b", [image] * count)]
        save_comparison(tmp_path / "compare.png", ["cat"] * count, rows, [None] * count)
        widths.append(pixels(tmp_path / "compare.png").shape[1])
    assert widths[1] - widths[0] == (widths[2] - widths[1]) / 6 == _CELL + _GAP


def test_captions_of_any_length_and_script_are_drawn(tmp_path: Path) -> None:
    image = constant(0, 0, 0)
    captions = ["", "a very long prompt that would never fit above a picture of this width", "café ☕ 猫"]
    save_comparison(tmp_path / "compare.png", captions, [("a", [image] * 3), ("b", [image] * 3)], [1.0, None, 99.9])
    sheet = pixels(tmp_path / "compare.png")
    above = sheet[: 2 * _LINE, _LEFT:].min(axis=(0, 2))  # darkest in each column of pixels
    between = above[_CELL : _CELL + _GAP].tolist() + above[2 * _CELL + _GAP : 2 * (_CELL + _GAP)].tolist()
    assert min(between) == 255  # no caption runs into its neighbour's column


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    rows = [("a", [constant(2.0, -1.0, 0.0)]), ("b", [constant(0, 0, 0)])]
    save_comparison(tmp_path / "compare.png", ["cat"], rows, [None])
    assert middle(pixels(tmp_path / "compare.png"), 0, 0) == [255, 0, 0]


def drawn(folder: Path, reference: torch.Tensor, found: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The two cells of one column, each uint8 (160, 160, 3)."""
    save_comparison(folder / "compare.png", ["cat"], [("a", [reference]), ("b", [found])], [None])
    sheet = pixels(folder / "compare.png")
    tops = [2 * _LINE + row * (_CELL + _GAP) for row in range(2)]
    first, second = (sheet[top : top + _CELL, _LEFT : _LEFT + _CELL] for top in tops)
    return first, second


COLOURS = {  # channels -> what is drawn where every channel has its value
    1: ([0.2], [51, 51, 51]),
    2: ([0.2, 0.4], [51, 102, 0]),
    3: ([0.2, 0.4, 0.6], [51, 102, 153]),
    4: ([0.2, 0.4, 0.6, 0.5], [153, 178, 204]),  # half transparent, on white
}


@pytest.mark.parametrize("channels", COLOURS)
def test_an_image_of_up_to_four_channels_is_one_picture(tmp_path: Path, channels: int) -> None:
    values, expected = COLOURS[channels]
    image = torch.tensor(values).view(-1, 1, 1).expand(channels, 20, 20)
    for cell in drawn(tmp_path, image, image):
        assert np.abs(cell.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("channels", [5, 9, 16])
def test_with_more_channels_each_is_a_tile(tmp_path: Path, channels: int) -> None:
    image = torch.stack([torch.full((20, 20), i / channels) for i in range(channels)])
    first, _ = drawn(tmp_path, image, image)
    shades = set(first[:, :, 0].flatten().tolist())
    assert {round(255 * i / channels) for i in range(min(channels, 9))} <= shades


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 4096), (3000, 2), (7, 5), (160, 160), (161, 159), (2000, 3000)]
)
def test_an_image_of_any_size_is_visible_and_stays_in_its_cell(tmp_path: Path, size: tuple[int, int]) -> None:
    black = torch.zeros(3, *size)
    save_comparison(tmp_path / "compare.png", ["", ""], [("", [black] * 2), ("", [black] * 2)], [None, None])
    sheet = pixels(tmp_path / "compare.png")[2 * _LINE : 2 * _LINE + 2 * _CELL + _GAP, _LEFT:]
    dark = (sheet == 0).all(2)
    assert dark[:_CELL, :_CELL].any(0).sum() >= 12
    assert dark[:_CELL, :_CELL].any(1).sum() >= 12
    assert max(dark[:_CELL, :_CELL].any(0).sum(), dark[:_CELL, :_CELL].any(1).sum()) == _CELL
    assert not dark[_CELL : _CELL + _GAP].any()
    assert not dark[:, _CELL : _CELL + _GAP].any()


@pytest.mark.parametrize("frames", [1, 2, 3, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_shows_its_first_and_last_frame(tmp_path: Path, frames: int, channels: int) -> None:
    shades = torch.linspace(0.2, 0.8, frames)
    video = shades.view(-1, 1, 1, 1).expand(frames, channels, 8, 12)
    first, second = drawn(tmp_path, video, 1 - video)
    assert (np.abs(first.astype(int) - 51).max(2) <= 1).any()
    assert (np.abs(second.astype(int) - 204).max(2) <= 1).any()
    if frames > 1:
        assert (np.abs(first.astype(int) - 204).max(2) <= 1).any()
        places = np.argwhere(np.abs(first.astype(int) - 204).max(2) <= 1)
        assert places.mean(0).tolist() > np.argwhere(np.abs(first.astype(int) - 51).max(2) <= 1).mean(0).tolist()


@pytest.mark.parametrize("channels", [0, 1, 2])
def test_a_sound_is_drawn_as_its_spectrogram(tmp_path: Path, channels: int) -> None:
    """A tone is a line: the higher the tone, the higher the line. 0 channels stand for a plain row of samples."""
    time = torch.arange(20000)
    low, high = (torch.sin(torch.pi * share * time) for share in (0.25, 0.75))
    sounds = [tone if channels == 0 else tone.expand(channels, -1) for tone in (low, high)]
    for cell, share in zip(drawn(tmp_path, *sounds), (0.25, 0.75), strict=True):
        brightest = cell.astype(int).sum(2)[:, 40:120].argmax(0)
        assert np.abs(brightest - _CELL * (1 - share)).max() <= 3


@pytest.mark.parametrize("samples", [1, 2, 15, 100, 5000, 500_000])
def test_a_sound_of_any_length_is_drawn(tmp_path: Path, samples: int) -> None:
    sound = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    first, second = drawn(tmp_path, sound, torch.zeros(samples))
    assert first.std() > 1
    assert (second == second[0, 0]).all()  # silence


def test_both_sounds_of_a_column_share_one_scale(tmp_path: Path) -> None:
    noise = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    loud, quiet = drawn(tmp_path, noise, noise / 100)
    assert quiet.astype(int).sum() < 0.6 * loud.astype(int).sum()


class Font:
    """Every character is ten pixels wide. Counts the measured characters."""

    def __init__(self) -> None:
        self.characters = 0

    def length(self, text: str) -> float:
        self.characters += len(text)
        return 10.0 * len(text)


def test_a_caption_has_as_many_characters_as_fit() -> None:
    font = Font()
    assert fitted("a" * 16, font.length) == "a" * 16
    assert fitted("a" * 17, font.length) == "a" * 15 + "…"
    assert fitted("two\nlines \t here", font.length) == "two lines here"
    assert fitted("", font.length) == ""


def test_a_caption_of_25000_characters_takes_few_measurements() -> None:
    """Measured one by one, that would be 300 million characters, and minutes."""
    font = Font()
    assert fitted("word " * 5000, font.length) == "word word word…"
    assert font.characters < 20_000
    assert fitted("x" * 25_000, font.length) == "x" * 15 + "…"
    assert fitted(" " * 2000 + "late", font.length) == "late"


def test_a_very_long_prompt_is_drawn(tmp_path: Path) -> None:
    image = constant(0, 0, 0)
    rows = [("a", [image]), ("b", [image])]
    save_comparison(tmp_path / "compare.png", ["a prompt without end\n" * 1250], rows, [None])
    assert pixels(tmp_path / "compare.png").shape[1] == _LEFT + _CELL + _GAP
