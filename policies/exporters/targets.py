"""The programs that a policy can be exported to. A new one takes one file, and one line here."""

from __future__ import annotations

from typing import Final

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.exporters.comfy import Comfy
from bitpolicy.policies.exporters.exporter import Exporter
from bitpolicy.policies.exporters.gguf import Gguf
from bitpolicy.policies.exporters.modelopt import ModelOpt
from bitpolicy.policies.exporters.names import NAMES
from bitpolicy.policies.exporters.sdnq import Sdnq
from bitpolicy.policies.exporters.torchao import TorchAo

EXPORTERS: Final[tuple[Exporter, ...]] = (
    Comfy(),
    Comfy("comfy-int8", quantize_inputs=True),
    Sdnq(),
    TorchAo(),
    ModelOpt(),
    Gguf(),
)


def exporter_named(name: str) -> Exporter:
    """The exporter called `name`.

    Raises:
        BitPolicyError: there is none; the message lists the exporters.
    """
    for exporter in EXPORTERS:
        if exporter.name == name.strip().lower():
            return exporter
    raise BitPolicyError(f"unknown target {name!r}; write any of {', '.join(NAMES)}")
