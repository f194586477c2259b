"""The table of kernels (device x format x layer), and the choice of one kernel for each call.

`TABLE` is ordered. Among the kernels that have the requested compute mode and accept the call, the fastest is used. A
micro-probe times them on the call's own input and stores the result on disk (`bitpolicy.kernels.micro_probe`). The
first kernel is used without timing while a CUDA graph is being captured, and wherever that kernel is `settled`.

    BITPOLICY_KERNELS=auto         as described above
    BITPOLICY_KERNELS=reference    plain torch code everywhere
    BITPOLICY_KERNELS=NAME         this kernel wherever it accepts the call, plain torch code elsewhere
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from weakref import ref

import torch

from bitpolicy.kernels import micro_probe
from bitpolicy.kernels.compute import block_scaled
from bitpolicy.kernels.compute import fp8 as fp8_compute
from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.reference import Fp8Reference, Int8Reference, Mxfp8Reference, Nvfp4Reference, Reference
from bitpolicy.kernels.cpu.blocks import CpuBlocks
from bitpolicy.kernels.cpu.exact import CpuDequantize
from bitpolicy.kernels.cpu.float import CpuFloat
from bitpolicy.kernels.cpu.int8 import CpuInt8
from bitpolicy.kernels.cpu.onednn import OneDnnInt8
from bitpolicy.kernels.cpu.scratch import release_scratch
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared
from bitpolicy.kernels.triton.kernels import TritonDequantize, TritonFloat, TritonFp8, TritonInt8

_EVERY = "linear conv1d conv2d conv3d"
AUTO, REFERENCE = "auto", "reference"


@dataclass(frozen=True)
class Row:
    """A kernel and the calls that it serves.

    Attributes:
        device: "cpu", "cuda" or "any".
        layers: names separated by spaces.
        formats: patterns of format names, separated by spaces.
    """

    device: str
    layers: str
    formats: str
    kernel: Kernel

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        """Why this kernel does not accept the call, or None."""
        if self.device not in ("any", x.device.type):
            return f"for {self.device}"
        if weight.layer not in self.layers.split():
            return f"for {self.layers.replace(' ', ', ')}"
        if not any(fnmatchcase(weight.format.name, pattern) for pattern in self.formats.split()):
            return f"for {self.formats.replace(' ', ', ')}"
        return self.kernel.refuses(x, weight)


TABLE: tuple[Row, ...] = (
    Row("cpu", "linear", "int4* int8* nf4", CpuFloat()),
    Row("cpu", _EVERY, "*", CpuBlocks()),
    Row("cpu", _EVERY, "*", CpuDequantize()),
    Row("cpu", _EVERY, "*", CpuInt8()),
    Row("cpu", _EVERY, "*", OneDnnInt8()),
    Row("cuda", _EVERY, "*", TritonInt8()),
    Row("cuda", _EVERY, "fp8", TritonFp8()),
    Row("cuda", _EVERY, "int4* int8", TritonFloat()),
    Row("cuda", _EVERY, "int4* int8*", TritonDequantize()),
    Row("any", _EVERY, "*", Reference()),
    Row("any", _EVERY, "*", Int8Reference()),
    Row("any", _EVERY, "fp8 fp8-tensor", Fp8Reference()),
    Row("any", _EVERY, "mxfp8 mxfp4", Mxfp8Reference()),
    Row("any", _EVERY, "nvfp4", Nvfp4Reference()),
)

ROUNDED: Mapping[Compute, tuple[Format, ...]] = {Compute.FP8: fp8_compute.FORMATS, **block_scaled.FORMATS}
"""The compute modes that round the inputs of layers in certain formats only, and these formats."""


def kernels(compute: Compute) -> list[Row]:
    """The rows whose kernels may serve this compute mode: its own kernels, and for FLOAT also the exact ones."""
    allowed = {compute, Compute.EXACT} if compute is Compute.FLOAT else {compute}
    return [row for row in TABLE if row.kernel.compute in allowed]


def effective(compute: Compute, weight: PackedWeight) -> Compute:
    """The compute mode of one layer in a model set to `compute`. Layers unsuited to 8-bit inputs do not round them."""
    if compute is Compute.INT8 and not int8_compute.suits(weight):
        return Compute.EXACT
    if compute is Compute.FP8 and not fp8_compute.suits(weight):
        return Compute.FLOAT
    if compute in block_scaled.FORMATS and not block_scaled.suits(weight, compute):
        return Compute.FLOAT
    return compute


_VARIABLE = "BITPOLICY_KERNELS"
# Read CPython's own dict: looking up a missing variable in `os.environ` takes as long as multiplying a small layer.
_environment: Mapping[Any, Any] | None = getattr(os.environ, "_data", None)
_variable = os.environ.encodekey(_VARIABLE)
_forced: list[str] = []
_chosen: dict[tuple[object, ...], Kernel] = {}


def mode() -> str:
    """The requested kernel mode: from the innermost `use_kernels`, otherwise from the environment.

    Raises:
        BitPolicyError: there is no kernel of that name.
    """
    if _forced:
        return _forced[-1]
    if _environment is not None and _variable not in _environment:
        return AUTO
    return _known(os.environ.get(_VARIABLE) or AUTO)


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Inside the block, packed layers multiply with "auto", "reference" or the named kernel, whatever the environment
    says.

    Raises:
        BitPolicyError: there is no kernel of that name.
    """
    _forced.append(_known(name))
    try:
        yield
    finally:
        _forced.pop()


