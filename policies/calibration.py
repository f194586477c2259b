"""What exporting needs beyond the policy and the model, measured on the reference.

`calibration.safetensors` holds E[x] per layer (see `bitpolicy.kernels.bias_correction`), float32, by layer name; and,
for layers that were not rounded to nearest, the packed tensors that their quantizer made, by `rounded_key`. Its hash is
recorded in the policy, so what is exported is what was searched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.accounting import tensor_bytes
from bitpolicy.policies.atomic import written_aside
from bitpolicy.policies.file_source import FileTensors
from bitpolicy.policies.finite import is_finite, require_finite
from bitpolicy.policies.policy import Choice, Policy

Calibration = Mapping[str, torch.Tensor]
"""Layer name -> E[x], float32, shape (in) or (in, *kernel); `rounded_key` -> a packed tensor."""


def rounded_key(layer: str, choice: Choice, suffix: str) -> str:
    """Where a tensor that a quantizer made is kept; no layer's name has a slash."""
    return f"{layer}/{choice.format.name}/{choice.quantizer}/{suffix}"


def is_rounded(calibration: Calibration) -> bool:
    """Whether it holds packed tensors, which make it as large as the checkpoint."""
    return any("/" in key for key in calibration)


def needed_for(choices: Mapping[str, Choice], calibration: Calibration) -> dict[str, torch.Tensor]:
    """The entries that putting `choices` on the model takes: every E[x] that is finite, and what was rounded for them.

    No bias is corrected by an E[x] that is not finite.
    """
    wanted = {f"{name}/{choice.format.name}/{choice.quantizer}" for name, choice in choices.items()}
    needed = {key: calibration[key] for key in calibration if "/" not in key or key.rpartition("/")[0] in wanted}
    return {key: tensor for key, tensor in needed.items() if "/" in key or is_finite(tensor)}


def calibration_bytes(calibration: Calibration) -> int:
    """Tensor bytes of its file."""
    return sum(calibration[key].nbytes for key in calibration)


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file, aside and renamed.

    Raises:
        BitPolicyError: a tensor is NaN or Inf.
    """
    for key in calibration:
        require_finite(key.partition("/")[0], {key: calibration[key]})
    with written_aside(path) as aside:
        save_file(
            {name: patch.contiguous() for name, patch in sorted(calibration.items())}, aside, metadata={"format": "pt"}
        )


def load_calibration(path: Path, expected_hash: str | None = None) -> Calibration:
    """Check the file against the hash that a policy recorded; its tensors are read when they are asked for.

    Raises:
        BitPolicyError: it is missing, damaged, or another calibration than the policy's.
    """
    try:
        calibration = FileTensors(path)
    except BitPolicyError as error:
        raise BitPolicyError(
            f"{error}; the policy needs the calibration.safetensors that was written beside it: "
            "keep the two together, or set bias_correction: false and quantizer: rtn"
        ) from error
    found = calibration_hash(calibration)
    if expected_hash is not None and found != expected_hash:
        raise BitPolicyError(
            f"{path} has hash {found[:19]}..., the policy was made with {expected_hash[:19]}...; "
            "use the file written beside it"
        )
    return calibration


def calibration_of(policy: Policy, path: Path | None, choices: Iterable[Choice]) -> Calibration:
    """What putting `choices` on a model takes: held by the policy, or in the file beside it.

    Args:
        path: of the policy; None for one in memory.
        choices: of the policy, resolved.

    Raises:
        BitPolicyError: they need a calibration, and the file is missing or another than the policy's.
    """
    if policy.calibration is not None:
        return policy.calibration
    if not any(choice.needs_calibration for choice in choices):
        return {}
    beside = Path("calibration.safetensors") if path is None else path.with_name("calibration.safetensors")
    return load_calibration(beside, policy.provenance.get("calibration"))


def calibration_hash(calibration: Calibration) -> str:
    """ "sha256:..." over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(calibration):
        patch = calibration[name]
        digest.update(f"{name}{tuple(patch.shape)}".encode())
        digest.update(tensor_bytes(patch))
    return f"sha256:{digest.hexdigest()}"
