"""The quantization method "bitpolicy" for transformers: text encoders are packed like diffusers models.

It works as for diffusers, through other hooks. Three things differ. Tied weights are stored once. transformers gives
tensors that a file lacks random values and reports errors in a conversion as text, so files are checked beforehand and
errors are kept. And it casts a tensor before it passes it on, to float32 in modules that are kept in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.checkpoints.manifest import verify
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.loading.packed_model import (
    count_packed_weights,
    expected_tensors,
    finish,
    make_shells,
    packed_layers,
    packed_names,
    refuse_disk,
    to_save,
    unpack_model,
)
from bitpolicy.policies.loading.packed_while_read import PackedWhileRead
from bitpolicy.policies.loading.transformers_files import places
from bitpolicy.policies.storage.stored_tensors import (
    StoredTensor,
    reader,
    require_checksums,
    require_stored,
    stored_tensors,
)


class BitPolicyTransformersQuantizer(HfQuantizer):
    """Loads, packs, saves and dequantizes models for transformers."""

    quantization_config: BitPolicyConfig
    _reading: PackedWhileRead | None = None
    _failure: BitPolicyError | None = None
    _compute: torch.dtype = torch.float16
    _plan: Mapping[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        self.quantization_config.require_use(self.pre_quantized)
        refuse_disk(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._compute = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str | Path] | None = None, **kwargs: Any
    ) -> None:
        self._plan = model._get_dtype_plan(self._compute)
        with torch.device("cpu"):  # transformers creates everything on meta here
            stored = stored_tensors(checkpoint_files or ())
            if self.pre_quantized:
                for path in list(checkpoint_files or ())[:1]:
                    verify(Path(path).parent.parent)
                self._expect_packed(model, stored)
            else:
                self._expect_full(model, stored)

    def _expect_packed(self, model: Any, stored: Mapping[str, StoredTensor]) -> None:
        config = self.quantization_config
        make_shells(model, config)
        require_stored(stored, expected_tensors(model, _tied(model)), packed_names(model), config.storage)
        require_checksums(stored, config.checksums)
        config.checksums = ""  # they belong to this file, not to the model, which may change
        for _, layer in packed_layers(model):
            vars(layer)["_is_hf_initialized"] = True  # or transformers would initialize a weight for it

    def _expect_full(self, model: Any, stored: Mapping[str, StoredTensor]) -> None:
        policy, path = self.quantization_config.opened_policy()
        found = places(model, stored)
        with reader() as read:
            self._reading = PackedWhileRead(policy, path, model, lambda name: read(stored[found[name]]))
        self._kept_before = model._keep_in_fp32_modules_strict
        model._keep_in_fp32_modules_strict = {"."}  # matches every tensor, so each arrives as exact as in the file

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._reading is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def taken(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors to keep after one was read, in their compute dtypes. Errors are kept until the end."""
        assert self._reading is not None
        try:
            found = self._reading.take(name, tensor)
        except BitPolicyError as error:
            self._failure = self._failure or error
            return {}
        packs = self._reading.config.packs
        return {n: t if packs(n) or not t.is_floating_point() else t.to(self._dtype_of(n)) for n, t in found.items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._reading is not None:
            model._keep_in_fp32_modules_strict = self._kept_before
            if self._failure is not None:
                raise self._failure
            self._reading.require_all_taken()
            self.quantization_config, self.pre_quantized = self._reading.config, True
            model._weight_conversions = []  # saved tensors keep the names that the config uses
        self._reading = None
        for _, layer in packed_layers(model):
            _restore_dtypes(layer)
        count_packed_weights(PreTrainedModel)
        finish(model, self._dtype_of, Compute(self.quantization_config.compute))
        model.config.quantization_config = self.quantization_config
        model.is_quantized = False  # or transformers would refuse .half(), which packed layers support
        return model

    def _dtype_of(self, name: str) -> torch.dtype:
        """The compute dtype of a tensor or a layer with this name."""
        return next((dtype for pattern, dtype in self._plan.items() if re.search(pattern, name)), self._compute)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves only the adapter
        return to_save(model.state_dict(), packed_names(model), self.quantization_config.storage), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_model(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Pack(ConversionOps):
    """Passes each tensor to the quantizer as transformers reads it."""

    def __init__(self, quantizer: BitPolicyTransformersQuantizer) -> None:
        self._quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            kept |= self._quantizer.taken(name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return kept


def _tied(model: Any) -> Mapping[str, str]:
    """Name of a tied tensor -> name of the tensor that it is tied to, which alone is stored."""
    return model.all_tied_weights_keys


def _restore_dtypes(layer: Any) -> None:
    """Cast scales back to their stored dtype in modules that are kept in float32, which holds them exactly."""
    specs = layer.format.tensors(layer.weight_shape, torch.float16)
    for suffix, tensor in layer.packed_tensors().items():
        if tensor.dtype == torch.float32:
            layer._buffers[suffix] = tensor.to(specs[suffix].dtype)
