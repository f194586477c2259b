"""Train the small models of the experiments on scenes that cannot be memorised.

    python scripts/train_models.py --model unet --work build/models            # with the stages it needs, each resumed
    python scripts/train_models.py --model unet --work build/models --assemble scripts/trained/unet

Shared stages: `teacher`, the bundled pipeline's VAE tuned on scenes; `vae`, a quarter of its size, taught to encode and
decode the teacher's latents; `text`, a CLIP text encoder that learns the layouts captions describe; `judge`, a
classifier of renders. Then the models: `unet`, epsilon prediction in Stable Diffusion 1's manner.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from scene_judge import train_judge
from scenes import COLOURS, NAMES, SIZE, SIZES, Scene, draw_scene
from shipped_models import assemble_unet, examine, write
from small_models import GRID, LayoutReader, ddim, new_unet, new_vae
from torch import nn
from train_reference import Run, new_text_encoder
from training_stage import Workshop, drawn
from transformers import CLIPTextModel

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "bitpolicy" / "models" / "emoji" / "vae"
POOL = 8192  # scenes encoded at once; FRESH of them are replaced at each step
FRESH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(STAGES), required=True)
    parser.add_argument("--work", type=Path, default=Path("build/models"), help="pictures, checkpoints and logs")
    parser.add_argument("--assemble", type=Path, help="write the fp16 pipeline of --model to this folder and stop")
    parser.add_argument(
        "--examine", type=Path, help="score the pipeline in this folder and stop"
    )
    parser.add_argument("--steps", type=int, help="of the model named; a run can be lengthened while it is under way")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; at most the cores that are free")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    shop = Workshop(args.work, args.device)
    if args.assemble:
        write(assemble_unet(shop), args.assemble)
    elif args.examine:
        print(examine(shop, args.examine))
    else:
        train, steps = STAGES[args.model]
        train(shop, args.steps or steps)


def decibels(y: torch.Tensor, x: torch.Tensor) -> float:
    """PSNR of values in [-1, 1]."""
    return -10 * math.log10((y - x).square().mean().item() / 4)


def picture_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels and of their differences."""
    edges = sum(((y - x).diff(dim=dim).abs().mean() for dim in (-1, -2)), torch.zeros((), device=x.device))
    return (y - x).abs().mean() + 0.5 * edges


def train_teacher(shop: Workshop, steps: int, batch: int = 8) -> None:
    """The bundled VAE has seen white grounds only."""
    teacher = AutoencoderKL.from_pretrained(TEACHER, torch_dtype=torch.float32)
    teacher.to(shop.device, memory_format=torch.channels_last)
    run = Run(shop.work / "teacher.pt", teacher, 5e-4, steps)
    for step in run:
        x = shop.pictures(drawn(batch))
        with shop.autocast():
            posterior = teacher.encode(x).latent_dist
            y = teacher.decode(posterior.sample()).sample.float()
        run.descend(picture_loss(y, x) + 2e-6 * posterior.kl().float().mean())
        if step % 25 == 0:
            print(f"teacher {step}: {decibels(y, x):.2f} dB", flush=True)


class Teacher:
    """Latents of the tuned VAE, shifted and scaled to mean 0 and variance 1, channel by channel."""

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
        """Shape (B, 4, 16, 16), float32."""
        with self.shop.autocast():
            latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in pictures.split(32)])
        return (latents.float() - self.mean) / self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents * self.scale + self.mean).sample


