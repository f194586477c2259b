"""Train denoisers on latents of scenes: epsilon prediction, flow matching, consistency distillation to a few steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from small_models import ddim, new_dit, new_mmdit, new_unet, new_video_unet
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_reference import Run
from training_stage import Pool, Workshop, caption_mask, pool_of_clips, pool_of_scenes, text_encoder

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of latents, timesteps and token ids
BATCH = 64  # of pictures; a batch of clips is smaller
GUIDANCE = 4.0  # guidance scale built into the distilled model
SKIP = 20  # timesteps per DDIM step of the distilled model's teacher


def train_unet(shop: Workshop, steps: int) -> None:
    unet, text = new_unet(), text_encoder(shop)
    if shop.device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # its backward is three times as fast as fused attention's on a CPU
    unet.to(shop.device, memory_format=torch.channels_last)

    def predict(x: torch.Tensor, t: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return unet(x.contiguous(memory_format=torch.channels_last), t, encoder_hidden_states=text(prompts)[0]).sample

    train_epsilon(shop, "unet", unet, predict, steps, 1.5e-3)


def train_dit(shop: Workshop, steps: int) -> None:
    """Train PixArt; mask padded tokens, as its pipeline does."""
    dit, text = new_dit().to(shop.device), text_encoder(shop)
    conditions = {"resolution": None, "aspect_ratio": None}

    def predict(x: torch.Tensor, t: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        mask = caption_mask(prompts)
        states = text(prompts, attention_mask=mask)[0]
        return dit(x, states, t, conditions, encoder_attention_mask=mask).sample

    train_epsilon(shop, "dit", dit, predict, steps, 1e-3)


def train_video(shop: Workshop, steps: int) -> None:
    """Train a copy of the text encoder too: video captions combine words that the shared one has not seen together."""
    both = nn.ModuleDict({"unet": new_video_unet(), "text_encoder": text_encoder(shop)}).to(shop.device)
    both.requires_grad_(True)
    if shop.device == "cpu":
        both["unet"].set_attn_processor(AttnProcessor())

    def predict(x: torch.Tensor, t: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return both["unet"](x, t, encoder_hidden_states=both["text_encoder"](prompts)[0]).sample

    train_epsilon(shop, "video", both, predict, steps, 1e-3, batch=max(1, BATCH // 8), pool=pool_of_clips(shop))


def train_epsilon(
    shop: Workshop,
    name: str,
    model: nn.Module,
    predict: Predict,
    steps: int,
    rate: float,
    batch: int | None = None,
    pool: Pool | None = None,
) -> None:
    """Train on the epsilon loss, weighted by min(SNR, 5) / SNR (Hang et al. 2023)."""
    scheduler = ddim()
    alphas = scheduler.alphas_cumprod.to(shop.device)
    weights = (5 * (1 - alphas) / alphas).clamp(max=1)

    def loss(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=x.device)
        with shop.autocast():
            prediction = predict(scheduler.add_noise(x, noise, t), t, prompts).float()
        error = (prediction - noise).square().flatten(1).mean(dim=1)
        return (weights[t] * error).mean() / weights.mean()

    _descend(shop, name, model, loss, steps, rate, batch, pool)


def train_mmdit(shop: Workshop, steps: int) -> None:
    """Rectified flow with logit-normal times (Esser et al. 2024, section 3.1); the model predicts noise - latents."""
    mmdit, text = new_mmdit().to(shop.device), text_encoder(shop)

    def loss(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        noise, time = torch.randn_like(x), torch.randn(len(x), device=x.device).sigmoid()
        share = time[:, None, None, None]
        states, pooled = joint_states(text, prompts)
        with shop.autocast():
            noisy = (1 - share) * x + share * noise
            prediction = mmdit(noisy, states, pooled, 1000 * time).sample.float()
        return nn.functional.mse_loss(prediction, noise - x)

    _descend(shop, "mmdit", mmdit, loss, steps, 1.5e-3)


@torch.no_grad()
def joint_states(text: nn.Module, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditioning that StableDiffusion3Pipeline computes from two equal CLIP encoders and no T5.

    Returns:
        The states before the last layer, concatenated and followed by zeros, (B, 2 * tokens, 2 * WIDTH); and the state
        at the end of the caption, twice, (B, 2 * WIDTH).
    """
    output = text(prompts, output_hidden_states=True)
    states = output.hidden_states[-2].repeat(1, 1, 2)
    return torch.cat([states, torch.zeros_like(states)], dim=1), output.pooler_output.repeat(1, 2)


