"""Which components of a pipeline are studied: its denoiser, or several as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError

T = TypeVar("T")
DENOISERS = ("unet", "transformer")
SECOND_DENOISERS = ("transformer_2",)  # Wan 2.2 has one denoiser for high and one for low noise


def denoiser_name(pipe: DiffusionPipeline, component: str | None = None) -> str:
    """The component to quantize: `component` if given, else the pipeline's `unet` or `transformer`.

    Raises:
        BitPolicyError: the pipeline has no such component, or it is no model that works on latents.
    """
    candidates = [component] if component else DENOISERS
    for name in candidates:
        found = getattr(pipe, name, None)
        if isinstance(found, ModelMixin) and not hasattr(found, "decode"):  # an autoencoder is not in the loop
            return name
    if component and isinstance(getattr(pipe, component, None), nn.Module):
        raise BitPolicyError(f"the {component} of {type(pipe).__name__} is no denoiser; leave --component out")
    modules = [name for name, value in pipe.components.items() if isinstance(value, nn.Module)]
    wanted = f"component {component!r}" if component else f"component named {' or '.join(DENOISERS)}"
    raise BitPolicyError(
        f"{type(pipe).__name__} has no {wanted}; it has {', '.join(modules) or 'none'}: choose with --component"
    )


def denoiser_names(pipe: DiffusionPipeline, components: str | None = None) -> str:
    """All components to study, separated by commas: those named in `components`, else every denoiser there is.

    Raises:
        BitPolicyError: as `denoiser_name`.
    """
    if components:
        return ",".join(denoiser_name(pipe, name.strip()) for name in components.split(","))
    return ",".join(
        [denoiser_name(pipe), *(n for n in SECOND_DENOISERS if isinstance(getattr(pipe, n, None), nn.Module))]
    )


def denoiser_of(pipe: DiffusionPipeline, components: str) -> nn.Module:
    """The component, or an `nn.ModuleDict` of several whose layer names begin with their component's."""
    names = components.split(",")
    return getattr(pipe, names[0]) if len(names) == 1 else nn.ModuleDict({name: getattr(pipe, name) for name in names})


def of_component(by_layer: Mapping[str, T], component: str, components: Sequence[str]) -> dict[str, T]:
    """The entries of one component's layers, by their names within it."""
    if len(components) == 1:
        return dict(by_layer)
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in by_layer.items() if name.startswith(start)}


def denoisers_in(denoiser: nn.Module) -> list[nn.Module]:
    """The models that the pipeline calls."""
    return list(denoiser.values()) if isinstance(denoiser, nn.ModuleDict) else [denoiser]
