"""Training scenes: one to three Noto emoji on a coloured ground, composed on the fly, with captions.

    a panda on grey                          a large pizza left of a small red heart on blue
    a small car at the top on green          a frog and a cat above a star on white

Captions name sizes, places and colours. Each object is shifted by up to `JITTER` pixels, so no two pictures are equal.
A rule (`held_out`) decides which combinations training may use. Every scene of the test set contains a pair of objects,
or an object and a ground, that no training scene contains.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 64
JITTER = 2
HELD_OUT_SHARE = 0.1  # share of all pairs of objects, and of all pairs of an object and a ground
EMOJI = {
    "pizza": "1f355",
    "red heart": "2764-fe0f",
    "cat": "1f431",
    "panda": "1f43c",
    "frog": "1f438",
    "pig": "1f437",
    "penguin": "1f427",
    "octopus": "1f419",
    "apple": "1f34e",
    "banana": "1f34c",
    "strawberry": "1f353",
    "carrot": "1f955",
    "sunflower": "1f33b",
    "tree": "1f332",
    "cactus": "1f335",
    "mushroom": "1f344",
    "burger": "1f354",
    "donut": "1f369",
    "star": "2b50",
    "car": "1f697",
    "rocket": "1f680",
    "house": "1f3e0",
    "robot": "1f916",
    "ball": "26bd",
}
GROUNDS = {
    "white": (255, 255, 255),
    "blue": (112, 168, 240),
    "green": (150, 216, 150),
    "yellow": (250, 224, 120),
    "pink": (250, 178, 204),
    "grey": (168, 172, 178),
}
NAMES, COLOURS = tuple(EMOJI), tuple(GROUNDS)
SIZES = {"small": 20, "": 28, "large": 36}  # pixels
PLACES = {"": (32, 32), "at the left": (20, 32), "at the right": (44, 32), "at the top": (32, 20),
          "at the bottom": (32, 44)}  # fmt: skip
BESIDE = {"left of": ((17, 32), (47, 32)), "above": ((32, 17), (32, 47))}
WAYS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
SPEED = 1.5  # of moving things, in pixels per frame
TRIANGLE = ((17, 18), (47, 18), (32, 46))


@dataclass(frozen=True)
class Thing:
    """One emoji of a scene: its name, the word for its size, its centre (x, y) in pixels."""

    name: str
    size: str
    centre: tuple[float, float]

    @property
    def spoken(self) -> str:
        words = f"{self.size} {self.name}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """The content of a picture, and its caption.

    Attributes:
        things: one to three, in the order of the caption.
        ground: a key of `GROUNDS`.
        caption: e.g. "a large pizza left of a small red heart on blue".
    """

    things: tuple[Thing, ...]
    ground: str
    caption: str

    @cached_property
    def held_out(self) -> bool:
        """Whether the scene contains a combination that training never uses."""
        names = sorted(thing.name for thing in self.things)
        pairs = combinations(names, 2) if len(names) > 1 else [(names[0], self.ground)]
        return any(zlib.crc32("|".join(pair).encode()) % 1000 < 1000 * HELD_OUT_SHARE for pair in pairs)


def draw_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene of the training set, or of the held-out set."""
    while True:
        scene = _any_scene(rng)
        if scene.held_out == held_out:
            return scene


def unseen_captions(count: int, seed: int = 17) -> list[Scene]:
    """Held-out scenes with distinct captions, the same ones each time."""
    rng, chosen = random.Random(seed), {}
    while len(chosen) < count:
        scene = draw_scene(rng, held_out=True)
        chosen.setdefault(scene.caption, scene)
    return list(chosen.values())


