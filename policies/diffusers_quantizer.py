"""Teach diffusers the quantization method "bitpolicy", so that `from_pretrained` loads packed checkpoints.

The model is built on `meta`, its layers are replaced by packed ones, and the stored tensors are read into them: no
full-precision copy exists at any time. Without a dtype the storage dtype is kept; with one, packed tensors stay as they
are stored and everything else is cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import from_parameters
from bitpolicy.kernels.layers import PackedLayer, pack_layer, quantizable_layers, replace_layer, unpack_layer
from bitpolicy.policies.policy import Choice

METHOD = "bitpolicy"
FORMAT_VERSION = 1


class _Method(StrEnum):  # diffusers reads `.value` of it
    BITPOLICY = METHOD


class BitPolicyConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint.

    Attributes:
        layers: layer name -> format name, for the packed layers only.
        formats: format name -> its parameters, as the policy file records them.
        storage_dtype: "float16" or "bfloat16", of everything that is not packed.
    """

    def __init__(
        self,
        layers: Mapping[str, str] | None = None,
        formats: Mapping[str, Mapping[str, Any]] | None = None,
        storage_dtype: str = "float16",
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise BitPolicyError(
                f"the checkpoint has format_version {format_version}, this bitpolicy reads {FORMAT_VERSION}; "
                "install a newer one"
            )
        self.quant_method = _Method.BITPOLICY
        self.layers = dict(layers or {})
        self.formats = {name: dict(parameters) for name, parameters in (formats or {}).items()}
        self.storage_dtype = storage_dtype
        self.format_version = format_version

    @classmethod
    def of(cls, choices: Mapping[str, Choice], storage: torch.dtype) -> BitPolicyConfig:
        packed = {name: choice.format for name, choice in choices.items() if choice.format.packed}
        return cls(
            layers={name: format.name for name, format in packed.items()},
            formats={format.name: format.parameters() for format in packed.values()},
            storage_dtype=str(storage).removeprefix("torch."),
        )

    def format_of(self, layer: str) -> Format:
        name = self.layers[layer]
        return from_parameters(name, self.formats.get(name, {}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "storage_dtype": self.storage_dtype,
            "formats": self.formats,
            "layers": self.layers,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class BitPolicyQuantizer(DiffusersQuantizer):
    """Loads, saves and dequantizes packed models for diffusers."""

    use_keep_in_fp32_modules = True
    quantization_config: BitPolicyConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise BitPolicyError(
                "this model is not packed; make a checkpoint with search-policy or `bitpolicy export` and load that"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return getattr(torch, self.quantization_config.storage_dtype) if torch_dtype is None else torch_dtype

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        layer, _, _suffix = param_name.rpartition(".")
        return layer in self.quantization_config.layers and not param_name.endswith(".bias")

    def check_quantized_param_shape(self, param_name: str, current: torch.Tensor, loaded: torch.Tensor) -> None:
        raise BitPolicyError(
            f"{param_name} has shape {tuple(loaded.shape)}, the config says {tuple(current.shape)}; "
            "the checkpoint is damaged"
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Any,
        param_name: str,
        target_device: Any,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        set_module_tensor_to_device(model, param_name, target_device, value=state_dict[param_name])  # not the cast copy

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = dict(quantizable_layers(model))
        storage = getattr(torch, self.quantization_config.storage_dtype)
        for name in self.quantization_config.layers:
            if name not in layers:
                raise BitPolicyError(f"the checkpoint packs layer {name!r}, which {type(model).__name__} does not have")
            format = self.quantization_config.format_of(name)
            specs = format.tensors(layers[name].weight.shape, storage)
            empty = {suffix: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for suffix, spec in specs.items()}
            replace_layer(model, name, pack_layer(layers[name], format, empty))
        model.config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        lost = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
        if lost:
            raise BitPolicyError(
                f"the checkpoint lacks {len(lost)} tensors, e.g. {lost[0]}; download or export it again"
            )
        for module in model.modules():
            if isinstance(module, PackedLayer):
                module.compute_dtype = model.dtype
        model.is_quantized = False  # packed layers survive .to(dtype): lifts diffusers' refusal of it
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        if any(".base_layer." in name for name in state_dict):
            raise BitPolicyError("the model has an adapter on it; unload it (or fuse and unload it) before saving")
        return state_dict, {}

    def _dequantize(self, model: Any) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLayer):
                replace_layer(model, name, unpack_layer(module))
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(config)  # or it would be saved as packed
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make diffusers know the method. Importing bitpolicy does it."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = BitPolicyQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BitPolicyConfig
