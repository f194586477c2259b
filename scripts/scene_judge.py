"""Does a picture show what its caption says? A small classifier of renders, and the share of captions that it accepts.

A caption counts as right if the judge sees each of its things, no others, and its ground. A second, stricter figure
uses the positions: the things must also be in the order that the caption gives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from scenes import COLOURS, NAMES, Scene
from small_models import Judge
from torch import nn
from train_reference import Run
from training_stage import Workshop, drawn

SHIPPED = Path(__file__).parent / "trained" / "judge.safetensors"


@dataclass(frozen=True)
class Score:
    """Shares, in [0, 1], of the captions whose things, ground, both, and both in their places are right."""

    things: float
    ground: float
    both: float
    placed: float


def train_judge(shop: Workshop, steps: int, batch: int = 48) -> None:
    """Multiple-instance training: a name's score is that of its best cell, so positions are learned without labels."""
    judge = Judge().to(shop.device, memory_format=torch.channels_last)
    run = Run(shop.work / "judge.pt", judge, 2e-3, steps)
    for step in run:
        scenes = drawn(batch)
        cells, ground = judge(blurred(shop.pictures(scenes)))
        here, colour = (label.to(shop.device) for label in labels(scenes))
        seen = cells.amax(dim=(2, 3))
        loss = nn.functional.binary_cross_entropy_with_logits(seen, here, pos_weight=torch.tensor(4.0))
        run.descend(loss + 0.3 * nn.functional.cross_entropy(ground, colour))
        if step % 50 == 0:
            right = ((seen > 0) == (here > 0)).all(dim=1) & (ground.argmax(1) == colour)
            print(f"judge {step}: {right.float().mean():.3f} of the scenes right", flush=True)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """Degrade half of the pictures as a small autoencoder might: softer, noisier, slightly off in colour."""
    count = len(pictures) // 2
    side = random.choice((28, 36, 48))
    small = nn.functional.interpolate(pictures[:count], size=(side, side), mode="area")
    soft = nn.functional.interpolate(small, size=pictures.shape[-2:], mode="bilinear")
    soft = soft * (1 + 0.1 * torch.randn(count, 3, 1, 1, device=soft.device))
    soft = soft + 0.05 * torch.randn(count, 3, 1, 1, device=soft.device) + 0.05 * torch.randn_like(soft)
    return torch.cat([soft, pictures[count:]]).clamp(-1, 1)


def labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which names are present, 0 or 1, float32 of shape (B, names), and which ground, int64 of shape (B,)."""
    here = torch.zeros(len(scenes), len(NAMES))
    for row, scene in zip(here, scenes, strict=True):
        row[[NAMES.index(thing.name) for thing in scene.things]] = 1
    return here, torch.tensor([COLOURS.index(scene.ground) for scene in scenes])


def shipped_judge() -> Judge:
    """The trained judge from the repository, float32, in eval mode."""
    judge = Judge().eval().requires_grad_(False)
    judge.load_state_dict(load_file(SHIPPED))
    return judge


@torch.no_grad()
def shown(judge: Judge, pictures: torch.Tensor, scenes: list[Scene]) -> list[bool]:
    """Whether each picture, float32 in [-1, 1] of shape (B, 3, 64, 64), shows its scene's things and ground."""
    things, grounds = _seen(*judge(pictures), scenes)
    return (things & grounds).tolist()


@torch.no_grad()
def score(judge: Judge, pictures: torch.Tensor, scenes: list[Scene]) -> Score:
    """The share of pictures, float32 in [-1, 1] of shape (B, 3, 64, 64), that show their scenes."""
    cells, ground = judge(pictures)
    things, grounds = _seen(cells, ground, scenes)
    placed = torch.tensor([_in_place(each, scene) for each, scene in zip(cells.cpu(), scenes, strict=True)])
    each = (things, grounds, things & grounds, things & grounds & placed)
    return Score(*(part.float().mean().item() for part in each))


def _seen(cells: torch.Tensor, ground: torch.Tensor, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the judge sees each scene's things and no others, and its ground, bool, shape (B,) each."""
    here, colour = labels(scenes)
    return ((cells.amax(dim=(2, 3)) > 0).cpu() == (here > 0)).all(dim=1), ground.argmax(1).cpu() == colour


def _in_place(cells: torch.Tensor, scene: Scene) -> bool:
    """Whether things whose centres differ by more than 16 pixels along an axis are seen in that order."""
    found = []
    for thing in scene.things:
        best = int(cells[NAMES.index(thing.name)].flatten().argmax())
        found.append((best % cells.shape[-1], best // cells.shape[-1]))
    for i, one in enumerate(scene.things):
        for j in range(i):
            for axis in (0, 1):
                apart = one.centre[axis] - scene.things[j].centre[axis]
                if abs(apart) > 16 and apart * (found[i][axis] - found[j][axis]) <= 0:
                    return False
    return True
