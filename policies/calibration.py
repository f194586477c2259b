"""What exporting needs beyond the policy: the mean input of every layer, measured on the reference.

`calibration.safetensors` holds E[x] per layer (see `bitpolicy.kernels.bias_correction`), float32, by layer name. Its
hash is recorded in the policy, so what is exported is what was searched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.accounting import tensor_bytes
from bitpolicy.policies.atomic import written_aside

Calibration = Mapping[str, torch.Tensor]
"""Layer name -> E[x], float32, shape (in) or (in, *kernel)."""


def save_calibration(calibration: Calibration, path: Path) -> None:
    with written_aside(path) as aside:
        save_file(
            {name: patch.contiguous() for name, patch in sorted(calibration.items())}, aside, metadata={"format": "pt"}
        )


def load_calibration(path: Path, expected_hash: str | None = None) -> dict[str, torch.Tensor]:
    """Read the file and check it against the hash that a policy recorded.

    Raises:
        BitPolicyError: it is missing, damaged, or another calibration than the policy's.
    """
    try:
        calibration = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BitPolicyError(
            f"cannot read {path}: {error}; the policy corrects biases and needs the calibration.safetensors that was "
            "written beside it: keep the two together, or set bias_correction: false"
        ) from error
    found = calibration_hash(calibration)
    if expected_hash is not None and found != expected_hash:
        raise BitPolicyError(
            f"{path} has hash {found[:19]}..., the policy was made with {expected_hash[:19]}...; "
            "use the file written beside it"
        )
    return calibration


def calibration_hash(calibration: Calibration) -> str:
    """ "sha256:..." over names, shapes and values."""
    digest = hashlib.sha256()
    for name, patch in sorted(calibration.items()):
        digest.update(f"{name}{tuple(patch.shape)}".encode())
        digest.update(tensor_bytes(patch))
    return f"sha256:{digest.hexdigest()}"
