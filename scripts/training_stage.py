"""What every stage of scripts/train_models.py shares: pictures, tokens, finished stages."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from emoji_data import Emoji, fetch
from scenes import Painter, Scene, draw_scene, jittered
from torch import nn
from train_reference import Run, tokenize, train_tokenizer
from transformers import CLIPTokenizer


class Workshop:
    """Where a run finds its pictures, its captions' tokens and the finished stages."""

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, device
        self.painter = Painter(fetch(work / "emoji"))
        rng = random.Random(0)
        captions = tuple(draw_scene(rng).caption for _ in range(4000))
        self.tokenizer: CLIPTokenizer = train_tokenizer([Emoji(torch.empty(0), captions, "")], work / "tokenizer")

    def pictures(self, scenes: list[Scene]) -> torch.Tensor:
        """float32 in [-1, 1], shape (len(scenes), 3, 64, 64)."""
        return self.painter.batch([jittered(scene, random) for scene in scenes]).to(self.device)

    def tokens(self, captions: list[str]) -> torch.Tensor:
        return tokenize(self.tokenizer, captions).to(self.device)

    def finished(self, stage: str, module: nn.Module) -> nn.Module:
        """`module` with the EMA weights of a trained stage, in eval mode."""
        run = Run(self.work / f"{stage}.pt", module, 0.0, 0)
        if not run.step:
            raise SystemExit(f"no {stage} in {self.work}; run with --model {stage} first")
        run.ema.copy_to(module.parameters())
        return module.requires_grad_(False).eval().to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


def drawn(count: int) -> list[Scene]:
    return [draw_scene(random) for _ in range(count)]
