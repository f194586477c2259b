"""The budget: how many bytes a policy may use.

A budget can be written in several ways. Each means one exact number of bytes:

    3GB      3 * 10**9 bytes              3GiB     3 * 2**30 bytes
    45%      of the reference's bytes     4.5bit   per parameter, on average
    5000000  bytes, without a unit

Percentages and bits are parsed first. Everything else goes to pydantic's `ByteSize`, which on its own would read "45%"
as 45 bytes. Decimal and binary units differ by 7% at one gigabyte, so messages show both.

The scope says what the budget covers. The solver needs the bytes left for the studied components (the denoiser, and
possibly more), so everything else in the scope is subtracted first: the pipeline's other models and room for
activations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import ByteSize, TypeAdapter

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy_records import BudgetRecord
from bitpolicy.sensitivity.cost.peak_memory import PeakMemory, Room

ScopeName = Literal["weights", "pipeline", "peak"]
SCOPES: Final[tuple[ScopeName, ...]] = ("weights", "pipeline", "peak")
_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|bits?)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*((?:[kmgt]i?)?)(b)", re.IGNORECASE)
_BYTES = re.compile(r"\d+")
_LONGEST = 40  # characters
_FORMS = "write 3GB, 3GiB, 700MB, 45% or 4.5bit"
_SIZES = "write a size such as 10GB"


class BudgetError(BitPolicyError):
    """A budget that cannot be parsed or cannot be met."""


@dataclass(frozen=True)
class Scope:
    """What a budget covers.

    Attributes:
        name: "weights", "pipeline" or "peak".
        account: bytes of the studied components: in memory for "peak", in the checkpoint for the others.
        others: bytes of the pipeline's other models.
        peak: the predicted peak memory, for "peak".
        room: the memory reserved for activations, for "peak".
        studied: what messages call the studied components.
    """

    name: ScopeName
    account: ByteAccount
    others: int = 0
    peak: PeakMemory | None = None
    room: Room | None = None
    studied: str = "denoiser"

    @classmethod
    def of_weights(cls, account: ByteAccount, studied: str = "denoiser") -> Scope:
        """The tensor bytes of the studied components, as exported."""
        return cls("weights", account, studied=studied)

    @classmethod
    def of_pipeline(cls, account: ByteAccount, others: int, studied: str = "denoiser") -> Scope:
        """Those bytes plus `others`, the tensor bytes of the pipeline's other models as exported."""
        return cls("pipeline", account, others, studied=studied)

    @classmethod
    def of_peak(cls, peak: PeakMemory, candidates: Sequence[Format], studied: str = "denoiser") -> Scope:
        """The peak bytes that one pipeline call holds, under any policy in these formats."""
        return cls("peak", peak.account, peak.others, peak, peak.room(candidates), studied)

    @property
    def activations(self) -> int:
        """Bytes reserved for activations."""
        return self.room.activations if self.room else 0

    @property
    def barred(self) -> frozenset[tuple[str, Format]]:
        """(layer name, format) pairs that no policy may use: they need more activation memory than is reserved."""
        return self.room.barred if self.room else frozenset()

    @property
    def reference(self) -> int:
        """Bytes of the whole scope at FP16; `%` is relative to this."""
        return self.peak.reference if self.peak else self.account.reference + self.others

    @property
    def at_fp16(self) -> str:
        """`reference` in words, for messages."""
        verb = "has" if self.studied == "denoiser" else "have"
        weights = f"the FP16 {self.studied} {verb}"
        has = {"weights": weights, "pipeline": "the FP16 pipeline has", "peak": f"at FP16 {self} takes"}
        return f"{has[self.name]} {self.reference:,} bytes"

    def __str__(self) -> str:
        if self.peak is None:
            return {"weights": f"the {self.studied}", "pipeline": "the pipeline"}[self.name]
        size, batch = f"{self.peak.width} x {self.peak.height} pixels", self.peak.batch_size
        return f"a pipeline call at {size}" + (f", {batch} at once" if batch > 1 else "")


