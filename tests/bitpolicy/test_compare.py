"""The picture of both: a column a prompt, the reference above, PSNR below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitpolicy.compare import _CELL, _GAP, _LEFT, _LINE, save_comparison


def constant(red: float, green: float, blue: float, size: int = 16) -> torch.Tensor:
    return torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, size, size).contiguous()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def middle(sheet: np.ndarray, column: int, row: int) -> list[int]:
    y = 2 * _LINE + row * (_CELL + _GAP) + _CELL // 2
    return sheet[y, _LEFT + column * (_CELL + _GAP) + _CELL // 2].tolist()


@pytest.mark.parametrize("size", [16, 64, 512])
def test_each_image_is_where_it_belongs(tmp_path: Path, size: int) -> None:
    reference = [constant(1, 0, 0, size), constant(0, 1, 0, size)]
    images = [constant(0, 0, 1, size), constant(1, 1, 1, size)]
    rows = [("8 MB", reference), ("3 MB", images)]
    save_comparison(tmp_path / "compare.png", ["cat", "dog"], rows, [12.3, None])
    sheet = pixels(tmp_path / "compare.png")
    assert middle(sheet, 0, 0) == [255, 0, 0]
    assert middle(sheet, 1, 0) == [0, 255, 0]
    assert middle(sheet, 0, 1) == [0, 0, 255]
    assert [path.name for path in tmp_path.iterdir()] == ["compare.png"]


def test_a_picture_grows_by_a_column_a_prompt(tmp_path: Path) -> None:
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
