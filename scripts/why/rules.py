"""Rules of thumb for mixed precision, each against the exact solution of our probe at the same bytes.

Every layer is rounded to nearest, and a layer in a format has the same bias in both policies, so that only the choice
differs. The intervals are of paired differences over images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peers.samples import captions_shown
from why.subjects import Subject, interval

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.apply import quantized
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.inventory import Layer

INT4, INT8 = format_named("int4"), format_named("int8")
ENDS = ("timestep_embedding", "input_stem", "output_head")
ATTENTION = ("attention_qkv", "attention_out", "cross_attention_qkv", "cross_attention_out")
FIRST_HALF = {"encoder": INT8, "middle": INT8, "early": INT8}
RULES: dict[str, Callable[[Layer], Format]] = {
    "INT4 everywhere": lambda layer: INT4,
    "INT8 everywhere": lambda layer: INT8,
    "ends FP16, rest INT4": lambda layer: FP16 if layer.stage == "ends" and layer.role in ENDS else INT4,
    "encoder INT8, decoder FP16": lambda layer: FIRST_HALF.get(layer.stage, FP16),
    "attention INT8, rest FP16": lambda layer: INT8 if layer.role in ATTENTION else FP16,
    "attention INT4, rest INT8": lambda layer: INT4 if layer.role in ATTENTION else INT8,
}


def rules(subject: Subject, images: int) -> Iterator[dict[str, Any]]:
    """One row per rule: its bytes as a share of FP16, its PSNR, and that of the exact solution."""
    rivals = subject.rivals
    plan = rivals.plan
    clean = _images(subject, {}, images)
    shown = captions_shown([sample.prompt for sample in subject.samples], clean)
    for name, rule in RULES.items():
        formats = {layer.name: rule(layer) for layer in plan.layers}
        formats = {
            layer.name: f if f.fits(layer.shape) else FP16
            for layer, f in zip(plan.layers, formats.values(), strict=True)
        }
        nbytes = plan.account.total(formats)
        problem = Problem(plan.layers, plan.formats, plan.account, table=rivals.ours, budget=nbytes)
        exact = {layer: choice.format for layer, choice in problem.choices(problem.solve()).items()}
        of_rule, of_exact = (_images(subject, chosen, images) for chosen in (formats, exact))
        scores = [_psnr(drawn, clean) for drawn in (of_rule, of_exact)]
        gain, width = interval(scores[1] - scores[0])
        row = {"rule": name, "share": nbytes / plan.account.reference}
        row |= {"rule dB": float(scores[0].mean()), "exact dB": float(scores[1].mean()), "gain": gain, "±": width}
        yield {**row, **_shown(subject, shown, of_rule, of_exact)}


def _fitting(layer: Layer, format: Format) -> Format:
    return format if format.fits(layer.shape) else FP16


def _images(subject: Subject, formats: Mapping[str, Format], images: int) -> torch.Tensor:
    plan = subject.rivals.plan
    choices = {
        layer.name: subject.rivals.ours.choice(place, formats[layer.name])
        for place, layer in enumerate(plan.layers)
        if formats and formats[layer.name].packed
    }
    with quantized(plan.trajectories.denoisers[0], choices, quantization=subject.quantization):
        return torch.stack([image for image, _ in plan.trajectories.images(subject.samples[:images])])


def _psnr(images: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return -10 * (images - clean).double().square().flatten(1).mean(1).clamp(min=1e-12).log10()


def _shown(
    subject: Subject, clean: list[bool] | None, of_rule: torch.Tensor, of_exact: torch.Tensor
) -> dict[str, float]:
    """The share of images that still show their caption."""
    if clean is None:
        return {}
    captions = [sample.prompt for sample in subject.samples]
    found = {}
    for name, images in (("rule shows", of_rule), ("exact shows", of_exact)):
        now = captions_shown(captions, images)
        assert now is not None
        found[name] = sum(a for a, b in zip(now, clean, strict=True) if b) / max(sum(clean), 1)
    return found
