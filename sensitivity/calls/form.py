"""The form of a pipeline call: how samples become its arguments, and which outputs it offers."""

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
"""How prompts or class labels are passed: in a list with one per sample, as an int64 tensor, or as a single value."""


@dataclass(frozen=True)
class Form:
    """How one pipeline is called.

    Attributes:
        writing: how prompts and class labels are passed.
        finished: arguments that select finished images, as floats if possible.
        latent: arguments that select the final latent; None if the pipeline does not return it.
        shares: whether samples that share a call come out the same as alone.
    """

    writing: Writing
    finished: Mapping[str, Any]
    latent: Mapping[str, Any] | None = None
    shares: bool = False


def writings(signature: Signature) -> list[Writing]:
    """The writings to try, starting with those that the type hint allows."""
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
    """The arguments of a pipeline call for `samples`, without those that select its output.

    Args:
        call: arguments of every call.
        samples: if there are several, none has its own arguments.

    Raises:
        BitPolicyError: a picture cannot be read, or there is no such class.
    """
    count, texts = len(samples), [sample.prompt for sample in samples]
    own = {name: _fitted(pipe, value) for name, value in samples[0].call_arguments().items()} if count == 1 else {}
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


def _fitted(pipe: Any, value: Any) -> Any:
    """A tensor in the dtype and on the device of the models, which files do not know; anything else as it is."""
    if isinstance(value, list):
        return [_fitted(pipe, item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(pipe._execution_device, pipe.dtype if value.is_floating_point() else None)


def _written(values: list[Any], writing: Writing) -> Any:
    """The values as the call takes them. Texts for a tensor, and several values for a single one, become a list."""
    if writing == "single" and len(values) == 1:
        return values[0]
    if writing == "tensor" and isinstance(values[0], int):
        return torch.tensor(values)
    return values


def _label(pipe: Any, prompt: str) -> int:
    """A class label, from its digits or, if the pipeline knows class names, from a name."""
    classes = class_count(pipe)
    if prompt.isdigit() and (not classes or int(prompt) < classes):
        return int(prompt)
    try:
        return int(pipe.get_label_ids([prompt])[0])
    except (AttributeError, ValueError) as error:
        needed = f"a label from 0 to {classes - 1}" if classes else "a label (a whole number)"
        raise BitPolicyError(
            f"{prompt!r} is not a class of {type(pipe).__name__}; give {needed} or the name of a class"
        ) from error
