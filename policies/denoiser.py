"""Which components of a pipeline are studied: its denoiser, or several components as one.

A component is one of three kinds. A *denoiser* is called in the sampling loop. An *autoencoder* has `decode` and makes
the image of the final latent. A *conditioner*, a text or image encoder, is called before the loop. The last two are
*outside* the loop. Where several are studied, their layers' names begin with their component's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers

T = TypeVar("T")
ALL = "all"  # stands for every component with layers that can be quantized
DENOISERS = ("unet", "transformer")
SECOND_DENOISERS = ("transformer_2",)  # Wan 2.2 has one denoiser for high and one for low noise
_CLASSES = ("num_embeds_ada_norm", "num_class_embeds", "num_classes")  # what configs call the number of classes
_NO_SAY = ("safety_checker",)  # it looks at images and makes none


def is_autoencoder(model: object) -> bool:
    """Whether it makes images of latents."""
    return isinstance(model, ModelMixin) and hasattr(model, "decode")


def is_denoiser(model: object) -> bool:
    """Whether it is a model that works on latents: called in the sampling loop, as ControlNets are."""
    return isinstance(model, ModelMixin) and not hasattr(model, "decode")


def is_told_the_time(model: object) -> bool:
    """Whether it is a model that works on latents at a time of the noise schedule: its forward takes one."""
    if not isinstance(model, ModelMixin) or not is_denoiser(model):
        return False
    return any("time" in name for name in inspect.signature(type(model).forward).parameters)


def class_count(pipe: DiffusionPipeline) -> int:
    """How many classes the denoiser knows; 0 where it knows none, or does not say."""
    for model in pipe.components.values():
        config: Any = getattr(model, "config", {}) if is_denoiser(model) else {}
        for name in _CLASSES:
            if config.get(name):
                return int(config[name])
    return 0


def denoiser_name(pipe: DiffusionPipeline, component: str | None = None) -> str:
    """The denoiser: `component` if given, else the pipeline's `unet` or `transformer`, else the first that is told the
    time.

    Raises:
        BitPolicyError: the pipeline has no such component, or it is no model that works on latents.
    """
    candidates = [component] if component else [*DENOISERS, *_told_the_time(pipe)]
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
    first = denoiser_name(pipe)
    return ",".join(dict.fromkeys([first, *(name for name in _own_denoisers(pipe) if name not in DENOISERS)]))


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


def _own_denoisers(pipe: DiffusionPipeline) -> list[str]:
    """Those that have a denoiser's usual name; where none has, all that are told the time, as those of unCLIP are."""
    named = [name for name in (*DENOISERS, *SECOND_DENOISERS) if isinstance(getattr(pipe, name, None), nn.Module)]
    return named or _told_the_time(pipe)


def _told_the_time(pipe: DiffusionPipeline) -> list[str]:
    return [name for name, model in pipe.components.items() if is_told_the_time(model)]


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
    names = dict.fromkeys([*studied, *_own_denoisers(pipe)])
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


def of_component(by_layer: Mapping[str, T], component: str, components: Sequence[str]) -> Mapping[str, T]:
    """The entries of one component's layers, by their names within it, looked up when they are asked for."""
    return by_layer if len(components) == 1 else _OfComponent(by_layer, f"{component}.")


class _OfComponent(Mapping[str, T]):
    def __init__(self, by_layer: Mapping[str, T], start: str) -> None:
        self._by_layer = by_layer
        self._names = {name.removeprefix(start): name for name in by_layer if name.startswith(start)}

    def __getitem__(self, name: str) -> T:
        return self._by_layer[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def denoisers_in(denoiser: nn.Module) -> list[nn.Module]:
    """The components that are studied, of what `denoiser_of` gives."""
    return list(denoiser.values()) if isinstance(denoiser, nn.ModuleDict) else [denoiser]
