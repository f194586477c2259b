"""What exporting needs beyond the policy and the model, measured on the reference.

`calibration.safetensors` holds E[x] per layer (see `bitpolicy.kernels.quantizers.bias_correction`), float32, by layer
name; and, for layers that were not rounded to nearest, the packed tensors that their quantizer made, by `rounded_key`.
Under `MADE_FROM` it says which weights all this is of: what quantizers made of one model is another model's weights.
Its hash is recorded in the policy, so what is exported is what was searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.finite import is_finite, require_finite
from bitpolicy.policies.identity import tensors_digest
from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.policies.storage.file_source import FileTensors

FILE = "calibration.safetensors"  # in the folder of the policy file
Calibration = Mapping[str, torch.Tensor]
"""Layer name -> E[x], float32, shape (in) or (in, *kernel); `rounded_key` -> a packed tensor; `MADE_FROM`."""

MADE_FROM = "made from"
"""Key of the hash of the weights, as a policy records it, in ASCII, uint8; no layer's name has a space."""


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


def stamped(calibration: Calibration, weights: str) -> dict[str, torch.Tensor]:
    """The calibration with the hash of the weights that it was made from; one without entries stays so.

    Args:
        weights: `bitpolicy.policies.identity.weights_hash` of what is studied.
    """
    if not calibration:
        return {}
    return {**calibration, MADE_FROM: torch.frombuffer(bytearray(weights.encode()), dtype=torch.uint8)}


def made_from(calibration: Calibration) -> str | None:
    """The hash of the weights that it was made from; None where it does not say, as those of older versions do not."""
    recorded = calibration.get(MADE_FROM)
    return None if recorded is None else bytes(recorded.tolist()).decode()


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
        what = f"{path} is missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)
        raise BitPolicyError(
            f"{what}; the policy needs the calibration.safetensors that was written beside it: "
            "keep the two together, or set bias_correction: false and quantizer: rtn"
        ) from error
    if expected_hash is not None and not _is_hash(expected_hash, calibration):
        raise BitPolicyError(
            f"{path} has hash {calibration_hash(calibration)[:19]}..., the policy was made with "
            f"{expected_hash[:19]}...; "
            "use the file written beside it"
        )
    return calibration


class _Model(Protocol):
    id: str
    sha256: str


class Calibrated(Protocol):
    """What a policy says of its calibration, and of the model that both were made from."""

    provenance: dict[str, Any]

    @property
    def model(self) -> _Model: ...

    @property
    def calibration(self) -> Calibration | None: ...

    @property
    def calibration_path(self) -> Path | None: ...


def calibration_of(policy: Calibrated, path: Path | None, choices: Iterable[Choice]) -> Calibration:
    """What putting `choices` on a model takes: held by the policy, or in the file beside it.

    Args:
        path: of the policy's file; None for a policy in memory, or for the file that it was loaded from.
        choices: of the policy, resolved.

    Raises:
        BitPolicyError: they need a calibration, and the file is missing or another than the policy's; or it was made
            from other weights than those that the policy is for.
    """
    if policy.calibration_path is None and policy.calibration is not None:
        return _of_these_weights(policy.calibration, policy)
    if not any(choice.needs_calibration for choice in choices):
        return {}
    beside = (policy.calibration_path or Path(FILE)) if path is None else path.with_name(FILE)
    return _of_these_weights(load_calibration(beside, policy.provenance.get("calibration")), policy)


def _of_these_weights(calibration: Calibration, policy: Calibrated) -> Calibration:
    """Whoever reads the weights compares them with the policy's hash; this compares that with the calibration's."""
    found = made_from(calibration)
    if found is None or found == policy.model.sha256:
        return calibration
    raise BitPolicyError(
        f"the calibration was made from weights with sha256 {found[:12]}..., the policy is for {policy.model.id} with "
        f"{policy.model.sha256[:12]}...: what was measured and rounded on one model is wrong for another; give the "
        "model and the policy.yaml that belong to the calibration, or run search-policy on this model"
    )


def calibration_hash(calibration: Calibration) -> str:
    """ "sha256:..." over names, dtypes, shapes and values."""
    return _hash(calibration)


def _is_hash(recorded: str, calibration: Calibration) -> bool:
    """Whether it is the calibration's; older policies record one that leaves out dtypes."""
    return any(recorded == _hash(calibration, dtypes) for dtypes in (True, False))


def _hash(calibration: Calibration, dtypes: bool = True) -> str:
    return f"sha256:{tensors_digest(((name, calibration[name]) for name in sorted(calibration)), dtypes)}"
