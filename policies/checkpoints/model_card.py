"""The README.md of an exported pipeline: what it is, how it was made, how good it is, and how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from huggingface_hub import ModelCard, ModelCardData

from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.components import is_autoencoder
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.target import Target

_TEXT = """
# {title}, quantized by bitpolicy

This pipeline stores the layers of its {component} in mixed precision: {counts}. The format of
each layer was chosen by what quantizing it does to the finished image. `policy.yaml` records every choice and how it
was made.

```python
import bitpolicy  # registers the format with diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{location}")
```

| | |
|---|---|
| base model | {base} |
| tensor bytes of the {names} | {nbytes:,} |
| the same, unquantized | {reference:,} ({storage}) |
| requested budget | {budget} |
| rounding | {rounding} |
| layers with corrected bias | {corrected} |
| packed layers compute | {compute} |
| PSNR against the unquantized pipeline, held-out prompts and seeds | {psnr} |
| predicted relative error of {signal} | {error} |

On the disk where this folder was made, weights of components that were not packed may be hard links to the base model's
files. To change such a file, replace it. Do not write into it or change its permissions.

Layers by role and format:

{table}
"""


_COMPUTES = {
    "exact": "with dequantized weights (`compute: exact`)",
    "int8": "with 8-bit inputs and weights (`compute: int8`), as for PSNR and error below",
    "fp8": "with float8 inputs where weights are fp8 (`compute: fp8`), as for PSNR and error below",
    "mxfp8": "with mxfp8 inputs where weights are mxfp8 or mxfp4 (`compute: mxfp8`), as for PSNR and error below",
    "nvfp4": "with nvfp4 inputs where weights are nvfp4 (`compute: nvfp4`), as for PSNR and error below",
}


@dataclass(frozen=True)
class Card:
    """What a model card says in addition to the policy.

    Attributes:
        location: what the snippet loads: a folder, or the repository that it will be uploaded to.
        roles: layer name -> its role, e.g. "attention_qkv"; a layer without a role counts as "other".
    """

    location: str = "this/folder"
    roles: Mapping[str, str] = field(default_factory=dict)


PLAIN = Card()


def model_card(policy: Policy, target: Target, choices: Mapping[str, Choice], card: Card = PLAIN) -> str:
    """The card's text, including the front matter. `target` may be on `meta`."""
    counts = Counter(choice.format.name for choice in choices.values())
    account = ByteAccount.of(target, getattr(torch, policy.storage_dtype))
    nbytes = account.total({name: choice.format for name, choice in choices.items()})
    result, budget = policy.result, policy.budget
    if result is not None and result.policy_bytes != nbytes:
        result = None  # the policy was edited after it was measured
    psnr = "not measured" if result is None or result.psnr_db is None else f"{result.psnr_db:.1f} dB"
    error = "not predicted" if result is None or result.predicted_error is None else f"{result.predicted_error:.3g}"
    data = ModelCardData(library_name="diffusers", tags=["bitpolicy", "quantized"], base_model=_hub_id(policy.model.id))
    body = _TEXT.format(
        title=policy.model.id,
        component=_in_words(policy.model.components),
        names=", ".join(policy.model.components),
        signal="the images" if _has_autoencoder(target) else "the final latents",
        counts=", ".join(f"{n} {name}" for name, n in sorted(counts.items())),
        location=card.location,
        base=policy.model.id + (f", revision {policy.model.revision}" if policy.model.revision else ""),
        nbytes=nbytes,
        reference=account.reference,
        storage=policy.storage_dtype,
        budget=f"{budget.asked} (scope {budget.scope})" if budget else "none",
        rounding=", ".join(sorted({c.quantizer for c in choices.values() if c.format.packed})) or "none",
        corrected=sum(choice.bias_correction for choice in choices.values()),
        compute=_COMPUTES[policy.compute],
        psnr=psnr,
        error=error,
        table=_table(choices, card.roles, account),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _in_words(components: list[str]) -> str:
    names = [f"`{name}`" for name in components]
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _has_autoencoder(target: Target) -> bool:
    """Whether errors were measured on images."""
    return any(is_autoencoder(model) for model in target.models)


def _table(choices: Mapping[str, Choice], roles: Mapping[str, str], account: ByteAccount) -> str:
    """A table with a row per role: the number of layers in each format, and the bytes of their weights."""
    formats = sorted({choice.format.name for choice in choices.values()})
    counts: dict[str, Counter[str]] = {}
    nbytes: Counter[str] = Counter()
    for name, choice in choices.items():
        role = roles.get(name, "other")
        counts.setdefault(role, Counter())[choice.format.name] += 1
        nbytes[role] += account.layer(name, choice.format)
    rows = [["role", *formats, "bytes of weights"], ["---", *["--:"] * (len(formats) + 1)]]
    rows += [[r, *(str(counts[r][f] or "") for f in formats), f"{nbytes[r]:,}"] for r in sorted(counts)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _hub_id(model: str) -> str | None:
    parts = model.split("/")
    return model if len(parts) == 2 and all(parts) and not model.startswith((".", "/", "~")) else None
