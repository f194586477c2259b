"""Write, read and find `calibration.safetensors`, which is in the folder of the policy file.

It holds E[x] by layer name, packed tensors by the names that `RoundedKey` gives them, and the hash of the weights that
the calibration was made from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.calibration import Calibration, digest_of
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.finite import require_finite
from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.policies.storage.file_source import FileTensors

FILE = "calibration.safetensors"  # in the folder of the policy file


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file atomically.

    Raises:
        BitPolicyError: a tensor is NaN or Inf.
    """
    tensors = calibration.tensors()
    for name in tensors:
        require_finite(name.partition("/")[0], {name: tensors[name]})
    with written_aside(path) as aside:
        kept = {name: tensors[name].contiguous() for name in sorted(tensors)}
        save_file(kept, aside, metadata={"format": "pt"})


def load_calibration(path: Path, expected_hash: str | None = None) -> Calibration:
    """Check the file against the hash that a policy recorded; its tensors are read lazily.

    Raises:
        BitPolicyError: the file is missing or damaged, or is not the policy's calibration.
    """
    try:
        tensors = FileTensors(path)
    except BitPolicyError as error:
        what = f"{path} is missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)
        raise BitPolicyError(
            f"{what}; the policy needs the calibration.safetensors that was written with it: "
            "keep the two together, or set bias_correction: false and quantizer: rtn"
        ) from error
    # older policies record a hash that leaves out dtypes
    if expected_hash is not None and all(expected_hash != digest_of(tensors, dtypes) for dtypes in (True, False)):
        raise BitPolicyError(
            f"{path} has hash {digest_of(tensors)[:19]}..., but the policy was made with "
            f"{expected_hash[:19]}...; "
            "use the file that was written with the policy"
        )
    return Calibration.of(tensors)


class _Model(Protocol):
    id: str
    sha256: str


class Calibrated(Protocol):
    """The part of a policy that concerns its calibration, and the model that both were made from."""

    provenance: dict[str, Any]

    @property
    def model(self) -> _Model: ...

    @property
    def calibration(self) -> Calibration | None: ...

    @property
    def calibration_path(self) -> Path | None: ...


def calibration_of(policy: Calibrated, path: Path | None, choices: Iterable[Choice]) -> Calibration:
    """The calibration that applying `choices` needs: the one that the policy holds, or the file next to the policy.

    Args:
        path: of the policy's file; None for a policy in memory, or to use the file that it was loaded from.
        choices: the policy's choices, resolved.

    Raises:
        BitPolicyError: the choices need a calibration, and the file is missing or is not the policy's; or it was made
            from other weights than those that the policy is for.
    """
    if policy.calibration_path is None and policy.calibration is not None:
        return _of_these_weights(policy.calibration, policy)
    if not any(choice.needs_calibration for choice in choices):
        return Calibration()
    file = (policy.calibration_path or Path(FILE)) if path is None else path.with_name(FILE)
    return _of_these_weights(load_calibration(file, policy.provenance.get("calibration")), policy)


def _of_these_weights(calibration: Calibration, policy: Calibrated) -> Calibration:
    """The calibration, if it was made from the weights that the policy is for.

    This compares two recorded hashes. The code that reads the weights compares them with the policy's.
    """
    found = calibration.made_from
    if found is None or found == policy.model.sha256:
        return calibration
    raise BitPolicyError(
        f"the calibration was made from weights with sha256 {found[:12]}..., but the policy is for {policy.model.id} "
        f"with sha256 {policy.model.sha256[:12]}..., and a calibration of one model is wrong for another; give the "
        "model and the policy.yaml that belong to the calibration, or run search-policy on this model"
    )
