"""The kinds of components in a pipeline.

A *denoiser* is called in the sampling loop, and so is a ControlNet. An *autoencoder* has `decode` and turns the final
latent into the image. A *conditioner*, a text or image encoder, is called before the loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError

ALL = "all"  # on the command line: every component with layers that can be quantized
DENOISERS = ("unet", "transformer")
SECOND_DENOISERS = ("transformer_2",)  # Wan 2.2 has one denoiser for high and one for low noise
_CLASSES = ("num_embeds_ada_norm", "num_class_embeds", "num_classes")  # what configs call the number of classes


def asked_components(text: str | None) -> list[str] | None:
    """The components that `--component` names, each once; None if the option is missing or empty.

    Args:
        text: names separated by commas, or "all", which is returned as it is.
    """
    return list(dict.fromkeys(name.strip() for name in text.split(","))) if text else None


def to_text(entries: Iterable[str]) -> str:
    """One entry per component, joined as files record them."""
    return ",".join(entries)


def from_text(text: str) -> list[str]:
    """The entries that a file records, one per component."""
    return text.split(",")


def is_autoencoder(model: object) -> bool:
    """Whether it turns latents into images."""
    return isinstance(model, ModelMixin) and hasattr(model, "decode")


def runs_in_loop(model: object) -> bool:
    """Whether the sampling loop calls it: a diffusers model that works on latents, i.e. a denoiser or a ControlNet."""
    return isinstance(model, ModelMixin) and not hasattr(model, "decode")


def takes_timestep(model: object) -> bool:
    """Whether it works on latents and its forward takes a timestep."""
    if not isinstance(model, ModelMixin) or not runs_in_loop(model):
        return False
    return any("time" in name for name in inspect.signature(type(model).forward).parameters)


def class_count(pipe: DiffusionPipeline) -> int:
    """The number of classes that the denoiser knows; 0 if it knows none or does not say."""
    for model in pipe.components.values():
        config: Any = getattr(model, "config", {}) if runs_in_loop(model) else {}
        for name in _CLASSES:
            if config.get(name):
                return int(config[name])
    return 0


def denoisers_of(pipe: DiffusionPipeline) -> list[str]:
    """Names of the pipeline's own denoisers: the usual ones or, if it has none of these, the unusual ones."""
    usual = [name for name in (*DENOISERS, *SECOND_DENOISERS) if isinstance(getattr(pipe, name, None), nn.Module)]
    return usual or unusual_denoisers(pipe)


def unusual_denoisers(pipe: DiffusionPipeline) -> list[str]:
    """Names of the models that take a timestep, such as unCLIP's, or else of all that work on latents: Wuerstchen's
    call the timestep by another name."""
    working = [name for name, model in pipe.components.items() if runs_in_loop(model)]
    return [name for name in working if takes_timestep(pipe.components[name])] or working


def lacks(pipe: DiffusionPipeline, wanted: str) -> BitPolicyError:
    """The error for a pipeline that has no `wanted`; it lists the components that there are."""
    modules = [name for name, value in pipe.components.items() if isinstance(value, nn.Module)]
    return BitPolicyError(
        f"{type(pipe).__name__} has no {wanted}; it has {', '.join(modules) or 'none'}: choose one with --component"
    )
