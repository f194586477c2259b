"""The compute modes that a policy or a checkpoint may record: those that a search can measure without their kernels."""

from __future__ import annotations

from typing import Final

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute

MEASURED: Final = tuple(compute for compute in Compute if compute is not Compute.FLOAT)


def measured_compute(name: str) -> Compute:
    """The compute mode called `name`.

    Raises:
        BitPolicyError: there is no such mode, or it cannot be recorded.
    """
    wanted = name.strip().lower()
    if wanted not in MEASURED:
        raise BitPolicyError(f"compute {name!r} cannot be measured and recorded; write any of {', '.join(MEASURED)}")
    return Compute(wanted)
