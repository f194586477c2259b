"""A pytest plugin for a process in which TRITON_INTERPRET=1 was set before it began: kernels written in Triton take CPU
tensors there, and are the whole table. Products take a thousand times as long, so a few shapes are tried, in one dtype
each."""

from __future__ import annotations

from dataclasses import replace

import torch
from toy_products import DTYPES_OF, TRIED

from bitpolicy.kernels import dispatch

dispatch.TABLE = tuple(replace(row, device="cpu") for row in dispatch.TABLE if row.kernel.name.startswith("triton-"))
DTYPES_OF.update({name: (torch.bfloat16 if "1x" in name else torch.float16,) for name in DTYPES_OF})
TRIED[:] = [name for name in TRIED if any(part in name for part in ("odd", "stride", "1x1", "1x3x3"))]