def train_vae(shop: Workshop, steps: int, batch: int = 16) -> None:
    """A small encoder and decoder learn the teacher's latents, each from the teacher alone."""
    teacher = Teacher(shop)
    vae = new_vae().to(shop.device, memory_format=torch.channels_last)
    run = Run(shop.work / "vae.pt", vae, 2e-3, steps)
    for step in run:
        x = shop.pictures(drawn(batch))
        z = teacher.encode(x)
        with shop.autocast():
            mean, log_variance = vae.quant_conv(vae.encoder(x[: batch // 2])).float().chunk(2, dim=1)
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        encoded = nn.functional.mse_loss(mean, z[: batch // 2])
        run.descend(picture_loss(y, x) + 0.1 * encoded + 0.01 * (log_variance + 6).square().mean())
        if step % 25 == 0:
            print(f"vae {step}: decoder {decibels(y, x):.2f} dB, encoder mse {encoded.item():.4f}", flush=True)


def layouts(scenes: list[Scene]) -> torch.Tensor:
    """What stands in each cell, (B, GRID * GRID): an index of NAMES, or len(NAMES) plus an index of COLOURS."""
    cell = SIZE / GRID
    grids = torch.empty(len(scenes), GRID, GRID, dtype=torch.long)
    for grid, scene in zip(grids, scenes, strict=True):
        grid[:] = len(NAMES) + COLOURS.index(scene.ground)
        for thing in scene.things:
            half = SIZES[thing.size] / 2
            left, top = (max(math.ceil((c - half) / cell - 0.5), 0) for c in thing.centre)
            right, bottom = (math.floor((c + half) / cell - 0.5) + 1 for c in thing.centre)
            grid[top:bottom, left:right] = NAMES.index(thing.name)
    return grids.flatten(1)


def train_text(shop: Workshop, steps: int, batch: int = 128) -> None:
    """From a caption to the layout of its scene, with nothing but one cross attention in between."""
    both = nn.ModuleDict({"text_encoder": new_text_encoder(len(shop.tokenizer)), "reader": LayoutReader()})
    both.to(shop.device)
    run = Run(shop.work / "text.pt", both, 2e-3, steps)
    for step in run:
        scenes = drawn(batch)
        with shop.autocast():
            logits = both["reader"](both["text_encoder"](shop.tokens([s.caption for s in scenes]))[0]).float()
        target = layouts(scenes).to(shop.device)
        run.descend(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))
        if step % 50 == 0:
            print(f"text {step}: {(logits.argmax(-1) == target).float().mean():.3f} of the cells right", flush=True)


def train_unet(shop: Workshop, steps: int, batch: int = 32) -> None:
    """UNet and text encoder together; the loss of epsilon is weighted by min(SNR, 5) / SNR (Hang et al. 2023)."""
    teacher = Teacher(shop)
    unet, scheduler = new_unet(), ddim()
    if shop.device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # its backward is three times faster than fused attention's on a CPU
    unet.to(memory_format=torch.channels_last)
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder(shop)}).to(shop.device)
    both.requires_grad_(True).train()
    run = Run(shop.work / "unet.pt", both, 1.2e-3, steps)
    alphas = scheduler.alphas_cumprod.to(shop.device)
    weights = (5 * (1 - alphas) / alphas).clamp(max=1)
    pool = Pool(shop, teacher)
    empty, average = shop.tokens([""])[0], 1.0
    for step in run:
        x, prompts = pool.batch(batch)
        prompts[torch.rand(batch) < 0.1] = empty
        noise, t = torch.randn_like(x), torch.randint(1000, (batch,), device=shop.device)
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        with shop.autocast():
            states = both["text_encoder"](prompts)[0]
            prediction = unet(noisy, t, encoder_hidden_states=states).sample.float()
        error = (prediction - noise).square().mean(dim=(1, 2, 3))
        run.descend((weights[t] * error).mean() / weights.mean())
        average += (error.mean().item() - average) * max(0.01, 1 / (step + 1))
        if step % 50 == 0:
            print(f"unet {step}: mean squared error of epsilon {average:.4f}", flush=True)


def text_encoder(shop: Workshop) -> CLIPTextModel:
    both = nn.ModuleDict({"text_encoder": new_text_encoder(len(shop.tokenizer)), "reader": LayoutReader()})
    return shop.finished("text", both)["text_encoder"]


class Pool:
    """Latents and tokens of many scenes, kept in the work folder; a few of them are replaced at each step."""

    def __init__(self, shop: Workshop, teacher: Teacher, size: int = POOL) -> None:
        self.shop, self.teacher = shop, teacher
        kept = shop.work / "pool.pt"
        if not kept.exists():
            parts = [self._encoded(256) for _ in range(size // 256)]
            latents, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
            torch.save({"latents": latents, "tokens": tokens}, kept.with_suffix(".partial"))
            kept.with_suffix(".partial").replace(kept)
        pool = torch.load(kept, weights_only=True, map_location=shop.device)
        self.latents, self.tokens = pool["latents"], pool["tokens"]

    def _encoded(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = drawn(count)
        return self.teacher.encode(self.shop.pictures(scenes)), self.shop.tokens([s.caption for s in scenes])

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, (count, 4, 16, 16), and token ids, (count, TOKENS)."""
        places = torch.randint(len(self.latents), (FRESH,))
        self.latents[places], self.tokens[places] = self._encoded(FRESH)
        chosen = torch.randint(len(self.latents), (count,))
        return self.latents[chosen], self.tokens[chosen]


STAGES: dict[str, tuple[Callable[[Workshop, int], None], int]] = {
    "teacher": (train_teacher, 200),
    "vae": (train_vae, 1200),
    "text": (train_text, 500),
    "judge": (train_judge, 600),
    "unet": (train_unet, 6000),
}


if __name__ == "__main__":
    main()