def _known(name: str) -> str:
    if name == AUTO:
        return name
    names = [AUTO, REFERENCE, *(row.kernel.name for row in TABLE)]
    if name not in names:
        raise BitPolicyError(f"unknown kernel {name!r}; write any of {', '.join(dict.fromkeys(names))}")
    return name


def choose(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute) -> Kernel:
    """The kernel for one call.

    Args:
        compute: what this layer may round.

    Raises:
        BitPolicyError: no kernel on this device has that compute mode.
    """
    asked = mode()
    threads = torch.get_num_threads()
    key = (asked, id(compute), x.device, x.dtype, x.shape, _order(x), bias is None, weight.kind, threads)
    found = _chosen.get(key)
    if found is None:
        with torch.cuda.device_of(x):  # kernels are timed on the current device
            found, lasting = _decide(asked, x, weight, bias, compute)
        if lasting:
            _chosen[key] = found
    return found


def _decide(
    asked: str, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute
) -> tuple[Kernel, bool]:
    """The kernel, and whether the choice can be cached."""
    able = takers(x, weight, compute)
    if not able:
        raise BitPolicyError(f"no kernel supports compute {compute} on {x.device.type}; choose another compute")
    fallback = able[-1]  # the references end the table
    if asked == REFERENCE:
        return fallback, True
    if asked != AUTO:
        return next((kernel for kernel in able if kernel.name == asked), fallback), True
    settled = next((place for place, kernel in enumerate(able) if kernel.settled), len(able) - 1)
    worth = able[: settled + 1]  # the kernels below it are slower
    if len(worth) == 1 or x.numel() == 0:
        return able[0], True
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return able[0], False
    tried = {kernel.name: partial(run, kernel, x, weight, bias) for kernel in worth}
    thrifty = [kernel.name for kernel in worth if kernel.thrifty]
    with torch.no_grad():
        best = micro_probe.fastest(_described(x, weight, bias, compute), tried, compute, tried[worth[-1].name], thrifty)
    release_scratch()  # the hungriest candidate set its size
    return next((kernel for kernel in able if kernel.name == best), fallback), True


def takers(x: torch.Tensor, weight: PackedWeight, compute: Compute) -> list[Kernel]:
    """The kernels of this compute mode that accept the call, in the order of the table."""
    return [row.kernel for row, refusal in explained(x, weight, compute) if refusal is None]


