"""Write a safetensors file one tensor at a time.

`safetensors.torch.save_file` needs every tensor at once. Here the header is made from the specs, which are known before
anything is quantized, and each tensor is written to its place when it is ready. So memory does not grow with the model.
Tensors are ordered as in safetensors' own writer, by dtype, then by name, and the metadata is sorted, so both writers
give the same bytes for the same tensors.
Format: an 8-byte little-endian header length, a JSON header padded with spaces to 8 bytes, the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.identity import checksum
from bitpolicy.policies.storage.tensor_writer import TensorWriter

DTYPE_NAMES = {  # in the order of safetensors' own writer, which keeps each tensor aligned
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}


class SafetensorsWriter(TensorWriter):
    """A file of the tensors in `specs`, each written once by `write`, in any order.

    Args:
        metadata: entries for the header in addition to `format: pt`; keys are sorted.

    Attributes:
        checksums: name -> CRC-32 of what was written, 8 hex digits.

    Raises:
        ValueError: on closing, if a tensor was not written; on writing, if a tensor does not match its spec.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        ordered = dict(sorted(specs.items(), key=lambda item: (_PLACES[item[1].dtype], item[0])))
        header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
        end, starts = 0, {}
        for name, spec in ordered.items():
            starts[name] = end
            end += spec.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        data = file.tell()
        super().__init__(ordered, {name: data + start for name, start in starts.items()}, file)
        self.checksums: dict[str, str] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.checksums[name] = checksum(self._written(name, tensor))
