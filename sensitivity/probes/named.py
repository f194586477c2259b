"""The registry of probes. A new probe needs one file with a `Probe` and one entry here."""

from __future__ import annotations

from types import MappingProxyType

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.sensitivity.probes.ablation import AblationProbe
from bitpolicy.sensitivity.probes.adjoint import AdjointProbe
from bitpolicy.sensitivity.probes.prior import PriorProbe
from bitpolicy.sensitivity.probes.probe import Probe
from bitpolicy.sensitivity.probes.stepwise import StepwiseProbe
from bitpolicy.sensitivity.probes.weight import WeightProbe

_ALL: tuple[type[Probe], ...] = (AdjointProbe, StepwiseProbe, AblationProbe, WeightProbe, PriorProbe)
PROBES = MappingProxyType({probe.name: probe for probe in _ALL})
"""Name -> probe, the default first."""


def probe_named(name: str) -> type[Probe]:
    """The probe called `name`.

    Raises:
        BitPolicyError: there is no such probe.
    """
    if name not in PROBES:
        raise BitPolicyError(f"unknown probe {name!r}; write any of {', '.join(PROBES)}")
    return PROBES[name]
