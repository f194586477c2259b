"""The footprint of a pipeline: bytes of its models in files and in memory, and the most that torch allocates in a run.

torch counts the allocations: on CUDA with its allocator's counters, on the CPU with its profiler, which records every
allocation and release. So allocations inside an operator count, too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bitpolicy.kernels.cpu.scratch import release_scratch
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec

_MARK = "bitpolicy:"


def stored_others(pipe: DiffusionPipeline, components: Collection[str], storage: torch.dtype) -> dict[str, int]:
    """Tensor bytes of each model that is not packed, as `export_pipeline` stores it.

    Args:
        components: names of the packed ones.
        storage: dtype that floats are stored in.

    Returns:
        Component name -> bytes: text encoders, VAE, ControlNet and whatever else has weights.
    """
    return {name: _stored(model, storage) for name, model in _models(pipe).items() if name not in components}


def loaded_bytes(pipe: DiffusionPipeline) -> int:
    """Bytes of all weights and buffers that are in memory now; shared tensors count once."""
    tensors = (tensor for model in _models(pipe).values() for tensor in (*model.parameters(), *model.buffers()))
    return sum(tensor.nbytes for tensor in _once(tensors))


def measured_peak(pipe: DiffusionPipeline, run: Callable[[], object]) -> int:
    """Peak bytes in memory while `run` calls the pipeline: its models, and what torch allocates on top of them.

    Raises:
        BitPolicyError: the pipeline is neither on the CPU nor on CUDA.
    """
    return loaded_bytes(pipe) + most_allocated(pipe.device, run)


def most_allocated(device: torch.device, run: Callable[[], object]) -> int:
    """Peak bytes that torch allocates on `device` while `run` runs, including kernels' scratch memory.

    Raises:
        BitPolicyError: the device is neither the CPU nor CUDA.
    """
    release_scratch()  # so that this run reserves it again, and it counts
    with metered(device) as meter:
        run()
    return max(span.most for span in meter.spans)


@dataclass(frozen=True)
class Span:
    """The part of a run from one mark to the next.

    Attributes:
        label: label of the mark that begins it; empty for the first span.
        before: bytes at its beginning, on top of those allocated when the run began.
        most: peak bytes during it, on top of the same.
    """

    label: str
    before: int
    most: int


class Meter(Protocol):
    """Counts what torch allocates, span by span; `spans` are complete once the run is over."""

    spans: list[Span]

    def mark(self, label: str) -> None:
        """End the current span and begin the next."""


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Count what is allocated on `device` while the block runs.

    Raises:
        BitPolicyError: the device is neither the CPU nor CUDA.
    """
    if device.type not in ("cpu", "cuda"):
        raise BitPolicyError(f"peak memory can be measured on the CPU and on CUDA, not on {device.type}")
    gc.collect()  # otherwise this run might free reference cycles that an earlier one left
    with _on_cuda(device) if device.type == "cuda" else _on_cpu() as meter:
        yield meter


@dataclass
class _CudaMeter:
    device: torch.device
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._base, self._label, self._before = torch.cuda.memory_allocated(self.device), "", 0
        torch.cuda.reset_peak_memory_stats(self.device)

    def mark(self, label: str) -> None:
        most = torch.cuda.max_memory_allocated(self.device) - self._base
        self.spans.append(Span(self._label, self._before, most))
        torch.cuda.reset_peak_memory_stats(self.device)
        self._label, self._before = label, torch.cuda.memory_allocated(self.device) - self._base


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[_CudaMeter]:
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # so that this run allocates them, as it would on its own
    meter = _CudaMeter(device)
    yield meter
    meter.mark("")


@dataclass
class _CpuMeter:
    spans: list[Span] = field(default_factory=list)

    def mark(self, label: str) -> None:
        with record_function(f"{_MARK}{label}"):
            pass


@contextmanager
def _on_cpu() -> Iterator[_CpuMeter]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr when it starts and stops
    meter = _CpuMeter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield meter
    results: Any = record.profiler
    meter.spans += _spans(_in_order(results.kineto_results.experimental_event_tree()))


def _in_order(tree: Iterable[Any]) -> list[Any]:
    """The profiler's events sorted by time; of events at the same time, the outer one comes first."""
    events, waiting = [], list(tree)[::-1]
    while waiting:
        events.append(waiting.pop())
        waiting += events[-1].children[::-1]
    return sorted(events, key=lambda event: event.start_time_ns)


def _spans(events: Iterable[Any]) -> Iterator[Span]:
    """Sum allocations and releases between marks; releases of earlier allocations do not count."""
    held: dict[int, int] = {}
    label, before, most, total = "", 0, 0, 0
    for event in events:
        kind, details = event.typed
        if kind.name == "Allocation" and details.device.type == "cpu":
            total -= held.pop(details.ptr, 0)
            if details.alloc_size > 0:
                held[details.ptr] = details.alloc_size
                total += details.alloc_size
            most = max(most, total)
        elif event.name.startswith(_MARK):
            yield Span(label, before, most)
            label, before, most = event.name.removeprefix(_MARK), total, total
    yield Span(label, before, most)


def _models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _stored(model: nn.Module, storage: torch.dtype) -> int:
    """Bytes of a model's file; tied weights, such as a text encoder's, are written once."""
    return sum(TensorSpec.stored(tensor, storage).nbytes for tensor in _once(model.state_dict().values()))


def _once(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """The distinct tensors: of those with the same address, shape and strides, one remains."""
    return {(tensor.data_ptr(), tensor.shape, tensor.stride()): tensor for tensor in tensors}.values()