def _any_scene(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), (0.3, 0.5, 0.2))[0]
    names, ground = rng.sample(NAMES, count), rng.choice(COLOURS)
    if count == 3:
        things = tuple(Thing(name, "", centre) for name, centre in zip(names, TRIANGLE, strict=True))
        return Scene(things, ground, "{} and {} above {} on ".format(*(t.spoken for t in things)) + ground)
    sizes = [rng.choice(tuple(SIZES)) for _ in names]
    if count == 1:
        place = rng.choice(tuple(PLACES))
        thing = Thing(names[0], sizes[0], PLACES[place])
        return Scene((thing,), ground, " ".join(f"{thing.spoken} {place} on {ground}".split()))
    if sizes == ["large", "large"]:  # they would not fit
        sizes[rng.randrange(2)] = ""
    relation = rng.choice(tuple(BESIDE))
    things = tuple(Thing(*each) for each in zip(names, sizes, BESIDE[relation], strict=True))
    return Scene(things, ground, f"{things[0].spoken} {relation} {things[1].spoken} on {ground}")


def jittered(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with every thing moved by up to JITTER pixels and kept inside the picture."""

    def moved(thing: Thing) -> Thing:
        half = SIZES[thing.size] / 2
        x, y = (min(max(c + rng.randint(-JITTER, JITTER), half), SIZE - half) for c in thing.centre)
        return replace(thing, centre=(x, y))

    return replace(scene, things=tuple(map(moved, scene.things)))


def clip(scene: Scene, way: str, rng: random.Random, frames: int = 8) -> tuple[Scene, ...]:
    """Frames in which all things move `way`, a key of WAYS, at SPEED pixels per frame. Halfway they show the scene."""
    right, down = WAYS[way]
    still = jittered(scene, rng)
    caption = scene.caption.replace(" on ", f" to the {way} on ")

    def at(frame: int) -> Scene:
        shift = SPEED * (frame - (frames - 1) / 2)
        things = (replace(t, centre=(t.centre[0] + right * shift, t.centre[1] + down * shift)) for t in still.things)
        return replace(scene, things=tuple(things), caption=caption)

    return tuple(map(at, range(frames)))


class Painter:
    """Renders scenes from the pictures of the npm package that `emoji_data.fetch` unpacked."""

    def __init__(self, package: Path) -> None:
        known = {e["image"].removesuffix(".png") for e in json.loads((package / "emoji.json").read_text())}
        missing = sorted(set(EMOJI.values()) - known)
        if missing:
            raise SystemExit(f"{package} has no pictures of {missing}; fetch emoji-datasource-google again")
        folder = package / "img" / "google" / "64"
        self.sprites = {
            (name, size): _sprite(folder / f"{code}.png", pixels)
            for name, code in EMOJI.items()
            for size, pixels in SIZES.items()
        }

    def paint(self, scene: Scene) -> np.ndarray:
        """The picture of a scene, uint8, shape (64, 64, 3)."""
        canvas = np.empty((SIZE, SIZE, 3), np.float32)
        canvas[:] = GROUNDS[scene.ground]
        for thing in scene.things:
            sprite = self.sprites[thing.name, thing.size]
            pixels = len(sprite)
            x, y = (round(c - pixels / 2) for c in thing.centre)
            left, top, right, bottom = max(-x, 0), max(-y, 0), max(x + pixels - SIZE, 0), max(y + pixels - SIZE, 0)
            sprite = sprite[top : pixels - bottom, left : pixels - right]
            under = canvas[y + top : y + pixels - bottom, x + left : x + pixels - right]
            under *= 1 - sprite[..., 3:]
            under += sprite[..., :3]
        return canvas.round().astype(np.uint8)

    def batch(self, scenes: list[Scene]) -> torch.Tensor:
        """The pictures of the scenes, float32 in [-1, 1], shape (len(scenes), 3, 64, 64)."""
        pixels = torch.from_numpy(np.stack([self.paint(scene) for scene in scenes]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _sprite(path: Path, pixels: int) -> np.ndarray:
    """Colours times opacity, in [0, 255], and opacity, in [0, 1]; shape (pixels, pixels, 4), float32."""
    with Image.open(path) as file:
        picture = np.asarray(file.convert("RGBA"), np.float32)
    opacity = picture[..., 3:] / 255
    layers = [*np.moveaxis(picture[..., :3] * opacity, -1, 0), opacity[..., 0]]
    small = [Image.fromarray(layer).resize((pixels, pixels), Image.Resampling.BOX) for layer in layers]
    return np.stack([np.asarray(layer) for layer in small], axis=-1)
