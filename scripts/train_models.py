"""Train the small models of the experiments on scenes that cannot be memorised.

    python scripts/train_models.py --model unet                                    # after the shared stages
    python scripts/train_models.py --model all                                     # every stage and every model
    python scripts/train_models.py --model unet --assemble scripts/trained/unet    # write the fp16 folder
    python scripts/train_models.py --model unet --examine scripts/trained/unet     # score it on unseen captions

A stopped run, even one stopped by SIGKILL, resumes from its last checkpoint.

The shared stages, in order: `teacher` is the bundled pipeline's VAE, tuned on scenes; `vae`, a quarter of its size,
learns to encode and decode the teacher's latents; `text` is a CLIP text encoder that learns the layouts that captions
describe and is then frozen; `judge` is a classifier of renders.

The models have about 5M parameters each: `unet` uses epsilon prediction, like Stable Diffusion 1; `dit` has the same
objective and scheduler, with PixArt's transformer and pipeline; `mmdit` is Stable Diffusion 3's joint transformer with
flow matching; `lcm` is the U-Net distilled to four steps; `video` draws eight frames of moving scenes with a U-Net that
has temporal layers; `gpt` is a GPT-2 on the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from denoiser_training import train_dit, train_lcm, train_mmdit, train_unet, train_video
from diffusers import AutoencoderKL
from scene_judge import train_judge
from scenes import COLOURS, NAMES, SIZE, SIZES, Scene
from shipped_models import assembled, examine, write
from small_models import GRID, LayoutReader, new_vae
from text_training import train_gpt, write_gpt
from torch import nn
from train_reference import Run, new_text_encoder
from training_stage import TEACHER, Teacher, Workshop, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("all", *STAGES), required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("build/models"), help="folder for pictures, checkpoints and logs"
    )
    parser.add_argument("--assemble", type=Path, help="write the fp16 pipeline of --model to this folder and stop")
    parser.add_argument("--examine", type=Path, help="score the pipeline in this folder and stop")
    parser.add_argument(
        "--shared", type=Path, help="a finished pipeline whose VAE and text encoder are used instead of training them"
    )
    parser.add_argument("--steps", type=int, help="training steps of --model; a running training can be extended")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; at most the number of free cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    shop = Workshop(args.work, args.device, args.shared)
    if args.assemble and args.model == "gpt":
        write_gpt(shop, args.assemble)
    elif args.assemble:
        write(assembled(shop, args.model), args.assemble)
    elif args.examine:
        print(examine(shop, args.model, args.examine))
    else:
        for stage in order(args.model, args.shared is not None):
            train, steps = STAGES[stage]
            train(shop, args.steps if args.steps and stage == args.model else steps)


def order(model: str, shared: bool = False) -> list[str]:
    """The stages that `model` needs, itself last. Finished stages return at once.

    Args:
        shared: whether the VAE and the text encoder already exist.
    """
    needed = [name for name in SHARED if not shared or name == "judge"]
    if model == "all":
        return [*needed, *(name for name in STAGES if name not in SHARED)]
    if model == "gpt":
        return [model]
    if model in needed:
        return needed[: needed.index(model) + 1]
    if model in SHARED:
        raise SystemExit(f"--shared already provides what {model} would train; leave out one of the two")
    return [*needed, *(["unet"] if model == "lcm" else []), model]


def decibels(y: torch.Tensor, x: torch.Tensor) -> float:
    """PSNR in dB of values in [-1, 1]."""
    return -10 * math.log10((y - x).square().mean().item() / 4)


def picture_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 loss of the pixels and of their differences."""
    edges = sum(((y - x).diff(dim=dim).abs().mean() for dim in (-1, -2)), torch.zeros((), device=x.device))
    return (y - x).abs().mean() + 0.5 * edges


def train_teacher(shop: Workshop, steps: int, batch: int = 8) -> None:
    """Tune the bundled VAE on scenes, because it has seen only white grounds."""
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


def train_vae(shop: Workshop, steps: int, batch: int = 16) -> None:
    """Train a small encoder and decoder on the teacher's latents, independently of each other."""
    teacher = Teacher(shop)
    vae = new_vae().to(shop.device, memory_format=torch.channels_last)
    run = Run(shop.work / "vae.pt", vae, 2e-3, steps)
    pictures = shop.pictures(drawn(16 * batch))
    latents = teacher.encode(pictures)
    for step in run:
        places = torch.randint(len(pictures), (batch // 4,))
        pictures[places] = fresh = shop.pictures(drawn(batch // 4))
        latents[places] = teacher.encode(fresh)
        chosen = torch.randint(len(pictures), (batch,))
        x, z = pictures[chosen], latents[chosen]
        with shop.autocast():
            mean, log_variance = vae.quant_conv(vae.encoder(x[: batch // 2])).float().chunk(2, dim=1)
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        encoded = nn.functional.mse_loss(mean, z[: batch // 2])
        run.descend(picture_loss(y, x) + 0.1 * encoded + 0.01 * (log_variance + 6).square().mean())
        if step % 25 == 0:
            print(f"vae {step}: decoder {decibels(y, x):.2f} dB, encoder mse {encoded.item():.4f}", flush=True)


def layouts(scenes: list[Scene]) -> torch.Tensor:
    """The content of each cell, (B, GRID * GRID): an index into NAMES, or len(NAMES) plus an index into COLOURS."""
    cell = SIZE / GRID
    grids = torch.empty(len(scenes), GRID, GRID, dtype=torch.long)
    for grid, scene in zip(grids, scenes, strict=True):
        grid[:] = len(NAMES) + COLOURS.index(scene.ground)
        for thing in scene.things:
            half = SIZES[thing.size] / 2
            left, top = (max(math.ceil((c - half) / cell - 0.5), 0) for c in thing.centre)
            right, bottom = (max(math.ceil((c + half) / cell - 0.5), 0) for c in thing.centre)
            grid[top:bottom, left:right] = NAMES.index(thing.name)
    return grids.flatten(1)


def train_text(shop: Workshop, steps: int, batch: int = 128) -> None:
    """Train the text encoder to predict a scene's layout from its caption, through a single cross attention."""
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


SHARED = ("teacher", "vae", "text", "judge")
STAGES: dict[str, tuple[Callable[[Workshop, int], None], int]] = {
    "teacher": (train_teacher, 400),
    "vae": (train_vae, 1700),
    "text": (train_text, 250),
    "judge": (train_judge, 500),
    "unet": (train_unet, 6000),
    "dit": (train_dit, 6000),
    "mmdit": (train_mmdit, 6000),
    "lcm": (train_lcm, 1000),
    "video": (train_video, 2000),
    "gpt": (train_gpt, 3000),
}


if __name__ == "__main__":
    main()