def run(kernel: Kernel, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The product by this kernel, with the layouts that it prepared from the weight."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device_of(x):
            return kernel(x, weight, bias, prepared(kernel, weight, x.dtype))
    return kernel(x, weight, bias, prepared(kernel, weight, x.dtype))


def scratch_kept(weight: PackedWeight, dtype: torch.dtype) -> int:
    """The most bytes that stay reserved after such a weight is multiplied exactly with an input of this dtype."""
    x = torch.empty(0, dtype=dtype, device=next(iter(weight.tensors.values())).device)
    return max(kernel.scratch(weight, dtype) for kernel in takers(x, weight, Compute.EXACT)) if mode() == AUTO else 0


_NOTHING: Prepared = {}

_Made = dict[tuple[str, torch.dtype], tuple[list[int], Prepared]]


class _Layouts:
    """(Kernel, dtype) -> versions of the stored tensors and what was prepared from them, while the first one lives.

    Does what torch's WeakIdKeyDictionary does in a quarter of the time.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[ref[torch.Tensor], _Made]] = {}

    def of(self, stored: torch.Tensor) -> _Made:
        found = self._found.get(id(stored))
        if found is None or found[0]() is not stored:
            key, drop = id(stored), self._found.pop
            found = self._found[key] = ref(stored, lambda _: drop(key, None)), {}
        return found[1]

    def made(self, stored: torch.Tensor) -> _Made:
        """Like `of`, but read-only: it adds no entry for a weight without layouts."""
        found = self._found.get(id(stored))
        return found[1] if found is not None and found[0]() is stored else {}

    def __len__(self) -> int:
        return len(self._found)


_layouts = _Layouts()


def prepared(kernel: Kernel, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
    """The layouts that a kernel makes of the weight once, and again after the stored tensors are replaced or edited."""
    if type(kernel).prepare is Kernel.prepare:
        return _NOTHING
    if weight.low_memory:
        return kernel.prepare(weight, dtype)
    stored = list(weight.tensors.values())
    held = _layouts.of(stored[0])
    versions = [tensor._version for tensor in stored]
    found = held.get((kernel.name, dtype))
    if found is None or found[0] != versions:
        own = {id(tensor) for tensor in stored}
        made = kernel.prepare(weight, dtype)  # keeping a stored tensor itself would keep it alive forever
        found = versions, {name: t.detach() if id(t) in own else t for name, t in made.items()}
        held[kernel.name, dtype] = found
    return found[1]


def prepared_bytes(stored: torch.Tensor) -> int:
    """Bytes of the layouts that kernels keep in addition to a weight, given its first stored tensor."""
    layouts = (layout for _, layout in _layouts.made(stored).values())
    tensors = dict(_place_and_bytes(t) for each in layouts for t in each.values())
    tensors.pop(stored.untyped_storage().data_ptr(), None)
    return sum(tensors.values())


def _place_and_bytes(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined] # oneDNN's own layout has no visible storage
        return id(tensor), tensor.nbytes
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def _order(x: torch.Tensor) -> str:
    """The memory order of the values: contiguous, channels last or strided."""
    if x.is_contiguous():
        return "contiguous"
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return "channels last" if last is not None and x.is_contiguous(memory_format=last) else "strided"


def _described(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute) -> str:
    """Everything that the choice of the fastest kernel depends on, as text."""
    g = weight.geometry
    slides = "" if g is None else f" stride {g.stride} padding {g.padding} dilation {g.dilation} groups {g.groups}"
    parts = (
        x.device.type if x.device.type != "cuda" else torch.cuda.get_device_name(x.device),
        f"{torch.get_num_threads()} threads" if x.device.type == "cpu" else "",
        str(compute),
        f"{weight.layer} {weight.format.name} {weight.shape}{slides}",
        "low memory" if weight.low_memory else "",
        f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} {_order(x)}",
        "" if bias is None else "bias",
    )
    return ", ".join(part for part in parts if part)


def tried(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute
) -> dict[str, float | None]:
    """Kernel name -> milliseconds that the micro-probe measured for this call, None if the result was wrong."""
    return micro_probe.times_of(_described(x, weight, bias, compute))


def explained(x: torch.Tensor, weight: PackedWeight, compute: Compute) -> Sequence[tuple[Row, str | None]]:
    """Each row of this compute mode, and why it does not accept the call (None if it does), as readable text."""
    return [(row, row.refuses(x, weight)) for row in kernels(compute)]
