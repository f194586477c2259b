"""Compare a fine-tune that takes its base model's policy with one that is searched from scratch.

    python scripts/transfer_study.py --output docs/transfer.json

The base model is scripts/trained/unet. It is fine-tuned on other pictures for the same words: another cat, another car,
another pizza. At each size, the base model is searched; the fine-tune is searched, too, and also takes the base model's
policy. All three are compared with their own FP16 images on the same held-out captions and seeds. Everything is kept in
--work, so a stopped run continues.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from denoiser_training import Predict, train_epsilon
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from train_reference import Run
from training_stage import Workshop, text_encoder

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "scripts" / "trained" / "unet"
SIZES = ("30%", "33%", "38%", "45%")
OTHER = {  # other emoji for the words that the text encoder knows
    "pizza": "1f96a",
    "red heart": "1f49b",
    "cat": "1f408",
    "panda": "1f43b",
    "frog": "1f98e",
    "pig": "1f417",
    "penguin": "1f986",
    "octopus": "1f991",
    "apple": "1f34f",
    "banana": "1f34d",
    "strawberry": "1f352",
    "carrot": "1f33d",
    "sunflower": "1f337",
    "tree": "1f333",
    "cactus": "1f334",
    "mushroom": "1f966",
    "burger": "1f32d",
    "donut": "1f36a",
    "star": "1f319",
    "car": "1f695",
    "rocket": "1f681",
    "house": "1f3e2",
    "robot": "1f47e",
    "ball": "1f3c0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/transfer"), help="folder of the fine-tune and the runs"
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps of the fine-tune, of 32 pictures each")
    parser.add_argument("--images", type=int, default=32, help="held-out images for each row")
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    args = parser.parse_args()
    tuned = fine_tune(args.work, args.steps)
    rng = random.Random(5)
    captions = args.work / "captions.txt"
    captions.write_text("\n".join(dict.fromkeys(scenes.draw_scene(rng).caption for _ in range(128))))
    rows = []
    for size in SIZES:
        base = searched(args.work, "base", BASE, size, args.images, "--budget", size)
        policy = str(args.work / "base" / f"{size}.yaml")
        scratch = searched(args.work, "scratch", tuned, size, args.images, "--budget", size)
        moved = searched(args.work, "moved", tuned, size, args.images, "--policy", policy)
        gap = np.array(moved["psnr"]) - np.array(scratch["psnr"])
        rows.append(
            {
                "size": size,
                "base_db": float(np.mean(base["psnr"])),
                "scratch_db": float(np.mean(scratch["psnr"])),
                "moved_db": float(np.mean(moved["psnr"])),
                "gap_db": float(gap.mean()),
                "gap_interval": float(1.96 * gap.std(ddof=1) / len(gap) ** 0.5),
                "seconds": {"searched": scratch["seconds"], "given": moved["seconds"]},
            }
        )
        print(table(rows), flush=True)
    if args.output:
        args.output.write_text(json.dumps({"images": args.images, "steps": args.steps, "rows": rows}, indent=1) + "\n")


def fine_tune(work: Path, steps: int) -> Path:
    """The folder of the fine-tuned pipeline, float16; trained unless it is there."""
    folder = work / "fine-tune"
    if folder.exists():
        return folder
    shop, unet, predict = on_other_pictures(work)
    train_epsilon(shop, "fine-tune", unet, predict, steps, 3e-4, batch=32)
    Run(work / "fine-tune.pt", unet, 0.0, 0).ema.copy_to(unet.parameters())
    pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float16)
    pipe.unet.load_state_dict(unet.half().state_dict())
    pipe.save_pretrained(folder)
    return folder


def on_other_pictures(work: Path) -> tuple[Workshop, UNet2DConditionModel, Predict]:
    """Other pictures for the same words, a copy of the base model's U-Net to train on them, and its prediction."""
    torch.manual_seed(0)
    random.seed(0)
    scenes.EMOJI.update(OTHER)
    shop = Workshop(work, "cpu", BASE)
    unet, text = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32), text_encoder(shop)
    unet.set_attn_processor(AttnProcessor())

    def predict(x: torch.Tensor, t: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return unet(x, t, encoder_hidden_states=text(prompts)[0]).sample

    return shop, unet, predict


def searched(work: Path, name: str, model: Path, size: str, images: int, *aim: str) -> dict[str, Any]:
    """PSNR of every held-out image, and seconds of the search, run unless they are there.

    Runs of one name share a folder, and so the probe's records: only the first one takes as long as a user's would.
    """
    kept, out = work / name / f"{size}.json", work / name / "out"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        start, prompts = time.monotonic(), ("--prompts", str(work / "captions.txt"))
        line = ("search", "--model", str(model), *aim, "--trials", "0", "--held-out-samples", "1", "--overwrite")
        ran(*line, *prompts, "--output-dir", str(out))
        seconds = time.monotonic() - start
        evaluated = ("--metrics", "psnr", "--images", str(images), "--seed", "9")
        found = ran("eval", str(out / "checkpoint"), "--model", str(model), *prompts, *evaluated)
        for file in ("policy.yaml", "calibration.safetensors"):  # the calibration of the latest size is kept
            (out / file).rename(kept.with_name(f"{size}.yaml" if file == "policy.yaml" else file))
        kept.write_text(json.dumps({"psnr": found["metrics"]["psnr"]["per_image"], "seconds": seconds}))
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def ran(*words: str) -> dict[str, Any]:
    """What a command of bitpolicy prints as JSON."""
    line = [sys.executable, "-m", "bitpolicy", *words, "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| size | base model | fine-tune, searched | fine-tune, base's policy | difference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        values = " | ".join(f"{row[name]:.2f} dB" for name in ("base_db", "scratch_db", "moved_db"))
        lines.append(f"| {row['size']} | {values} | {row['gap_db']:+.2f} +- {row['gap_interval']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
