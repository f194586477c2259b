"""What an export writes: the target, with the sources of its tensors, and the other components.

`MemoryParts` is a pipeline in memory, `bitpolicy.policies.checkpoints.folder_parts` one in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.apply import as_stored
from bitpolicy.policies.checkpoints.checkpoint import rewrite_json, write_config
from bitpolicy.policies.footprint import stored_others
from bitpolicy.policies.storage.source import ModuleSource, TensorSource
from bitpolicy.policies.target import Target


class Parts(Protocol):
    """A pipeline to export.

    Attributes:
        target: the components to pack; they may be on `meta`.
        sources: component -> its tensors.
    """

    target: Target
    sources: Mapping[str, TensorSource]

    def others(self, dtype: torch.dtype) -> dict[str, int]:
        """Component name -> tensor bytes of every other model, with its floats stored in `dtype`."""

    def to_write(self, dtype: torch.dtype, folder: Path) -> int:
        """How many of these bytes need free space when they are written to `folder`."""

    def write_others(self, dtype: torch.dtype, folder: Path) -> None:
        """Write model_index.json and all components that are not packed.

        Raises:
            BitPolicyError: a value is beyond the range of `dtype`.
        """


class MemoryParts:
    """A pipeline in memory.

    Attributes:
        target: its models may be on `meta` if `sources` are given.

    Raises:
        BitPolicyError: one of its models has an adapter.
    """

    def __init__(
        self, pipe: DiffusionPipeline, components: Sequence[str], sources: Mapping[str, TensorSource] | None = None
    ) -> None:
        require_no_adapter(pipe)
        self._pipe = pipe
        self.target = Target.of(pipe, components)
        self.sources = sources or {name: ModuleSource(model) for name, model in self.target.items()}

    def others(self, dtype: torch.dtype) -> dict[str, int]:
        return stored_others(self._pipe, self.target, dtype)

    def to_write(self, dtype: torch.dtype, folder: Path) -> int:
        return sum(self.others(dtype).values())

    def write_others(self, dtype: torch.dtype, folder: Path) -> None:
        self._pipe.save_config(folder)
        rewrite_json(folder / "model_index.json")
        for name, other in self._pipe.components.items():
            if name not in self.sources and hasattr(other, "save_pretrained"):
                _forget_last_call(other)
                _require_range(name, other, dtype)
                with _stored_as(other, dtype):
                    other.save_pretrained(str(folder / name))
                if isinstance(other, ModelMixin) and isinstance(other, ConfigMixin):
                    write_config(other, {}, dtype, folder / name)


def require_no_adapter(pipe: DiffusionPipeline) -> None:
    """Refuse models with a LoRA: their layers have other names, and `save_pretrained` of transformers writes only the
    adapter.

    Raises:
        BitPolicyError: there is such a model.
    """
    for name, model in pipe.components.items():
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        if adapted := next((path for path, module in modules if hasattr(module, "base_layer")), None):
            raise BitPolicyError(
                f"the {name} has an adapter (a LoRA) on it, e.g. on {adapted}; remove it with "
                "pipe.unload_lora_weights(), or call pipe.fuse_lora() before that to merge it into the weights"
            )


def _forget_last_call(component: Any) -> None:
    """Turn off the padding and truncation of a fast tokenizer's last call, which would be saved with it."""
    backend = getattr(component, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


def _require_range(name: str, component: Any, dtype: torch.dtype) -> None:
    """Refuse a component with a value that the dtype it is stored in cannot hold.

    Raises:
        BitPolicyError: there is such a value.
    """
    if isinstance(component, nn.Module):
        for key, tensor in component.state_dict().items():
            as_stored(f"{name}: {key}", tensor, dtype)


@contextmanager
def _stored_as(component: Any, dtype: torch.dtype) -> Iterator[None]:
    """Cast a component to the dtype that it is stored in while the block runs."""
    if not isinstance(component, nn.Module):
        yield
        return
    parameters = [(parameter, parameter.data) for parameter in component.parameters()]
    buffers = [(module, name, buffer) for module in component.modules() for name, buffer in module._buffers.items()]
    nn.Module.to(component, dtype)  # diffusers' own warns of modules kept in float32 even if there are none
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
