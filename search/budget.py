"""How many bytes a policy may use.

A budget is written the way people say it and means one exact number of bytes:

    3GB      3 * 10**9 bytes        3GiB     3 * 2**30 bytes
    45%      of the reference       4.5bit   a parameter, on average

Shares and bits are matched first; what is left goes to pydantic's `ByteSize`, which alone would read "45%" as 45 bytes.
Decimal and binary units differ by 7% at the gigabyte, so both are echoed back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ByteSize, TypeAdapter

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.accounting import ByteAccount

_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|bits?)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*((?:[kmgt]i?)?)(b)", re.IGNORECASE)
_LONGEST = 40  # characters
_FORMS = "write 3GB, 3GiB, 700MB, 45% or 4.5bit"


class BudgetError(BitPolicyError):
    """A budget that cannot be understood or cannot be met."""


@dataclass(frozen=True)
class Budget:
    """At most `nbytes` tensor bytes for the exported denoiser; `asked` is how it was written."""

    asked: str
    nbytes: int

    @classmethod
    def parse(cls, text: str, account: ByteAccount) -> Budget:
        """Read `text` as a size, a share of the FP16 denoiser, or bits a parameter.

        Raises:
            BudgetError: it is none of these, zero, negative, or counts bits (`3Gb`).
        """
        amount, unit = read(text)
        unit_of, parts = {"%": (account.reference, 100), "bit": (account.parameters, 8), "B": (1, 1)}[unit]
        nbytes = int(amount * unit_of / parts)
        if nbytes == 0:
            raise BudgetError(
                f"budget {text!r} is zero bytes; the FP16 denoiser has {account.reference:,} bytes: {_FORMS}"
            )
        return cls(text.strip(), nbytes)

    def require(self, smallest: int, formats: Sequence[str]) -> None:
        """Check that a policy exists.

        Raises:
            BudgetError: the budget is below `smallest`, the size of the smallest policy with `formats`.
        """
        if self.nbytes < smallest:
            raise BudgetError(
                f"budget {self.asked!r} is {self.nbytes:,} bytes, below the smallest policy with {', '.join(formats)}: "
                f"{smallest:,} bytes ({readable(smallest)}); raise --budget or add a smaller format to --formats"
            )

    def __str__(self) -> str:
        return f"{self.nbytes:,} bytes ({readable(self.nbytes)})"


def read(text: str) -> tuple[float, str]:
    """The amount and its unit, "%", "bit" or "B" (bytes), without knowing the model.

    Raises:
        BudgetError: as `Budget.parse`.
    """
    if len(text) > _LONGEST:
        raise BudgetError(f"budget {text[:_LONGEST]!r}... is not a size; {_FORMS}")
    share, size = _SHARE.fullmatch(text.strip()), _SIZE.fullmatch(text.strip())
    if share:
        return float(share[1]), "%" if share[2] == "%" else "bit"
    if size is None:
        raise BudgetError(f"budget {text!r} is not a size; {_FORMS}")
    if size[3] == "b" and size[2] and size[2] != size[2].lower():
        raise BudgetError(f"budget {text!r} counts bits; write {size[1]}{size[2]}B for bytes")
    return float(TypeAdapter(ByteSize).validate_python(f"{size[1]}{size[2]}B")), "B"


def readable(nbytes: int) -> str:
    """Decimal and binary: "5 MB, 4.77 MiB"."""
    for power, decimal, binary in ((4, "TB", "TiB"), (3, "GB", "GiB"), (2, "MB", "MiB"), (1, "kB", "KiB")):
        if nbytes >= 0.9995 * 1000**power:
            return f"{nbytes / 1000**power:.3g} {decimal}, {nbytes / 1024**power:.3g} {binary}"
    return f"{nbytes} B"
