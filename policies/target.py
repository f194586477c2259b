"""The target: the components of a pipeline that are under study, with their models, layers and hashes.

A single component's layers keep their own names. Of several components, the name of a layer begins with its
component's: `text_encoder.encoder.layers.0.mlp.fc1`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from torch import nn
from transformers import PreTrainedModel

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import PackedLayer, Quantizable, packed_layers, quantizable_layers
from bitpolicy.policies.components import ALL, DENOISERS, denoisers_of, lacks, runs_in_loop, unusual_denoisers
from bitpolicy.policies.identity import config_hash, weights_hash
from bitpolicy.policies.lazy import layer_prefix, within_component

T = TypeVar("T")
_NEVER_STUDIED = ("safety_checker",)  # it checks images and does not make them


class Target(Mapping[str, nn.Module]):
    """The components under study: name -> model, in the order in which they are recorded. Models may be on `meta`."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = dict(models)

    @classmethod
    def of(cls, pipe: DiffusionPipeline, components: Iterable[str]) -> Target:
        """The components of a pipeline with these names."""
        return cls({name: getattr(pipe, name) for name in components})

    @classmethod
    def chosen(cls, pipe: DiffusionPipeline, components: Sequence[str] | None = None) -> Target:
        """The components of a pipeline to study.

        Args:
            components: names, or only "all" for every component with layers to quantize; None means every denoiser.

        Raises:
            BitPolicyError: the pipeline has no such component, it cannot be quantized, or there is no denoiser at all.
        """
        if isinstance(pipe, ModularPipeline):
            raise BitPolicyError(
                f"{type(pipe).__name__} is a modular pipeline, whose blocks turn gradients off; search the model as a "
                "DiffusionPipeline, and load its packed components into the blocks with update_components"
            )
        if not components:
            return cls.of(pipe, _every_denoiser(pipe))
        if list(components) == [ALL]:
            return cls.of(pipe, (name for name in pipe.components if _has_layers(pipe, name)))
        for name in components:
            _require_component(pipe, name)
        return cls.of(pipe, components)

    def __getitem__(self, component: str) -> nn.Module:
        return self._models[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def names(self) -> list[str]:
        """The components' names."""
        return list(self._models)

    @property
    def models(self) -> list[nn.Module]:
        return list(self._models.values())

    @property
    def class_names(self) -> list[str]:
        """The class of each component's model, e.g. "UNet2DConditionModel"."""
        return [type(model).__name__ for model in self._models.values()]

    @property
    def in_words(self) -> str:
        """The target in a sentence: "denoiser", or "unet, text_encoder and vae"."""
        if not self.outside_loop:
            return "denoiser"
        *others, last = self.names
        return f"{', '.join(others)} and {last}" if others else last

    @property
    def in_loop(self) -> dict[str, nn.Module]:
        """The components that the sampling loop calls, by name."""
        return {name: model for name, model in self._models.items() if runs_in_loop(model)}

    @property
    def outside_loop(self) -> dict[str, nn.Module]:
        """The components that are called before or after the loop, by name."""
        return {name: model for name, model in self._models.items() if not runs_in_loop(model)}

    @property
    def layers(self) -> dict[str, Quantizable]:
        """Every quantizable layer, by name, in the models' own order; looked up at each access."""
        return dict(quantizable_layers(self))

    @property
    def packed_layers(self) -> dict[str, PackedLayer]:
        """Every layer that is already packed, by name; looked up at each access."""
        return dict(packed_layers(self))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter: the compute dtype of a loaded pipeline."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def prefix(self, component: str) -> str:
        """The prefix of a component's layer names in this target; empty if it is the only component."""
        return layer_prefix(component, self.names)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every module, each once, even one that several components share."""
        memo: set[nn.Module] = set()
        for component, model in self._models.items():
            start = self.prefix(component)
            yield from model.named_modules(memo, start.removesuffix("."))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter, each once."""
        seen: set[nn.Parameter] = set()
        for model in self.models:
            for parameter in model.parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of all components, by names with the same prefixes as layers."""
        states = {self.prefix(component): model.state_dict() for component, model in self._models.items()}
        return {f"{start}{name}": tensor for start, state in states.items() for name, tensor in state.items()}

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """`state_dict` as it is written: without the second names of tied weights in models of transformers, whose own
        `save_pretrained` leaves them out, and whose `from_pretrained` ties them again."""
        tied = {
            f"{self.prefix(component)}{name}"
            for component, model in self._models.items()
            if isinstance(model, PreTrainedModel)
            for name in model.all_tied_weights_keys
        }
        return {name: tensor for name, tensor in self.state_dict().items() if name not in tied}

    def of_component(self, by_layer: Mapping[str, T], component: str) -> Mapping[str, T]:
        """The entries of one component's layers, by their names within it, looked up lazily."""
        return within_component(by_layer, self.prefix(component))

    def weights_hashes(self, storage: torch.dtype) -> dict[str, str]:
        """Component -> hash of its tensors in the storage dtype."""
        return {name: weights_hash(model, storage) for name, model in self._models.items()}

    def config_hashes(self) -> dict[str, str]:
        """Component -> hash of its config."""
        return {name: config_hash(model) for name, model in self._models.items()}


def loop_denoisers(pipe: DiffusionPipeline, target: Target) -> list[nn.Module]:
    """Every model whose calls make up the loop: the pipeline's denoisers, studied or not, and other studied models.

    Raises:
        BitPolicyError: there is none.
    """
    names = dict.fromkeys([*target.in_loop, *denoisers_of(pipe)])
    if not names:
        raise lacks(pipe, f"component named {' or '.join(DENOISERS)}")
    return [getattr(pipe, name) for name in names]


def _every_denoiser(pipe: DiffusionPipeline) -> Iterable[str]:
    """`unet` or `transformer`, otherwise the first of the models that denoise; and the pipeline's other denoisers."""
    candidates = [*DENOISERS, *unusual_denoisers(pipe)]
    first = next((name for name in candidates if runs_in_loop(getattr(pipe, name, None))), None)
    if first is None:
        raise lacks(pipe, f"component named {' or '.join(DENOISERS)}")
    return dict.fromkeys([first, *(name for name in denoisers_of(pipe) if name not in DENOISERS)])


def _require_component(pipe: DiffusionPipeline, name: str) -> None:
    model = getattr(pipe, name, None)
    if not isinstance(model, nn.Module):
        raise lacks(pipe, f"component {name!r}")
    if name in _NEVER_STUDIED:
        raise BitPolicyError(
            f"the {name} of {type(pipe).__name__} does not change the image; leave it out of --component"
        )
    if not isinstance(model, ModelMixin | PreTrainedModel):
        raise BitPolicyError(
            f"the {name} of {type(pipe).__name__} is a {type(model).__name__}, which neither diffusers nor "
            "transformers can save and load; leave it out of --component"
        )


def _has_layers(pipe: DiffusionPipeline, name: str) -> bool:
    model = getattr(pipe, name, None)
    if not isinstance(model, ModelMixin | PreTrainedModel) or name in _NEVER_STUDIED:
        return False
    return any(packed_layers(model)) or any(quantizable_layers(model))
