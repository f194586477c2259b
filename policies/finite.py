"""Nothing that is written is NaN or Inf, unless the model that it was made from holds it.

A float16 ends at 65504: a corrected bias, a scale or a value that another program lays out in another way may leave it,
and one such value makes every image NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from bitpolicy.kernels.errors import BitPolicyError, BitPolicyWarning


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf; true of what is no float."""
    if not tensor.is_floating_point():
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor  # torch does not add up float8
    if torch.isfinite(values.sum(dtype=torch.float32)):  # one cheap pass tells almost always
        return True
    return bool(torch.isfinite(values).all())


def require_finite(layer: str, made: Mapping[str, torch.Tensor]) -> None:
    """Refuse what was made of a layer if any of it is NaN or Inf.

    Args:
        made: the tensors to be written, by their whole names.

    Raises:
        BitPolicyError: names the first that is not finite.
    """
    for name, tensor in made.items():
        if not is_finite(tensor):
            raise BitPolicyError(
                f"{name} would be written as {str(tensor.dtype).removeprefix('torch.')} with NaN or Inf; give layer "
                f"{layer} another format, e.g. fp16, or another quantizer"
            )


def left_as_they_were(layers: Sequence[str], storage: torch.dtype) -> str:
    """One line that says which layers keep their bias."""
    count = "1 layer keeps its bias" if len(layers) == 1 else f"{len(layers)} layers keep their bias"
    example = "" if len(layers) == 1 else "e.g. "
    dtype = str(storage).removeprefix("torch.")
    return f"{count}, {example}{layers[0]}: corrected for the weight's mean error, it would leave the range of {dtype}"


def warn_of_biases(layers: Sequence[str], storage: torch.dtype) -> None:
    """Say, once for all, which layers keep their bias although the policy has it corrected."""
    if layers:
        warnings.warn(left_as_they_were(layers, storage), BitPolicyWarning, stacklevel=2)


def warn_of_source(names: Sequence[str]) -> None:
    """Say, once for all, which tensors of the model itself are not finite."""
    if names:
        count = f"{len(names)} tensor{'s' if names[1:] else ''}"
        text = f"the model itself has NaN or Inf in {count}, e.g. {names[0]}; written as in the model"
        warnings.warn(text, BitPolicyWarning, stacklevel=2)
