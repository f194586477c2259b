"""Write a GGUF file one tensor at a time.

The package `gguf` writes the header: metadata, and the name, shape, type and place of each tensor. Each tensor is then
written to its place when it is ready, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.identity import tensor_bytes

_ALIGNMENT = 32  # bytes; GGUF's default
_TYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


class GgufWriter:
    """A file of the tensors in `specs`, each written once by `write`, in any order.

    Args:
        types: names of quantized tensors -> their GGML type, such as "Q4_0". Their specs are bytes, shape (out, bytes
            of a row).
        architecture: the value of `general.architecture`.
        metadata: more entries, as text.

    Raises:
        ValueError: on closing, if a tensor was not written; on writing, if a tensor does not match its spec.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        types: Mapping[str, str],
        architecture: str,
        metadata: Mapping[str, str],
    ) -> None:
        import gguf

        self._specs = dict(specs)
        header: Any = gguf.GGUFWriter(path, architecture)
        header.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in sorted(metadata.items()):
            header.add_string(key, value)
        end, self._starts = 0, {}
        for name, spec in self._specs.items():
            kind = gguf.GGMLQuantizationType[types.get(name) or _TYPES[spec.dtype]]
            stored: Any = np.uint8 if name in types else np.float32  # only bytes are turned into numbers of weights
            header.add_tensor_info(name, spec.shape, np.dtype(stored), spec.nbytes, raw_dtype=kind)
            self._starts[name] = end
            end += header.ggml_pad(spec.nbytes, _ALIGNMENT)
        header.write_header_to_file()
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
        header.close()
        self._file = path.open("r+b")
        self._data = header.ggml_pad(path.stat().st_size, _ALIGNMENT)
        self._file.truncate(self._data + end)
        self._missing = set(self._specs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, needed {spec.dtype} {spec.shape}")
        self._file.seek(self._data + self._starts[name])
        self._file.write(tensor_bytes(tensor))
        self._missing.discard(name)

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, e.g. {min(self._missing)}")
