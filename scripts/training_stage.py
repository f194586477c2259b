"""Shared by all stages of scripts/train_models.py: pictures, tokens, finished stages."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from emoji_data import Emoji, fetch
from scenes import WAYS, Painter, Scene, clip, draw_scene, jittered
from small_models import LayoutReader, new_vae
from torch import nn
from train_reference import Run, new_text_encoder, tokenize, train_tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "bitpolicy" / "models" / "emoji" / "vae"


class Workshop:
    """Gives a run its pictures, the tokens of its captions and the finished stages.

    Args:
        work: folder for pictures, checkpoints and logs.
        device: the device to train on.
        shared: a finished pipeline whose VAE, text encoder and tokenizer replace the stages that train them.
    """

    def __init__(self, work: Path, device: str, shared: Path | None = None) -> None:
        self.work, self.device, self.shared = work, device, shared
        self.painter = Painter(fetch(work / "emoji"))
        if shared:
            self.tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer")
            return
        rng = random.Random(0)
        captions = tuple(draw_scene(rng).caption for _ in range(4000))
        self.tokenizer = train_tokenizer([Emoji(torch.empty(0), captions, "")], work / "tokenizer")

    def pictures(self, scenes: list[Scene]) -> torch.Tensor:
        """Jittered pictures of the scenes, float32 in [-1, 1], shape (len(scenes), 3, 64, 64)."""
        return self.painter.batch([jittered(scene, random) for scene in scenes]).to(self.device)

    def tokens(self, captions: list[str]) -> torch.Tensor:
        return tokenize(self.tokenizer, captions).to(self.device)

    def finished(self, stage: str, module: nn.Module) -> nn.Module:
        """`module` with the EMA weights of a trained stage, in eval mode."""
        run = Run(self.work / f"{stage}.pt", module, 0.0, 0)
        if not run.step:
            raise SystemExit(f"no {stage} in {self.work}; run with --model {stage} first")
        run.ema.copy_to(module.parameters())
        return _frozen(module, self)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


def drawn(count: int) -> list[Scene]:
    return [draw_scene(random) for _ in range(count)]


def text_encoder(shop: Workshop) -> CLIPTextModel:
    """The frozen text encoder that all models share."""
    if shop.shared:
        return _frozen(CLIPTextModel.from_pretrained(shop.shared / "text_encoder", dtype=torch.float32), shop)
    both = nn.ModuleDict({"text_encoder": new_text_encoder(len(shop.tokenizer)), "reader": LayoutReader()})
    return shop.finished("text", both)["text_encoder"]


def small_vae(shop: Workshop) -> AutoencoderKL:
    """The frozen VAE that all models share."""
    if shop.shared:
        return _frozen(AutoencoderKL.from_pretrained(shop.shared / "vae", torch_dtype=torch.float32), shop)
    return shop.finished("vae", new_vae())


def _frozen(module: nn.Module, shop: Workshop) -> nn.Module:
    return module.requires_grad_(False).eval().to(shop.device)


def caption_mask(prompts: torch.Tensor) -> torch.Tensor:
    """1 up to the first end token of each caption, 0 in the padding; int64, the shape of `prompts`."""
    ended = (prompts == 1).long().cumsum(dim=1)
    return ((ended - (prompts == 1).long()) == 0).long()


class Teacher:
    """Latents of the tuned VAE, shifted and scaled to mean 0 and variance 1 per channel."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        blank = AutoencoderKL.from_config(AutoencoderKL.load_config(TEACHER))
        self.vae = shop.finished("teacher", blank).to(memory_format=torch.channels_last)
        self.mean, self.scale = torch.zeros(1), torch.ones(1)
        rng = random.Random(1)
        latents = self.encode(shop.painter.batch([draw_scene(rng) for _ in range(256)]).to(shop.device))
        self.mean = latents.mean(dim=(0, 2, 3), keepdim=True)
        self.scale = latents.std(dim=(0, 2, 3), keepdim=True)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of the pictures, shape (B, 4, 16, 16), float32."""
        with self.shop.autocast():
            latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in pictures.split(32)])
        return (latents.float() - self.mean) / self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents * self.scale + self.mean).sample


def encoder(shop: Workshop) -> Callable[[torch.Tensor], torch.Tensor]:
    """Maps pictures to latents: the teacher's encoder, or that of the shared VAE, which learned from the teacher."""
    if shop.shared is None:
        return Teacher(shop).encode
    vae = small_vae(shop).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])

    return encode


class Pool:
    """Latents and tokens of many scenes, stored in a file; some are replaced every sixteen batches.

    Args:
        kept: the file of the first `size` scenes, so that a resumed run does not encode them again.
        draw: returns `count` latents, float32 with first dimension `count`, and token ids, int64 (count, TOKENS).
        size: a multiple of `at_once`.
    """

    def __init__(
        self, kept: Path, draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]], size: int, at_once: int = 32
    ) -> None:
        self.draw, self.at_once, self.batches = draw, at_once, 0
        if not kept.exists():
            parts = [draw(at_once) for _ in range(size // at_once)]
            latents, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
            torch.save({"latents": latents, "tokens": tokens}, kept.with_suffix(".partial"))
            kept.with_suffix(".partial").replace(kept)
        pool = torch.load(kept, weights_only=True)
        self.latents, self.tokens = pool["latents"], pool["tokens"]

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A random batch of `count` latents and their token ids."""
        self.batches += 1
        if self.batches % 16 == 0:
            places = torch.randint(len(self.latents), (self.at_once,))
            self.latents[places], self.tokens[places] = self.draw(self.at_once)
        chosen = torch.randint(len(self.latents), (count,))
        return self.latents[chosen], self.tokens[chosen]


def pool_of_scenes(shop: Workshop, size: int = 8192) -> Pool:
    """A pool of scenes; latents have shape (4, 16, 16)."""
    encode = encoder(shop)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = drawn(count)
        return encode(shop.pictures(scenes)), shop.tokens([s.caption for s in scenes])

    return Pool(shop.work / "pool.pt", draw, size)


def pool_of_clips(shop: Workshop, size: int = 1024) -> Pool:
    """A pool of clips; latents have shape (4, frames, 16, 16)."""
    encode = encoder(shop)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        clips = [clip(scene, random.choice(tuple(WAYS)), random) for scene in drawn(count)]
        frames = shop.painter.batch([frame for each in clips for frame in each]).to(shop.device)
        latents = encode(frames).unflatten(0, (count, -1)).transpose(1, 2).contiguous()
        return latents, shop.tokens([each[0].caption for each in clips])

    return Pool(shop.work / "clips.pt", draw, size, at_once=8)
