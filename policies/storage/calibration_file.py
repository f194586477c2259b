"""Write, read and find `calibration.safetensors`, which lies in the folder of the policy file.

It holds E[x] under the layer's name, packed tensors under the names that `RoundedKey` gives them, and the hash of the
weights that the calibration was made from.
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
    """Write the file, aside and renamed.

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
    """Check the file against the hash that a policy recorded; its tensors are read when they are asked for.

    Raises:
        BitPolicyError: it is missing, damaged, or another calibration than the policy's.
    """
    try:
        tensors = FileTensors(path)
    except BitPolicyError as error:
        what = f"{path} is missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)
        raise BitPolicyError(
            f"{what}; the policy needs the calibration.safetensors that was written beside it: "
            "keep the two together, or set bias_correction: false and quantizer: rtn"
        ) from error
    # older policies record a hash that leaves out dtypes
    if expected_hash is not None and all(expected_hash != digest_of(tensors, dtypes) for dtypes in (True, False)):
        raise BitPolicyError(
            f"{path} has hash {digest_of(tensors)[:19]}..., the policy was made with "
            f"{expected_hash[:19]}...; "
            "use the file written beside it"
        )
    return Calibration.of(tensors)


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
        return Calibration()
    beside = (policy.calibration_path or Path(FILE)) if path is None else path.with_name(FILE)
    return _of_these_weights(load_calibration(beside, policy.provenance.get("calibration")), policy)


def _of_these_weights(calibration: Calibration, policy: Calibrated) -> Calibration:
    """Whoever reads the weights compares them with the policy's hash; this compares that with the calibration's."""
    found = calibration.made_from
    if found is None or found == policy.model.sha256:
        return calibration
    raise BitPolicyError(
        f"the calibration was made from weights with sha256 {found[:12]}..., the policy is for {policy.model.id} with "
        f"{policy.model.sha256[:12]}...: what was measured and rounded on one model is wrong for another; give the "
        "model and the policy.yaml that belong to the calibration, or run search-policy on this model"
    )
