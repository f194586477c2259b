"""The training images of the bundled pipeline: Noto emoji at 64 x 64, with their names.

The pictures come from the npm package `emoji-datasource-google` (images: Noto Emoji, Apache-2.0; metadata: emoji-data,
MIT). A few hundred are kept: faces, hearts, animals, plants, food, instruments, tools and shapes. Skin tones, flags and
joined sequences are left out. So is every emoji that looks almost the same as one already kept, because a small model
cannot learn the names of look-alikes.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
SIZE = 64
SUBCATEGORIES = (
    "heart face-smiling face-affection face-glasses face-hat face-costume cat-face monkey-face animal-mammal "
    "animal-bird animal-marine animal-bug animal-reptile animal-amphibian plant-flower food-fruit food-vegetable "
    "food-prepared food-sweet drink musical-instrument tool geometric"
).split()
FIRST = ("2764-FE0F", "1F49B", "1F600", "1F431", "1F437", "1F430", "1F42D")  # kept before their look-alikes
ALIASES = {"2764-FE0F": ["red heart"]}  # the Unicode name of the red heart is "heavy black heart"
LOOK_ALIKE = 0.015  # two pictures count as the same up to this mean squared difference of RGB in [0, 1]


@dataclass(frozen=True)
class Emoji:
    """One training picture.

    Attributes:
        image: shape (3, 64, 64), float32 in [-1, 1], on white.
        names: prompts for it, in lower case; the first is its Unicode name or its everyday alias.
        subcategory: its Unicode subcategory, e.g. "food-prepared".
    """

    image: torch.Tensor
    names: tuple[str, ...]
    subcategory: str


def fetch(folder: Path) -> Path:
    """Download and unpack the npm package below `folder`, unless it is already there; return the unpacked package."""
    package = folder / "package"
    if not (package / "emoji.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob("emoji-datasource-google-*.tgz")
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.name.startswith(("package/img/google/64/", "package/emoji.json"))]
            tar.extractall(folder, members, filter="data")
    return package


def load(package: Path) -> list[Emoji]:
    """The emoji kept for training, in a fixed order."""
    entries = [e for e in json.loads((package / "emoji.json").read_text()) if _wanted(e)]
    entries.sort(key=lambda e: (e["unified"] not in FIRST, e["sort_order"]))
    kept: list[Emoji] = []
    for entry in entries:
        image = _picture(package / "img" / "google" / "64" / entry["image"])
        if not kept or _nearest(image, kept) > LOOK_ALIKE:
            kept.append(Emoji(image, _names(entry), entry["subcategory"]))
    return kept


def _wanted(entry: dict) -> bool:
    return entry["subcategory"] in SUBCATEGORIES and entry["has_img_google"] and "-200D-" not in entry["unified"]


def _picture(path: Path) -> torch.Tensor:
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    pixels = np.asarray(ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _nearest(image: torch.Tensor, kept: list[Emoji]) -> float:
    others = torch.stack([emoji.image for emoji in kept])
    return float(((others - image) / 2).square().mean(dim=(1, 2, 3)).min())


def _names(entry: dict) -> tuple[str, ...]:
    spoken = [name.replace("_", " ").replace("-", " ") for name in entry["short_names"]]
    return tuple(dict.fromkeys([*ALIASES.get(entry["unified"], []), entry["name"].lower(), *spoken]))
