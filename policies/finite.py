"""Checks that no file contains NaN or Inf, unless the model that it was made from does.

The largest float16 is 65504. A corrected bias, a scale or a value in another program's layout may exceed it, and one
such value turns every image into NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from bitpolicy.kernels.errors import BitPolicyError, BitPolicyWarning


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf; always true for tensors that are not floats."""
    if not tensor.is_floating_point():
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor  # torch cannot sum float8
    if torch.isfinite(values.sum(dtype=torch.float32)):  # one cheap pass, nearly always enough
        return True
    return bool(torch.isfinite(values).all())


def require_finite(layer: str, made: Mapping[str, torch.Tensor]) -> None:
    """Refuse a layer's tensors if any of them contains NaN or Inf.

    Args:
        made: the tensors to be written, by full name.

    Raises:
        BitPolicyError: a tensor is not finite; the message names the first one.
    """
    for name, tensor in made.items():
        if not is_finite(tensor):
            raise BitPolicyError(
                f"{name} would be written as {str(tensor.dtype).removeprefix('torch.')} with NaN or Inf; give layer "
                f"{layer} another format, e.g. fp16, or another quantizer"
            )


def left_as_they_were(layers: Sequence[str], storage: torch.dtype) -> str:
    """One line that says which layers keep their uncorrected bias."""
    count = "1 layer keeps its bias" if len(layers) == 1 else f"{len(layers)} layers keep their bias"
    example = "" if len(layers) == 1 else "e.g. "
    dtype = str(storage).removeprefix("torch.")
    return f"{count}, {example}{layers[0]}: corrected for the weight's mean error, it would exceed the range of {dtype}"


def warn_of_biases(layers: Sequence[str], storage: torch.dtype) -> None:
    """Warn, once for all layers, that some keep their bias although the policy asks for its correction."""
    if layers:
        warnings.warn(left_as_they_were(layers, storage), BitPolicyWarning, stacklevel=2)


def warn_of_source(names: Sequence[str]) -> None:
    """Warn, once for all tensors, that some in the model itself are not finite."""
    if names:
        count = f"{len(names)} tensor{'s' if names[1:] else ''}"
        text = f"the model itself has NaN or Inf in {count}, e.g. {names[0]}; they are written unchanged"
        warnings.warn(text, BitPolicyWarning, stacklevel=2)
