"""The quantization method "bitpolicy" for diffusers, with which `from_pretrained` loads packed checkpoints.

The model is built on `meta`, its layers are replaced with packed ones, and the stored tensors are read into them, so a
full-precision copy never exists. Without a dtype, the storage dtype is kept; with one, packed tensors stay as they are
stored and everything else is cast. A full-precision model with a policy is packed while it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.checkpoints.manifest import verify
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.loading.packed_model import (
    count_packed_weights,
    expected_tensors,
    finish,
    make_shells,
    packed_names,
    refuse_disk,
    to_save,
    unpack_model,
)
from bitpolicy.policies.loading.packed_while_read import PackedWhileRead
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.storage.stored_tensors import reader, require_checksums, require_stored, stored_tensors


class BitPolicyQuantizer(DiffusersQuantizer):
    """Loads, packs, saves and dequantizes models for diffusers."""

    use_keep_in_fp32_modules = True
    quantization_config: BitPolicyConfig
    _given: tuple[Policy, Path | None] | None = None
    _reading: PackedWhileRead | None = None
    _files: Sequence[str | Path] = ()
    _compute: torch.dtype = torch.float16
    _kept_in_float32: Sequence[str] = ()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        self.quantization_config.require_use(self.pre_quantized)
        refuse_disk(device_map)
        if not self.pre_quantized and self._given is None:
            self._given = self.quantization_config.opened_policy()

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        stored = self._given[0].storage_dtype if self._given else self.quantization_config.storage_dtype
        self._compute = getattr(torch, stored) if torch_dtype is None else torch_dtype
        return self._compute

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str | Path]) -> list[str]:
        self._files = checkpoint_files
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        if not self._files:
            raise BitPolicyError(
                "diffusers does not say which file it reads, so the file cannot be checked; "
                "load the folder with from_pretrained instead of the file with from_single_file"
            )
        self._kept_in_float32 = tuple(keep_in_fp32_modules)
        if self._given is not None:
            self._expect_full(model, *self._given)
        else:
            self._expect_packed(model)

    def _expect_packed(self, model: Any) -> None:
        config = self.quantization_config
        make_shells(model, config)
        verify(Path(self._files[0]).parent.parent)
        stored = stored_tensors(self._files)
        require_stored(stored, expected_tensors(model), packed_names(model), config.storage)
        require_checksums(stored, config.checksums)
        config.checksums = ""  # they belong to this file, not to the model, which may change

    def check_quantized_param_shape(self, param_name: str, current: torch.Tensor, loaded: torch.Tensor) -> None:
        raise BitPolicyError(
            f"{param_name} has shape {tuple(loaded.shape)}, but the config says {tuple(current.shape)}; "
            "the checkpoint is damaged: download or export it again"
        )

    def _expect_full(self, model: Any, policy: Policy, path: Path | None) -> None:
        stored = stored_tensors(self._files)
        places = {name: name for name in stored}
        model._fix_state_dict_keys_on_load(places)  # new name -> name in the file
        lost = model.state_dict().keys() - places.keys()
        if lost:
            raise BitPolicyError(f"the files of this {type(model).__name__} lack {min(lost)}; download them again")
        with reader() as read:
            self._reading = PackedWhileRead(policy, path, model, lambda name: read(stored[places[name]]))

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        return self._reading is not None or self.quantization_config.packs(param_name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        tensor = state_dict[param_name]  # not the cast copy
        if self._reading is None:
            set_module_tensor_to_device(model, param_name, target_device, value=tensor)
            return
        for name, kept in self._reading.take(param_name, tensor.to(target_device)).items():
            if kept.is_floating_point() and not self._reading.config.packs(name):
                kept = kept.to(param_value.dtype)
            # Without `dtype` it would be cast to that of the empty model, in which no module is kept in float32.
            set_module_tensor_to_device(model, name, target_device, value=kept, dtype=kept.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._reading is not None:
            self._reading.require_all_taken()
            self.quantization_config, self.pre_quantized = self._reading.config, True
        self._given = self._reading = None
        self._files = ()
        count_packed_weights(ModelMixin)
        finish(model, self._compute_dtype, Compute(self.quantization_config.compute))
        model.config["quantization_config"] = self.quantization_config
        model.is_quantized = False  # or diffusers would refuse .to(dtype), which packed layers support
        return model

    def _compute_dtype(self, layer: str) -> torch.dtype:
        kept = any(part in self._kept_in_float32 for part in layer.split("."))
        return torch.float32 if kept else self._compute

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        if not safe_serialization:
            raise BitPolicyError("a packed model is saved as safetensors only; remove safe_serialization=False")
        config = self.quantization_config
        return to_save(state_dict, set(filter(config.packs, state_dict)), config.storage), {}

    def _dequantize(self, model: Any) -> nn.Module:
        unpack_model(model)
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
