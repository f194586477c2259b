"""The form of a pipeline call: how samples are written as its arguments, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.components import class_count
from bitpolicy.sensitivity.calls.hints import fits
from bitpolicy.sensitivity.calls.signature import Signature, is_of_each_sample
from bitpolicy.sensitivity.samples import Sample

Writing = Literal["list", "tensor", "single"]
"""How a prompt or a class label is written: in a list of one for each sample, as an int64 tensor, or by itself."""


@dataclass(frozen=True)
class Form:
    """How one pipeline is called.

    Attributes:
        writing: of prompts and class labels.
        finished: arguments that ask for finished images, in floats if it can.
        latent: arguments that ask for the final latent; None where it gives none.
        shares: whether samples that share a call come out as they do alone.
    """

    writing: Writing
    finished: Mapping[str, Any]
    latent: Mapping[str, Any] | None = None
    shares: bool = False


def writings(signature: Signature) -> list[Writing]:
    """The writings to try, those that the type hint admits first."""
    if signature.labels is not None:
        hint, examples = signature.hints[signature.labels], {"list": [1], "single": 1}
    elif signature.takes_text:
        hint, examples = signature.hints["prompt"], {"list": ["a"], "single": "a"}
    else:
        return ["list"]
    admitted: list[Writing] = [name for name in ("list", "single") if fits(examples[name], hint)]
    others: list[Writing] = ["list", "tensor", "single"] if signature.labels is not None else ["list", "single"]
    return list(dict.fromkeys([*admitted, *others]))


def arguments(
    pipe: DiffusionPipeline, signature: Signature, call: Mapping[str, Any], samples: Sequence[Sample], writing: Writing
) -> dict[str, Any]:
    """What the pipeline is called with for `samples`, but for what it is asked to give.

    Args:
        call: arguments of every call.
        samples: of several, none has arguments of its own.

    Raises:
        BitPolicyError: a picture cannot be read, or there is no such class.
    """
    count, texts = len(samples), [sample.prompt for sample in samples]
    own = samples[0].call_arguments() if count == 1 else {}
    found = {
        name: _written([value] * count, writing) if isinstance(value, str) and is_of_each_sample(name) else value
        for name, value in {**call, **own}.items()
    }
    generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in samples]
    if "generator" in signature:
        found["generator"] = generators if count > 1 else generators[0]
    if signature.labels is not None:
        found[signature.labels] = _written([_label(pipe, text) for text in texts], writing)
    elif signature.takes_text and "prompt_embeds" not in found:
        found["prompt"] = _written(texts, writing)
    if "batch_size" in signature:
        found["batch_size"] = count
    return found


def _written(values: list[Any], writing: Writing) -> Any:
    """Texts have no tensor, and several values no single one: both are then a list."""
    if writing == "single" and len(values) == 1:
        return values[0]
    if writing == "tensor" and isinstance(values[0], int):
        return torch.tensor(values)
    return values


def _label(pipe: Any, prompt: str) -> int:
    """A class label from its digits, or from a class name where the pipeline knows names."""
    classes = class_count(pipe)
    if prompt.isdigit() and (not classes or int(prompt) < classes):
        return int(prompt)
    try:
        return int(pipe.get_label_ids([prompt])[0])
    except (AttributeError, ValueError) as error:
        needed = f"a label from 0 to {classes - 1}" if classes else "a label, a whole number"
        raise BitPolicyError(
            f"{prompt!r} is no class of {type(pipe).__name__}; give {needed}, or a class's name"
        ) from error