def train_lcm(shop: Workshop, steps: int) -> None:
    """Distil the U-Net to four steps without guidance (Luo et al. 2023, algorithm 1, with one guidance scale)."""
    text, scheduler = text_encoder(shop), ddim()
    teacher = shop.finished("unet", new_unet())
    student, target = new_unet(), new_unet().requires_grad_(False).to(shop.device)
    for unet in (student, target):
        unet.load_state_dict(teacher.state_dict())
        if shop.device == "cpu":
            unet.set_attn_processor(AttnProcessor())
    student.to(shop.device)
    alphas = scheduler.alphas_cumprod.to(shop.device)
    empty = shop.tokens([""])

    def loss(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        t = (torch.randint(1, 1000 // SKIP + 1, (len(x),), device=x.device) * SKIP - 1).clamp(max=999)
        before = (t - SKIP).clamp(min=0)
        noisy = scheduler.add_noise(x, torch.randn_like(x), t)
        with torch.no_grad(), shop.autocast():
            states = text(torch.cat([prompts, empty.expand(len(x), -1)]))[0]
            asked, blank = teacher(noisy.repeat(2, 1, 1, 1), t.repeat(2), states).sample.float().chunk(2)
            epsilon = blank + GUIDANCE * (asked - blank)
            earlier = _ddim_step(noisy, epsilon, alphas[t], alphas[before])
            goal = _consistent(target, earlier, before, states[: len(x)], alphas)
        with shop.autocast():
            guess = _consistent(student, noisy, t, states[: len(x)], alphas)
        for slow, fast in zip(target.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.05)
        return ((guess - goal).square() + 1e-6).sqrt().mean()

    _descend(shop, "lcm", student, loss, steps, 5e-4)


def _ddim_step(x: torch.Tensor, epsilon: torch.Tensor, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    now, then = now[:, None, None, None], then[:, None, None, None]
    clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
    return then.sqrt() * clean + (1 - then).sqrt() * epsilon


def _consistent(
    unet: UNet2DConditionModel, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """The consistency function with LCMScheduler's boundary conditions (timestep_scaling 10, sigma_data 0.5)."""
    scaled, alpha = 10.0 * t[:, None, None, None], alphas[t][:, None, None, None]
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    epsilon = unet(x, t, states).sample.float()
    return skip * x + out * (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()


def _descend(
    shop: Workshop,
    name: str,
    model: nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
    rate: float,
    batch: int | None = None,
    pool: Pool | None = None,
) -> None:
    """Train on batches from the pool, which holds scenes by default.

    One prompt in ten is empty, for classifier-free guidance. On a CPU, plain attention's backward is twice as fast as
    fused attention's.
    """
    run = Run(shop.work / f"{name}.pt", model, rate, steps)
    for group in run.optimizer.param_groups:
        group["fused"] = True  # half the time on a CPU
    pool, empty, average = pool or pool_of_scenes(shop), shop.tokens([""])[0], 0.0
    first, count = run.step, batch or BATCH
    for step in run:
        x, prompts = (part.to(shop.device) for part in pool.batch(count))
        prompts[torch.rand(count) < 0.1] = empty
        with sdpa_kernel([SDPBackend.MATH]) if shop.device == "cpu" else nullcontext():
            value = loss(x, prompts)
            run.descend(value)
        average += (value.item() - average) * max(0.01, 1 / (step - first + 1))
        if step % 50 == 0:
            print(f"{name} {step}: loss {average:.4f}", flush=True)
