"""Advice for a computation that gives NaN or Inf: a compute dtype with a wider range, if there is one."""

from __future__ import annotations

import torch

_WIDER = {torch.float16: "try --dtype bfloat16 or float32", torch.bfloat16: "try --dtype float32"}
_NONE = "no dtype has a wider range than {}, so check the model's weights, its scheduler and the call's arguments"


def advice(dtype: torch.dtype) -> str:
    """What to try.

    Args:
        dtype: of the computation that gave NaN or Inf.
    """
    return _WIDER.get(dtype) or _NONE.format(str(dtype).removeprefix("torch."))
