"""Write safetensors one tensor at a time.

`safetensors.torch.save_file` wants every tensor at once. Here the header is made from the specs, which are known before
anything is quantized, and each tensor goes to its place when it is ready, so memory does not grow with the model.
Tensors are ordered by falling item size (which keeps them aligned), then by name, metadata sorted: same input, same
bytes.
Format: an 8-byte little-endian header length, a JSON header padded with spaces to 8 bytes, the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from bitpolicy.kernels.format import TensorSpec
from bitpolicy.policies.accounting import tensor_bytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}


class SafetensorsWriter:
    """A file of the tensors in `specs`, each written once by `write`, in any order.

    Args:
        metadata: of the header, beside `format: pt`; its keys are sorted.

    Raises:
        ValueError: on closing, if a tensor was not written; on writing, if it is not as its spec says.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self._specs = dict(sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
        end = 0
        self._starts = {}
        for name, spec in self._specs.items():
            self._starts[name] = end
            end += spec.nbytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = self._file.tell()
        self._missing = set(self._specs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, announced {spec.dtype} {spec.shape}")
        self._file.seek(self._data + self._starts[name])
        self._file.write(tensor_bytes(tensor))
        self._missing.discard(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, e.g. {min(self._missing)}")
