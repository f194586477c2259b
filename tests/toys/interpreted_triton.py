"""A pytest plugin for a process in which TRITON_INTERPRET=1 was set before it began: kernels written in Triton take CPU
tensors there, and are the whole table."""

from __future__ import annotations

from dataclasses import replace

from bitpolicy.kernels import dispatch

dispatch.TABLE = tuple(replace(row, device="cpu") for row in dispatch.TABLE if row.kernel.name.startswith("triton-"))
