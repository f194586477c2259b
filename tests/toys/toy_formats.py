"""Formats of every kind, where all hundred would take too long: what one promises, its sisters promise too."""

from __future__ import annotations

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named

_EVERY_WIDTH = "int2 int3 int4 int5 int6 int7 int8-g64-asym"
_EVERY_GROUP_AND_SYMMETRY = "int4-g32 int4-g128 int4-channel int4-g32-sym int4-sym int4-g128-sym int4-channel-sym"
_OTHERS = "int3-channel-sym int8-g64 int2-g32-sym"
_ROTATED = "int4-rot int3-g32-rot int5-g128-sym-rot int8-g32-sym-rot"
_FLOATS = "nf4 fp8 int8 fp16"
_HARDWARE = "nvfp4 mxfp4 mxfp8 fp8-tensor"

KINDS: tuple[Format, ...] = tuple(
    format_named(name)
    for names in (_EVERY_WIDTH, _EVERY_GROUP_AND_SYMMETRY, _OTHERS, _ROTATED, _HARDWARE, _FLOATS)
    for name in names.split()
)
"""One format of every kind, and FP16."""

PACKED: tuple[Format, ...] = tuple(format for format in KINDS if format.packed)

WITHOUT_CPP = ("nvfp4", "mxfp4", "mxfp8")
"""Formats that only plain torch code dequantizes."""

FEW: tuple[Format, ...] = tuple(
    format_named(name)
    for names in ("int4 int4-g32 int4-g128 int5-sym int3-channel int6-rot nf4 fp8 int8", _HARDWARE, "fp16")
    for name in names.split()
)
"""One of each way of storing, where even the kinds are too many; rotated runs of 64."""

E2M1_LEVELS = tuple(sign * size for sign in (1, -1) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""By code: OCP Microscaling Formats Specification v1.0, table 5."""

# As bitsandbytes publishes them: functional.py, get_4bit_type("nf4").
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
