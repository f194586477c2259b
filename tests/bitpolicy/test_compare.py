"""compare.png: one column per prompt, the reference above, other versions below it, each with its PSNR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from bitpolicy.search.quality.psnr import Paired
from bitpolicy.workflow.compare import _CELL, _GAP, _LINE, Row, fitted, save_comparison, save_sounds


def constant(red: float, green: float, blue: float, size: int = 16) -> torch.Tensor:
    return torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, size, size).contiguous()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def pair(first: list[torch.Tensor], second: list[torch.Tensor], *psnr: float | None) -> list[Row]:
    """Two rows. Without `psnr`, all pairs are called identical."""
    return [Row(("a",), first), Row(("b",), second, in_db(*(psnr or (None,) * len(first))))]


def in_db(*psnr: float | None) -> Paired:
    return Paired("psnr", psnr, "higher", "dB")


def left(sheet: np.ndarray, columns: int) -> int:
    """Width of the labels."""
    return sheet.shape[1] - columns * (_CELL + _GAP)


def top(row: int) -> int:
    """Upper edge of a row: every row but the first has a line of text below it."""
    return 2 * _LINE + row * (_CELL + _GAP) + max(row - 1, 0) * _LINE


def middle(sheet: np.ndarray, columns: int, column: int, row: int) -> list[int]:
    x = left(sheet, columns) + column * (_CELL + _GAP)
    return sheet[top(row) + _CELL // 2, x + _CELL // 2].tolist()


def is_written(part: np.ndarray) -> bool:
    """Whether there is dark text on the paper."""
    return bool(part.min() < 100)


@pytest.mark.parametrize("size", [16, 64, 512])
def test_each_image_is_in_its_place(tmp_path: Path, size: int) -> None:
    reference = [constant(1, 0, 0, size), constant(0, 1, 0, size)]
    images = [constant(0, 0, 1, size), constant(1, 1, 1, size)]
    others = [constant(0, 1, 1, size), constant(1, 1, 0, size)]
    rows = [
        *pair(reference, images, 12.3, None),
        Row(("c", "INT4 everywhere"), others, in_db(5.0, 6.0)),
    ]
    save_comparison(tmp_path / "compare.png", ["cat", "dog"], rows)
    sheet = pixels(tmp_path / "compare.png")
    assert [middle(sheet, 2, column, 0) for column in (0, 1)] == [[255, 0, 0], [0, 255, 0]]
    assert middle(sheet, 2, 0, 1) == [0, 0, 255]
    assert [middle(sheet, 2, column, 2) for column in (0, 1)] == [[0, 255, 255], [255, 255, 0]]
    assert [path.name for path in tmp_path.iterdir()] == ["compare.png"]


def test_a_picture_has_one_column_per_prompt(tmp_path: Path) -> None:
    image = constant(0.5, 0.5, 0.5)
    widths = []
    for count in (1, 2, 8):
        save_comparison(tmp_path / "compare.png", ["cat"] * count, pair([image] * count, [image] * count))
        widths.append(pixels(tmp_path / "compare.png").shape[1])
    assert widths[1] - widths[0] == (widths[2] - widths[1]) / 6 == _CELL + _GAP


def test_captions_of_any_length_and_script_are_drawn(tmp_path: Path) -> None:
    image = constant(0, 0, 0)
    captions = ["", "a very long prompt that would never fit above a picture of this width", "café ☕ 猫"]
    save_comparison(tmp_path / "compare.png", captions, pair([image] * 3, [image] * 3, 1.0, None, 99.9))
    sheet = pixels(tmp_path / "compare.png")
    above = sheet[: 2 * _LINE, left(sheet, 3) :].min(axis=(0, 2))  # darkest in each column of pixels
    between = above[_CELL : _CELL + _GAP].tolist() + above[2 * _CELL + _GAP : 2 * (_CELL + _GAP)].tolist()
    assert min(between) == 255  # no caption runs into its neighbour's column


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    rows = pair([constant(2.0, -1.0, 0.0)], [constant(0, 0, 0)])
    save_comparison(tmp_path / "compare.png", ["cat"], rows)
    assert middle(pixels(tmp_path / "compare.png"), 1, 0, 0) == [255, 0, 0]


@pytest.mark.parametrize("label", ["b", "INT4 in 1,234 of 5,678 layers"])
def test_every_label_and_every_number_is_whole(tmp_path: Path, label: str) -> None:
    """On white images, all that is dark is text. None of it touches an edge or a cell."""
    white = [constant(1, 1, 1)] * 2
    rows = [Row(("original", "8 MB"), white)]
    rows += [Row((label, "3 MB", "12.3 dB", "larger"), white, in_db(12.3, None)) for _ in range(2)]
    save_comparison(tmp_path / "compare.png", ["cat", "dog"], rows)
    sheet = pixels(tmp_path / "compare.png")
    start = left(sheet, 2)
    for row in range(3):
        beside = sheet[top(row) : top(row) + _CELL]
        assert is_written(beside[:, _GAP : start - _GAP])
        assert not is_written(np.concatenate([beside[:8], beside[-8:]]))
        assert not is_written(np.concatenate([beside[:, : _GAP - 1], beside[:, start - _GAP // 2 :]], axis=1))
        below = sheet[top(row) + _CELL : top(row) + _CELL + _LINE + 4, start:]
        for column in range(2):
            x = column * (_CELL + _GAP)
            assert is_written(below[:, x : x + _CELL]) == (row > 0)
            assert not is_written(below[:, x + _CELL : x + _CELL + _GAP])
    assert not is_written(sheet[-4:])


def test_a_row_says_what_it_shows() -> None:
    """At most eight images; their mean PSNR, of which the others are no part."""
    black = [constant(0, 0, 0)] * 10
    grey = [constant(0.1, 0.1, 0.1)] * 8 + [constant(1, 1, 1)] * 2  # 20 dB from black
    row = Row.of("this policy", 5_000_000, grey, black)
    assert row.label == ("this policy", "5 MB", "20.0 dB")
    assert len(row.results) == 8
    assert row.closeness is not None
    assert row.closeness.per_image == pytest.approx([20.0] * 8)
    assert Row.of("original", 11_473_000, black).label == ("original", "11.5 MB")
    assert Row.of("a copy", 1, black, black).label[-1] == "identical"


def drawn(folder: Path, reference: torch.Tensor, found: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The two cells of one column, each uint8 (160, 160, 3)."""
    save_comparison(folder / "compare.png", ["cat"], pair([reference], [found]))
    sheet = pixels(folder / "compare.png")
    x = left(sheet, 1)
    first, second = (sheet[top(row) : top(row) + _CELL, x : x + _CELL] for row in range(2))
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
    save_comparison(tmp_path / "compare.png", ["", ""], pair([black] * 2, [black] * 2))
    sheet = pixels(tmp_path / "compare.png")
    sheet = sheet[2 * _LINE : 2 * _LINE + 2 * _CELL + _GAP, left(sheet, 2) :]
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


def test_sounds_are_written_to_listen_to(tmp_path: Path) -> None:
    sounds = [torch.linspace(-2, 2, 100).expand(2, -1) for _ in range(4)]
    rows = [Row.of("original", 9, sounds), Row.of("this policy", 5, [sound / 2 for sound in sounds], sounds, 8000)]
    assert rows[1].label[-1].startswith("differs by")
    folder = save_sounds(tmp_path / "compare.png", rows, 8000)
    assert folder == tmp_path / "compare-sounds"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(f"{place} {name}.wav" for place in (1, 2, 3) for name in ("original", "this policy"))
    rate, written = wavfile.read(folder / "1 original.wav")
    assert (rate, written.shape, written.min(), written.max()) == (8000, (100, 2), -32767, 32767)
    assert save_sounds(tmp_path / "other.png", pair([torch.zeros(3, 4, 4)], [torch.zeros(3, 4, 4)]), 8000) is None
    assert not (tmp_path / "other-sounds").exists()


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
    widths = []
    for caption in ("cat", "a prompt without end\n" * 1250):
        save_comparison(tmp_path / "compare.png", [caption], pair([image], [image]))
        widths.append(pixels(tmp_path / "compare.png").shape[1])
    assert widths[0] == widths[1]
