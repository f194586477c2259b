"""Which components of a pipeline are studied: its denoiser, or several components as one.

A component is one of three kinds. A *denoiser* is called in the sampling loop. An *autoencoder* has `decode` and makes
the image of the final latent. A *conditioner*, a text or image encoder, is called before the loop. The last two are
*outside* the loop. Where several are studied, their layers' names begin with their component's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers

T = TypeVar("T")
ALL = "all"  # stands for every component with layers that can be quantized
DENOISERS = ("unet", "transformer")
SECOND_DENOISERS = ("transformer_2",)  # Wan 2.2 has one denoiser for high and one for low noise
_NO_SAY = ("safety_checker",)  # it looks at images and makes none


def is_autoencoder(model: object) -> bool:
    """Whether it makes images of latents."""
    return isinstance(model, ModelMixin) and hasattr(model, "decode")


def is_denoiser(model: object) -> bool:
    """Whether it is a model that works on latents: called in the sampling loop, as ControlNets are."""
    return isinstance(model, ModelMixin) and not hasattr(model, "decode")


def denoiser_name(pipe: DiffusionPipeline, component: str | None = None) -> str:
    """The denoiser: `component` if given, else the pipeline's `unet` or `transformer`.

    Raises:
        BitPolicyError: the pipeline has no such component, or it is no model that works on latents.
    """
    candidates = [component] if component else DENOISERS
    for name in candidates:
        if is_denoiser(getattr(pipe, name, None)):
            return name
    if component and isinstance(getattr(pipe, component, None), nn.Module):
        raise BitPolicyError(f"the {component} of {type(pipe).__name__} is no denoiser; leave --component out")
    raise _lacks(pipe, f"component {component!r}" if component else f"component named {' or '.join(DENOISERS)}")


def denoiser_names(pipe: DiffusionPipeline, components: str | None = None) -> str:
    """All components to study, separated by commas: those named in `components`, else every denoiser there is.

    Args:
        components: names with commas between them, or "all".

    Raises:
        BitPolicyError: the pipeline has no such component, it cannot be quantized, or there is no denoiser at all.
    """
    if components == ALL:
        return ",".join(name for name in pipe.components if _quantizable(pipe, name))
    if components:
        names = list(dict.fromkeys(name.strip() for name in components.split(",")))
        for name in names:
            _require_component(pipe, name)
        return ",".join(names)
    return ",".join([denoiser_name(pipe), *_present(pipe, SECOND_DENOISERS)])


def _require_component(pipe: DiffusionPipeline, name: str) -> None:
    model = getattr(pipe, name, None)
    if not isinstance(model, nn.Module):
        raise _lacks(pipe, f"component {name!r}")
    if name in _NO_SAY:
        raise BitPolicyError(
            f"the {name} of {type(pipe).__name__} has no say in the image; leave it out of --component"
        )
    if not isinstance(model, ModelMixin | PreTrainedModel):
        raise BitPolicyError(
            f"the {name} of {type(pipe).__name__} is a {type(model).__name__}, which neither diffusers nor "
            "transformers can save and load; leave it out of --component"
        )


def _quantizable(pipe: DiffusionPipeline, name: str) -> bool:
    model = getattr(pipe, name, None)
    if not isinstance(model, ModelMixin | PreTrainedModel) or name in _NO_SAY:
        return False
    return _has_packed(model) or any(True for _ in quantizable_layers(model))


def _has_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in model.modules())


def _present(pipe: DiffusionPipeline, names: Sequence[str]) -> list[str]:
    return [name for name in names if isinstance(getattr(pipe, name, None), nn.Module)]


def _lacks(pipe: DiffusionPipeline, wanted: str) -> BitPolicyError:
    modules = [name for name, value in pipe.components.items() if isinstance(value, nn.Module)]
    return BitPolicyError(
        f"{type(pipe).__name__} has no {wanted}; it has {', '.join(modules) or 'none'}: choose with --component"
    )


def denoiser_of(pipe: DiffusionPipeline, components: str) -> nn.Module:
    """The component, or an `nn.ModuleDict` of several whose layer names begin with their component's."""
    names = components.split(",")
    return getattr(pipe, names[0]) if len(names) == 1 else nn.ModuleDict({name: getattr(pipe, name) for name in names})


def loop_denoisers(pipe: DiffusionPipeline, components: str) -> list[nn.Module]:
    """Every model whose calls make up the loop: the pipeline's denoisers, studied or not, and others that are studied.

    Raises:
        BitPolicyError: there is none.
    """
    studied = [name for name in components.split(",") if is_denoiser(getattr(pipe, name))]
    names = dict.fromkeys([*studied, *_present(pipe, (*DENOISERS, *SECOND_DENOISERS))])
    if not names:
        raise _lacks(pipe, f"component named {' or '.join(DENOISERS)}")
    return [getattr(pipe, name) for name in names]


def outside_loop(pipe: DiffusionPipeline, components: str) -> dict[str, nn.Module]:
    """The studied components that are called before the loop or after it, by name."""
    return {name: getattr(pipe, name) for name in components.split(",") if not is_denoiser(getattr(pipe, name))}


def studied(pipe: DiffusionPipeline, components: str) -> str:
    """What is studied, in words: "denoiser", or "unet, text_encoder and vae"."""
    if not outside_loop(pipe, components):
        return "denoiser"
    *others, last = components.split(",")
    return f"{', '.join(others)} and {last}" if others else last


def of_component(by_layer: Mapping[str, T], component: str, components: Sequence[str]) -> dict[str, T]:
    """The entries of one component's layers, by their names within it."""
    if len(components) == 1:
        return dict(by_layer)
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in by_layer.items() if name.startswith(start)}


def denoisers_in(denoiser: nn.Module) -> list[nn.Module]:
    """The components that are studied, of what `denoiser_of` gives."""
    return list(denoiser.values()) if isinstance(denoiser, nn.ModuleDict) else [denoiser]
