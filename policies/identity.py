"""The identity of a model: a hash of its weights, and one of its config.

The config changes images as well (an epsilon, a schedule). Only entries that differ from the defaults of its class are
hashed, so a release that adds an entry with a default does not change the hash. Entries that only record a file's
history are left out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bitpolicy.kernels.formats.format import TensorSpec

_HISTORY = ("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config")


def weights_hash(model: nn.Module, storage_dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and values of all tensors in the storage dtype: the identity of a model."""
    return tensors_hash(sorted(model.state_dict().items()), storage_dtype)


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]], storage_dtype: torch.dtype) -> str:
    """The same hash of (name, tensor) pairs, sorted by name; only one tensor is held at a time."""
    return tensors_digest((name, tensor.to(TensorSpec.stored(tensor, storage_dtype).dtype)) for name, tensor in tensors)


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]], dtypes: bool = True) -> str:
    """SHA-256 over names, dtypes, shapes and values of (name, tensor) pairs, in the given order.

    Args:
        dtypes: whether dtypes are hashed.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tensor.dtype if dtypes else ''}{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(data: memoryview) -> str:
    """CRC-32 of a tensor's raw bytes, 8 hex digits."""
    return f"{zlib.crc32(data):08x}"


def config_hash(component: Any) -> str:
    """SHA-256 over `configured(component)`."""
    return _of_json(configured(component))


def configured(component: Any) -> dict[str, Any]:
    """The config of a model, scheduler or tokenizer, without the defaults of its class."""
    said: dict[str, Any] = {}
    if isinstance(component, PreTrainedModel):
        said = _differing(component.config.to_dict(), _defaults_of_config(component.config))
    elif isinstance(component, ConfigMixin):
        # DeepFloyd's watermarker has no config, though its class says so
        said = _differing(getattr(component, "config", {}), _defaults_of_class(type(component)))
    elif isinstance(component, PreTrainedTokenizerBase):
        said = {"longest": component.model_max_length, "special": component.special_tokens_map}
        said["vocabulary"] = _of_json(component.get_vocab())
    kept = {name: value for name, value in said.items() if name not in _HISTORY and not name.startswith("_")}
    return {"class": type(component).__name__, **kept}


def _differing(said: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in said.items() if name not in defaults or _as_json(v) != _as_json(defaults[name])}


def _defaults_of_class(kind: type[Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}


def _defaults_of_config(config: PreTrainedConfig) -> dict[str, Any]:
    try:
        return type(config)().to_dict()
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):  # it has required arguments
        return {}


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _of_json(value: Any) -> str:
    return hashlib.sha256(_as_json(value).encode()).hexdigest()
