"""Values that the Triton kernels are tried on: the same from run to run, of both signs and of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

SIGNS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "both signs": lambda x: x,
    "above zero": torch.abs,
    "below zero": lambda x: -torch.abs(x),
    "SiLU": torch.nn.functional.silu,
}
FLOAT8 = torch.float8_e4m3fn
any_code = pytest.mark.parametrize("code", [torch.int8, FLOAT8], ids=str)
any_sign_and_code = pytest.mark.parametrize(
    ("sign", "code"), [*((sign, torch.int8) for sign in SIGNS), ("both signs", FLOAT8)], ids=str
)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
