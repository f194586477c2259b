"""Train the bundled pipeline, a miniature Stable Diffusion on Noto emoji, from scratch.

There are three stages, all resumable: an AutoencoderKL on the pictures; a BPE tokenizer on their names; then the text
encoder and the UNet2DConditionModel together on the latents (v-prediction, Salimans and Ho 2022, section 2.4; prompt
dropout for classifier-free guidance, Ho and Salimans 2022; EMA of the weights). The learning rate is constant and falls
linearly to zero over the last part, so a running training can be extended.

    python scripts/train_reference.py --work build/reference            # about two hours on 2 CPU cores
    python scripts/train_reference.py --work build/reference --assemble models/emoji   # write the fp16 pipeline folder
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from emoji_data import SIZE, Emoji, fetch, load
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16  # longest prompt, in tokens
SAVE_EVERY = 250  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference"), help="folder for pictures, checkpoints and logs"
    )
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; at most the number of free cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--assemble", type=Path, help="write the pipeline from the newest checkpoint and stop")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    emoji = load(fetch(args.work / "emoji"))
    print(f"{len(emoji)} emoji, {sum(len(e.names) for e in emoji)} names", flush=True)
    if args.assemble:
        assemble(args.work, args.assemble)
        return
    train_vae(emoji, args.work, args.vae_steps, args.device)
    train_tokenizer(emoji, args.work / "tokenizer")
    train_denoiser(emoji, args.work, args.unet_steps, args.device)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 96, 152),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers' historical name for the number of heads
        norm_num_groups=8,
    )


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class Run:
    """Step counter, warm-up, decay and resumable state of one training stage."""

    def __init__(self, state: Path, module: nn.Module, rate: float, steps: int, decay: float = 0.25) -> None:
        self.state, self.module, self.rate, self.steps, self.decay = state, module, rate, steps, decay
        self.optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.99))
        self.ema = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.step = 0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.ema.load_state_dict(saved["ema"])
            self.ema.to(next(module.parameters()).device)
            self.step = saved["step"]
            torch.set_rng_state(saved["rng"])
            random.seed(self.step)

    def __iter__(self) -> Iterator[int]:
        start, first = time.time(), self.step
        while self.step < self.steps:
            left = (self.steps - self.step) / (self.decay * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, (self.step + 1) / 200, left)
            yield self.step
            self.step += 1
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()
            if self.step % 50 == 0:
                each = (time.time() - start) / (self.step - first)
                print(
                    f"  {self.step}/{self.steps}  {each:.2f} s/step, "
                    f"{each * (self.steps - self.step) / 60:.0f} min left",
                    flush=True,
                )

    def descend(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.module.parameters())

    def save(self) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        aside = self.state.with_suffix(".partial")
        torch.save(
            {
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "step": self.step,
                "rng": torch.get_rng_state(),
            },
            aside,
        )
        aside.replace(self.state)


def train_vae(emoji: list[Emoji], work: Path, steps: int, device: str) -> None:
    """L1 and gradient-difference reconstruction plus a small KL term, on randomly shifted pictures."""
    pictures = torch.stack([e.image for e in emoji]).to(device)
    vae = new_vae().to(device)
    run = Run(work / "vae.pt", vae, 1e-3, steps)
    for step in run:
        x = _shift(pictures[torch.randint(len(pictures), (16,))])
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        loss = (y - x).abs().mean() + 0.5 * _edge_difference(y, x) + 1e-6 * posterior.kl().float().mean()
        run.descend(loss)
        if step % 50 == 0:
            print(
                f"vae {step}: loss {loss.item():.4f}, {-10 * math.log10((y - x).square().mean().item() / 4):.2f} dB",
                flush=True,
            )


def _shift(x: torch.Tensor, most: int = 3) -> torch.Tensor:
    down, right = random.randint(0, 2 * most), random.randint(0, 2 * most)
    return nn.functional.pad(x, (most,) * 4, value=1.0)[:, :, down : down + SIZE, right : right + SIZE]


def _edge_difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sum(((y - x).diff(dim=dim).abs().mean() for dim in (-1, -2)), torch.zeros((), device=x.device))


def train_tokenizer(emoji: list[Emoji], folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary trained on the names, in CLIP's file format."""
    if not (folder / "vocab.json").exists():
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        letters = [chr(i) for i in range(33, 127)]
        specials = ["<|startoftext|>", "<|endoftext|>"] + letters + [f"{c}</w>" for c in letters]
        trainer = trainers.BpeTrainer(
            vocab_size=1500, special_tokens=specials, end_of_word_suffix="</w>", show_progress=False
        )
        bpe.train_from_iterator([name for e in emoji for name in e.names], trainer)
        model = json.loads(bpe.to_str())["model"]
        folder.mkdir(parents=True, exist_ok=True)
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def train_denoiser(emoji: list[Emoji], work: Path, steps: int, device: str, batch: int = 64) -> None:
    """Train text encoder and UNet on the latents of the pictures: v-prediction, one prompt in ten empty."""
    vae, scaling = trained_vae(work)
    latents = (encode(vae, emoji) * scaling).to(device)
    tokenizer = train_tokenizer(emoji, work / "tokenizer")
    tokens = [tokenize(tokenizer, list(e.names)).to(device) for e in emoji]
    empty = tokenize(tokenizer, [""])[0].to(device)
    unet, text_encoder, scheduler = new_unet(), new_text_encoder(len(tokenizer)), new_scheduler()
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # its backward is three times as fast as fused attention's on a CPU
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    run = Run(work / "denoiser.pt", both, 1e-3, steps)
    average = 1.0
    for step in run:
        chosen = torch.randint(len(latents), (batch,)).tolist()
        prompts = torch.stack([empty if random.random() < 0.1 else random.choice(tokens[i]) for i in chosen])
        x, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], device=device)
        t = torch.randint(1000, (batch,), device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            prediction = unet(
                scheduler.add_noise(x, noise, t), t, encoder_hidden_states=text_encoder(prompts)[0]
            ).sample
        loss = nn.functional.mse_loss(prediction.float(), scheduler.get_velocity(x, noise, t))
        run.descend(loss)
        average += (loss.item() - average) * max(0.01, 1 / (step + 1))
        if step % 50 == 0:
            print(f"unet {step}: loss {average:.4f}", flush=True)


def tokenize(tokenizer: CLIPTokenizer, names: list[str]) -> torch.Tensor:
    """Token ids, int64, shape (len(names), TOKENS)."""
    return tokenizer(names, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode(vae: AutoencoderKL, emoji: list[Emoji]) -> torch.Tensor:
    """Mean latents, shape (len(emoji), 4, 16, 16), unscaled."""
    pictures = torch.stack([e.image for e in emoji])
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])


def trained_vae(work: Path) -> tuple[AutoencoderKL, float]:
    """The EMA autoencoder of a finished first stage, and the factor that gives its latents unit variance."""
    vae = new_vae().eval()
    run = Run(work / "vae.pt", vae, 0.0, 0)
    if not run.step:
        raise SystemExit(f"no autoencoder in {work}; run the training without --assemble first")
    run.ema.copy_to(vae.parameters())
    latents = encode(vae, load(fetch(work / "emoji")))
    return vae, 1 / latents.std().item()


def assemble(work: Path, folder: Path) -> None:
    """Write the EMA weights as an fp16 StableDiffusionPipeline folder."""
    vae, scaling = trained_vae(work)
    vae.register_to_config(scaling_factor=scaling)
    tokenizer = CLIPTokenizer(
        str(work / "tokenizer/vocab.json"), str(work / "tokenizer/merges.txt"), model_max_length=TOKENS
    )
    unet, text_encoder = new_unet(), new_text_encoder(len(tokenizer))
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    run = Run(work / "denoiser.pt", both, 0.0, 0)
    run.ema.copy_to(both.parameters())
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    print(f"{folder}: trained for {run.step} steps")


if __name__ == "__main__":
    main()
