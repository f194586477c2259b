"""The formats that exist, by the names people write: `int4`, `int4-g32`, `int8`, `fp16`.

A new format is one file with its arithmetic and one line in `_REGISTERED`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.int4 import Int4
from bitpolicy.kernels.int8 import Int8
from bitpolicy.kernels.plain import Plain

FP16 = Plain("fp16")
_REGISTERED: dict[str, Format] = {
    format.name: format for format in (Int4("int4"), Int4("int4-g32", 32), Int4("int4-g128", 128), Int8("int8"), FP16)
}
DEFAULT = ("int4", "int8", "fp16")


def format_named(name: str) -> Format:
    """The format called `name`.

    Raises:
        FormatError: there is none; the message lists those that exist.
    """
    found = _REGISTERED.get(name.strip().lower())
    if found is None:
        raise FormatError(f"unknown format {name!r}; write any of {', '.join(_REGISTERED)}")
    return found


def parse_formats(text: str | Sequence[str]) -> tuple[Format, ...]:
    """Read "int4,int8,fp16" (or a sequence of names) as formats, repeats dropped, `fp16` always last.

    fp16 is added when absent: a layer that no integer format suits must have somewhere to go.
    """
    names = re.split(r"[,\s]+", text.strip(", \t\n")) if isinstance(text, str) else list(text)
    if not names or names == [""]:
        raise FormatError(f"no format given; write for example --formats {','.join(DEFAULT)}")
    chosen = dict.fromkeys(format_named(name) for name in names)
    chosen.pop(FP16, None)
    return (*chosen, FP16)


def from_parameters(name: str, parameters: dict[str, object]) -> Format:
    """The format called `name`, checked against the parameters that a file recorded for it.

    Raises:
        FormatError: the name is unknown here or means something else in this version.
    """
    found = format_named(name)
    if found.parameters() != parameters:
        raise FormatError(
            f"format {name!r} was written as {parameters}; here it is {found.parameters()}; "
            "use the bitpolicy that wrote it"
        )
    return found