@dataclass(frozen=True)
class Budget:
    """At most `total` bytes for everything in `scope`. `asked` is the budget as the user wrote it."""

    asked: str
    total: int
    scope: Scope

    @classmethod
    def parse(cls, text: str, scope: Scope | ByteAccount) -> Budget:
        """Parse `text` as a size, a percentage of the scope at FP16, or bits per parameter.

        Args:
            scope: an account alone means scope "weights".

        Raises:
            BudgetError: it is none of these, zero, negative, or a size in bits (`3Gb`); or it is in bits per parameter
                and the scope covers more than the studied components.
        """
        if isinstance(scope, ByteAccount):
            scope = Scope.of_weights(scope)
        amount, unit = read(text)
        if unit == "bit" and scope.name != "weights":
            raise BudgetError(
                f"budget {text!r} is in bits per parameter of the {scope.studied}, but scope {scope.name} covers more "
                "than that; write 3GB, 3GiB, 700MB or 45%, or use --scope weights"
            )
        unit_of, parts = {"%": (scope.reference, 100), "bit": (scope.account.parameters, 8), "B": (1, 1)}[unit]
        total = int(amount * unit_of / parts)
        if total == 0:
            raise BudgetError(f"budget {text!r} is zero bytes; {scope.at_fp16}: {_FORMS}")
        return cls(text.strip(), total, scope)

    @property
    def nbytes(self) -> int:
        """Bytes left for the studied components, as `scope.account` counts; negative if the rest exceeds `total`."""
        return self.total - self.scope.others - self.scope.activations

    def require(self, smallest: int, formats: Sequence[str], program: str = "", unpacked: int = 0) -> None:
        """Check that some policy fits.

        Args:
            program: another program that must be able to hold the policy, if any.
            unpacked: number of layers that stay FP16 because that program supports none of the formats for them.

        Raises:
            BudgetError: fewer bytes are left than `smallest`, the size of the smallest policy with `formats`.
        """
        if self.nbytes >= smallest:
            return
        there = f" that {program} can hold" if program else ""
        policy = f"below the smallest policy{there} with {', '.join(formats)}: {smallest:,} bytes"
        layers = f"{unpacked} of {len(self.scope.account.shapes)} layers"
        why = f"; {program} cannot pack {layers}, which stay FP16" if unpacked else ""
        smaller = ["add a smaller format to --formats", *(["leave out --target"] if program else [])]
        if self.scope.name == "weights":
            raise BudgetError(
                f"budget {self.asked!r} is {self.total:,} bytes, {policy} ({readable(smallest)}){why}; "
                f"raise --budget{',' if program else ''} {_either(smaller)}"
            )
        least = self.total - self.nbytes + smallest
        smaller += ["give a smaller --height, --width or --batch-size" if self.scope.peak else "use --scope weights"]
        raise BudgetError(
            f"budget {self.asked!r} is {self.total:,} bytes for {self.scope}; {self._parts}, {policy}{why}; "
            f"raise --budget to {least:,} bytes ({readable(least)}), {_either(smaller)}"
        )

    @property
    def _parts(self) -> str:
        """How much of the budget is left for the studied components, and why."""
        taken = f"the other models take {self.scope.others:,}"
        taken += f" and activations {self.scope.activations:,}" if self.scope.peak else ""
        return f"{taken}, which leaves {max(self.nbytes, 0):,} for the {self.scope.studied}"

    @property
    def record(self) -> BudgetRecord:
        """The budget's entry in the policy file."""
        about: dict[str, object] = {"asked": self.asked, "bytes": self.total, "scope": self.scope.name}
        if self.scope.name != "weights":
            about["other_bytes"] = self.scope.others
        if (peak := self.scope.peak) is not None:
            about |= {name: getattr(peak, name) for name in ("height", "width", "batch_size", "device")}
            about["activation_bytes"] = self.scope.activations
            about["compute_dtype"] = str(peak.account.storage_dtype).removeprefix("torch.")
        return BudgetRecord.model_validate(about)

    def __str__(self) -> str:
        whole = f"{self.total:,} bytes ({readable(self.total)})"
        return whole if self.scope.name == "weights" else f"{whole} for {self.scope}; {self._parts}"


def read(text: str) -> tuple[float, str]:
    """Parse a budget into its amount and unit, "%", "bit" or "B" (bytes), without knowing the model.

    Raises:
        BudgetError: as in `Budget.parse`.
    """
    share = _SHARE.fullmatch(text.strip())
    if share and len(text) <= _LONGEST:
        return float(share[1]), "%" if share[2] == "%" else "bit"
    return float(read_bytes(text, "budget", _FORMS)), "B"


def read_bytes(text: str, what: str, forms: str = _SIZES) -> int:
    """The number of bytes in a size such as "3GB", "3GiB" or "5000000".

    Args:
        text: as the user wrote it.
        what: what the size is of, for error messages.
        forms: how it can be written, for error messages.

    Raises:
        BudgetError: it is not a size, or it is in bits.
    """
    if len(text) > _LONGEST:
        raise BudgetError(f"{what} {text[:_LONGEST]!r}... is not a size; {forms}")
    if _BYTES.fullmatch(text.strip()):
        return int(text)
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        raise BudgetError(f"{what} {text!r} is not a size; {forms}")
    if size[3] == "b" and size[2] and size[2] != size[2].lower():
        raise BudgetError(f"{what} {text!r} is in bits; write {size[1]}{size[2]}B for bytes")
    return int(TypeAdapter(ByteSize).validate_python(f"{size[1]}{size[2]}B"))


def _either(remedies: Sequence[str]) -> str:
    """The remaining remedies, to follow a first one in a sentence: "a, b, or c"."""
    *most, last = remedies
    return f"{', '.join(most)}, or {last}" if most else f"or {last}"


def readable(nbytes: int) -> str:
    """A size in decimal and binary units: "5 MB, 4.77 MiB"."""
    for power, binary in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 0.9995 * 1000**power:
            return f"{decimal(nbytes)}, {nbytes / 1024**power:.3g} {binary}"
    return decimal(nbytes)


def decimal(nbytes: int) -> str:
    """A size in decimal units: "5 MB"."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 0.9995 * 1000**power:
            return f"{nbytes / 1000**power:.3g} {unit}"
    return f"{nbytes} B"
