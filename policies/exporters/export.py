"""Export a policy to another program: check what it can hold, write its files, and the policy next to them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import as_stored, choices_for
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import packed_specs, packed_tensors
from bitpolicy.policies.checkpoints.parts import Parts
from bitpolicy.policies.exporters.exporter import Exporter, Layer, Source, config_of
from bitpolicy.policies.exporters.requantize import Requantized, refuse, requantized
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.policies.exporters.tied import apart, common, refuse_apart, tied_layers
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.atomic import folder_written_aside, write_text
from bitpolicy.policies.storage.source import TensorSource, joined

POLICY = "policy.yaml"
_OTHERS = ("run.json", "sensitivity.safetensors", "calibration.safetensors", "checkpoint", "model_index.json")
"""What a search or a pipeline has next to its policy, and an export to another program does not."""


@dataclass(frozen=True)
class Exported:
    """What an export to another program wrote.

    Attributes:
        nbytes: tensor bytes of its weights; 0 for a recipe.
        requantized: layers that were rounded to another format.
        notes: what the target does not take over from the policy, in sentences.
    """

    nbytes: int
    requantized: tuple[Requantized, ...]
    notes: tuple[str, ...]


def export_to(
    program: str,
    parts: Parts,
    policy: Policy,
    calibration: Calibration,
    folder: Path,
    *,
    requantize: bool = False,
) -> Exported:
    """Write a target as another program reads it, atomically, with the policy that the files follow.

    One layer is in memory at a time, unless a quantizer needs more.

    Args:
        program: its name, one of `bitpolicy.policies.exporters.targets.NAMES`.
        parts: each component of its target gets a file or folder of its own.
        folder: output folder; one from an earlier export is replaced once the new one is complete.
        requantize: round layers in a format that the program lacks to the nearest one, instead of raising an error.

    Raises:
        BitPolicyError: there is no such program, it does not know this class of model, the calibration is missing, or
            the disk is full.
        TargetError: the program cannot hold the policy, and `requantize` is off.
    """
    exporter = exporter_named(program)
    quantization = Quantization(calibration=calibration, storage=getattr(torch, policy.storage_dtype))
    _require_diffusers(parts, exporter)
    _keep_others(folder)
    asked = choices_for(parts.target, policy)
    changed = _requantized(exporter, parts, asked, quantization, requantize)
    choices = asked | {one.name: one.after for one in changed}
    written = _policy_of(policy, choices, exporter) if changed else policy
    nbytes = 0
    with folder_written_aside(folder) as aside:
        aside.mkdir()
        for name, model in parts.target.items():
            own = parts.target.of_component(choices, name)
            within = quantization.of_component(name, parts.target.names)
            source = _source(model, parts.sources[name], name, own, within, written)
            nbytes += exporter.write(source, aside)
        write_text(aside / POLICY, written.to_yaml())  # without a calibration: the codes are in the target's own files
    return Exported(nbytes, changed, (*_notes(exporter, choices), *_compute_note(exporter, policy)))


def _requantized(
    exporter: Exporter,
    parts: Parts,
    choices: Mapping[str, Choice],
    quantization: Quantization,
    allowed: bool,
) -> tuple[Requantized, ...]:
    """The layers that the exporter does not hold, or stores as one with a layer in another format, rounded to another
    format; an error if that is not allowed."""
    modules, source = parts.target.layers, joined(parts.sources)
    groups = tied_layers(exporter, parts.target)
    merged = {name for group in groups for name in group}
    layers = {name: Layer.of(name, modules[name], choice.format, name in merged) for name, choice in choices.items()}
    unheld = {name: layer for name, layer in layers.items() if not exporter.holds(layer)}
    if not allowed:
        refuse(exporter, unheld)
        refuse_apart(exporter, groups, layers)

    def rounded(name: str, format: Format | None = None) -> Requantized:
        weight = as_stored(f"{name}.weight", source.read(f"{name}.weight"), quantization.storage)
        return requantized(exporter, layers[name], weight, choices[name], quantization.calibration, format)

    changed = {name: rounded(name) for name in unheld}
    now = layers | {name: layers[name].stored_as(one.after.format) for name, one in changed.items()}
    for group in apart(groups, now):
        format = common(exporter, [now[name] for name in group])
        changed |= {name: rounded(name, format) for name in group if now[name].format != format}
    return tuple(changed.values())


def _source(
    model: Any,
    tensors: TensorSource,
    component: str,
    choices: Mapping[str, Choice],
    quantization: Quantization,
    policy: Policy,
) -> Source:
    storage = quantization.storage
    modules = dict(quantizable_layers(model))
    layers = {name: Layer.of(name, modules[name], choice.format) for name, choice in choices.items()}
    ours = {
        f"{name}.{suffix}"
        for name, layer in layers.items()
        if layer.format.packed
        for suffix in layer.format.tensors(layer.shape, storage)
    }
    others = {name: spec for name, spec in packed_specs(model, choices, storage).items() if name not in ours}
    return Source(
        component=component,
        config=config_of(model),
        storage=storage,
        layers=layers,
        others=others,
        tensors=lambda: itertools.chain.from_iterable(
            layer.items() for layer in packed_tensors(model, tensors, choices, quantization=quantization)
        ),
        origin=_origin(policy),
    )


def _origin(policy: Policy) -> dict[str, str]:
    """Where the weights come from, for the header of a file that may be moved out of its folder."""
    model = policy.model
    digest = hashlib.sha256(policy.to_yaml().encode()).hexdigest()
    return {"model": model.id, "class": model.class_name, "model_sha256": model.sha256, "policy_sha256": digest}


def _policy_of(policy: Policy, choices: Mapping[str, Choice], exporter: Exporter) -> Policy:
    """The policy with the requantized layers, without the results that were measured before."""
    return Policy.of(
        choices,
        model=policy.model,
        budget=policy.budget,
        storage_dtype=policy.storage_dtype,
        provenance={**policy.provenance, "requantized_for": exporter.name},
    )


def _notes(exporter: Exporter, choices: Mapping[str, Choice]) -> tuple[str, ...]:
    if not exporter.rounds_itself:
        return ()
    corrected = sum(choice.bias_correction for choice in choices.values())
    others = sum(choice.quantizer != "rtn" for choice in choices.values())
    lost = f"{exporter.title} rounds the original weights itself"
    if corrected or others:
        lost += f": {corrected} corrected biases and {others} layers rounded by another quantizer than rtn are not kept"
    return (lost,)


def _compute_note(exporter: Exporter, policy: Policy) -> tuple[str, ...]:
    if policy.compute == "exact":
        return ()
    return (f"the policy was measured under {policy.compute} compute, but {exporter.title} multiplies in its own way",)


def _require_diffusers(parts: Parts, exporter: Exporter) -> None:
    others = [name for name, model in parts.target.items() if not isinstance(model, ModelMixin)]
    if others:
        raise BitPolicyError(
            f"{exporter.title} takes diffusers models only, but the policy also covers {others[0]}; "
            "search without it, or export without --target"
        )


def _keep_others(folder: Path) -> None:
    ours = (folder / POLICY).is_file() and not any((folder / name).exists() for name in _OTHERS)
    if folder.exists() and not ours and (folder.is_file() or any(folder.iterdir())):
        raise BitPolicyError(f"{folder} holds something that no export wrote; export to a new or empty folder")
