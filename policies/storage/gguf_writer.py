"""Write a GGUF file one tensor at a time.

The package `gguf` writes the header: metadata, and the name, shape, type and place of each tensor. Each tensor is then
written to its place when it is ready, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.tensor_writer import TensorWriter

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


class GgufWriter(TensorWriter):
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

        header: Any = gguf.GGUFWriter(path, architecture)
        header.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in sorted(metadata.items()):
            header.add_string(key, value)
        end, starts = 0, {}
        for name, spec in specs.items():
            kind = gguf.GGMLQuantizationType[types.get(name) or _TYPES[spec.dtype]]
            stored: Any = np.uint8 if name in types else np.float32  # only bytes are turned into numbers of weights
            header.add_tensor_info(name, spec.shape, np.dtype(stored), spec.nbytes, raw_dtype=kind)
            starts[name] = end
            end += header.ggml_pad(spec.nbytes, _ALIGNMENT)
        header.write_header_to_file()
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
        header.close()
        data = header.ggml_pad(path.stat().st_size, _ALIGNMENT)
        file = path.open("r+b")
        file.truncate(data + end)
        super().__init__(specs, {name: data + start for name, start in starts.items()}, file)
