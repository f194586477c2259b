"""The README.md of an exported pipeline: what it is, what was done to it, how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.denoiser import denoisers_in, is_autoencoder
from bitpolicy.policies.policy import Choice, Policy

_TEXT = """
# {title}, quantized by bitpolicy

{component} of this pipeline in mixed precision: {counts}. Which layer got which format was
chosen by what quantizing it does to the finished image; `policy.yaml` has the whole choice and how it was made.

| | |
|---|---|
| tensor bytes of the {names} | {nbytes:,} |
| PSNR against the unquantized pipeline, held-out prompts and seeds | {psnr} |
| predicted relative error of {signal} | {error} |

```python
import bitpolicy  # registers the format with diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this/folder")
```
"""


def model_card(policy: Policy, denoiser: nn.Module, choices: Mapping[str, Choice]) -> str:
    """The card's text, front matter included."""
    counts = Counter(choice.format.name for choice in choices.values())
    result = policy.result
    psnr = "not measured" if result is None or result.psnr_db is None else f"{result.psnr_db:.1f} dB"
    error = "not predicted" if result is None or result.predicted_error is None else f"{result.predicted_error:.3g}"
    account = ByteAccount.of(denoiser, getattr(torch, policy.storage_dtype))
    nbytes = account.total({name: choice.format for name, choice in choices.items()})
    data = ModelCardData(library_name="diffusers", tags=["bitpolicy", "quantized"], base_model=_hub_id(policy.model.id))
    body = _TEXT.format(
        title=policy.model.id,
        component=_whose_layers(policy.model.component.split(",")),
        names=", ".join(policy.model.component.split(",")),
        signal="the images" if _has_autoencoder(denoiser) else "the final latents",
        counts=", ".join(f"{n} {name}" for name, n in sorted(counts.items())),
        nbytes=result.policy_bytes if result else nbytes,
        psnr=psnr,
        error=error,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _whose_layers(components: list[str]) -> str:
    names = [f"`{name}`" for name in components]
    *others, last = names
    return f"{', '.join(others)} and {last} hold the layers" if others else f"{last} holds the layers"


def _has_autoencoder(model: nn.Module) -> bool:
    """Whether errors were measured on images."""
    return any(is_autoencoder(part) for part in denoisers_in(model))


def _hub_id(model: str) -> str | None:
    parts = model.split("/")
    return model if len(parts) == 2 and all(parts) and not model.startswith((".", "/", "~")) else None
