"""How often the bundled pipeline draws the emoji that was asked for.

Chooses 100 of its names at random and generates an image for each. Encodes each image with the pipeline's own VAE and
finds the nearest training image by L2 distance of the latents. A hit is a training image with the requested name, or
one of the same subcategory. Prints the number of hits and writes a picture of the generated emoji.

    python scripts/check_reference.py [--model FOLDER] [--count 100] [--picture out.png]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from emoji_data import Emoji, fetch, load
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "bitpolicy" / "models" / "emoji")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "reference", help="folder of the downloaded training pictures"
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--prompts", nargs="*", help="draw these instead of random names, and print no figure")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    emoji = load(fetch(args.work / "emoji"))
    prompts = args.prompts or _draw_names(emoji, args.count, args.seed)
    images = [_generate(pipe, prompt, args.seed + i, args.steps, args.guidance) for i, prompt in enumerate(prompts)]
    if args.picture:
        _sheet(images, prompts).save(args.picture)
    if not args.prompts:
        named, related = _hits(pipe.vae, emoji, prompts, images)
        print(
            f"{len(prompts)} names: {named} nearest to an emoji of that name, "
            f"{related} to one of that name or subcategory"
        )


def _draw_names(emoji: list[Emoji], count: int, seed: int) -> list[str]:
    names = sorted({name for e in emoji for name in e.names})
    return random.Random(seed).sample(names, min(count, len(names)))


@torch.no_grad()
def _generate(pipe: StableDiffusionPipeline, prompt: str, seed: int, steps: int, guidance: float) -> torch.Tensor:
    """(3, 64, 64), float in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pt")
    return output.images[0]


@torch.no_grad()
def _hits(vae: AutoencoderKL, emoji: list[Emoji], prompts: list[str], images: list[torch.Tensor]) -> tuple[int, int]:
    """How many nearest training images have the name, and how many have the name or its subcategory."""
    known = torch.cat([vae.encode(e.image[None]).latent_dist.mean for e in emoji]).flatten(1)
    found = torch.cat([vae.encode(image[None] * 2 - 1).latent_dist.mean for image in images]).flatten(1)
    nearest = torch.cdist(found, known).argmin(1).tolist()
    named = related = 0
    for prompt, index in zip(prompts, nearest, strict=True):
        kinds = {e.subcategory for e in emoji if prompt in e.names}
        named += prompt in emoji[index].names
        related += prompt in emoji[index].names or emoji[index].subcategory in kinds
    return named, related


def _sheet(
    images: list[torch.Tensor], prompts: list[str], columns: int = 10, cell: int = 128, line: int = 14
) -> Image.Image:
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + line)
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
        sheet.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        draw.text((x + 4, y + cell), prompt[:22], "black")
    return sheet


if __name__ == "__main__":
    main()
