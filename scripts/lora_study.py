"""What is left of a LoRA on a quantized model: added to packed layers, merged before rounding, or merged after it.

    python scripts/lora_study.py --output docs/lora.json

A LoRA of rank 8 is trained on scripts/trained/unet with other pictures for the same words, as in
scripts/transfer_study.py. For each format, every layer is rounded to nearest; all images are compared with those of the
float16 model with the LoRA. The LoRA's own effect is the PSNR between float16 with and without it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import scenes
import torch
from denoiser_training import train_epsilon
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from transfer_study import BASE, on_other_pictures

import bitpolicy
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.pipelines.loading import load_source
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.search.quality.psnr import Psnr

FORMATS = ("int8", "int6", "int5", "int4", "int4-g32", "int3")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/lora"), help="folder of pictures and the LoRA")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the LoRA, of 32 pictures each")
    parser.add_argument("--images", type=int, default=16, help="images for each row")
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    args = parser.parse_args()
    lora = trained(args.work, args.steps)
    prompts = [scene.caption for scene in scenes.unseen_captions(args.images)]
    base, merged = load_source(str(BASE)), load_source(str(BASE), lora=[str(lora)])
    plain, wanted = drawn(base.pipe, prompts), drawn(merged.pipe, prompts)
    found: dict[str, Any] = {"images": args.images, "effect_db": mean(plain, wanted), "rows": []}
    print(
        f"the LoRA's own effect: {found['effect_db']:.2f} dB\n\n| format | without it | added | merged before | after |"
    )
    print("|---|---|---|---|---|")
    for name in FORMATS:
        row = {"format": name, **measured(name, base, merged, lora, prompts, plain, wanted)}
        found["rows"].append(row)
        cells = (f"{row[key]:.2f} dB" for key in ("base_db", "added_db", "before_db", "after_db"))
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def measured(
    name: str, base: Any, merged: Any, lora: Path, prompts: list[str], plain: Any, wanted: Any
) -> dict[str, float]:
    """Mean PSNR of four ways to have the LoRA; `base_db` is without it, against the model without it."""
    with packed(name, merged) as pipe:
        before = mean(drawn(pipe, prompts), wanted)
    with packed(name, base) as pipe:
        own = mean(drawn(pipe, prompts), plain)
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
        added = mean(drawn(pipe, prompts), wanted)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        after = mean(drawn(pipe, prompts), wanted)
    return {"base_db": own, "added_db": added, "before_db": before, "after_db": after}


@contextmanager
def packed(name: str, source: Any) -> Iterator[Any]:
    """The pipeline with every layer in a format, packed and loaded again."""
    choices = {layer: Choice(format_named(name)) for layer in source.target.layers}
    policy = Policy.of(choices, model=ModelReference.of(source.target, source.hashes, source.id))
    with tempfile.TemporaryDirectory() as folder:
        bitpolicy.export(source.pipe, policy, Path(folder) / "packed", component_dtype=torch.float32)
        yield bitpolicy.load_pipeline(Path(folder) / "packed", torch.float32)


def drawn(pipe: Any, prompts: list[str]) -> list[torch.Tensor]:
    """One image for each prompt, shape (3, 64, 64)."""
    pipe.set_progress_bar_config(disable=True)
    draws = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    call = {"num_inference_steps": 20, "guidance_scale": 4, "output_type": "pt"}
    return list(pipe(prompts, generator=draws, **call).images.cpu())


def mean(images: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    found = Psnr.of(reference, images).mean
    return float("inf") if found is None else found


def trained(work: Path, steps: int) -> Path:
    """The file of the LoRA, trained unless it is there."""
    file = work / "pytorch_lora_weights.safetensors"
    if file.exists():
        return file
    shop, unet, predict = on_other_pictures(work)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    adapter = nn.ParameterList([parameter for parameter in unet.parameters() if parameter.requires_grad])
    train_epsilon(shop, "lora", adapter, predict, steps, 3e-3, batch=32)
    StableDiffusionPipeline.save_lora_weights(work, unet_lora_layers=get_peft_model_state_dict(unet))
    return file


if __name__ == "__main__":
    main()
