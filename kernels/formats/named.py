"""The available formats, by the names users write.

int2 ... int8   integer codes; int8 has one scale per output channel and no zero point; the narrower ones have a scale
                and a zero point for each 64 weights
-g32 -g64 -g128 -channel    another group size
-sym -asym                  without or with a zero point, if that differs from the default
-rot                        each group of weights rotated first, for layers whose row length it divides
nf4, fp8, fp16
fp8-tensor fp8-row mxfp8 mxfp4 nvfp4    those that processors multiply; fp8-row is fp8; the others are not part of "all"
int4-convrot int8-convrot   rotated as in ComfyUI, in blocks of 256; -convrot64 in blocks of 64; not part of "all"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.convrot import ConvRot
from bitpolicy.kernels.formats.elements import E2M1, E4M3
from bitpolicy.kernels.formats.float_codes import Float8, NormalFloat4
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.kernels.formats.microscaling import Microscaled
from bitpolicy.kernels.formats.plain import Plain
from bitpolicy.kernels.formats.tensor_scaled import NvFloat4, TensorFloat8
from bitpolicy.kernels.names import DEFAULT_FORMATS, WRITE

FP16 = Plain("fp16")
INT8 = Int8("int8")
FP8 = Float8("fp8")
_OTHERS: dict[str, Format] = {f.name: f for f in (FP16, INT8, NormalFloat4("nf4"), FP8)}
CONVROT: tuple[Format, ...] = tuple(
    ConvRot(f"int{bits}-convrot{'' if size == 256 else size}", bits, size) for bits in (4, 8) for size in (256, 64)
)
FP8_TENSOR = TensorFloat8("fp8-tensor")
MXFP8, MXFP4 = Microscaled("mxfp8", E4M3), Microscaled("mxfp4", E2M1)
NVFP4 = NvFloat4("nvfp4")
HARDWARE: tuple[Format, ...] = (NVFP4, MXFP4, FP8_TENSOR, MXFP8)
_OTHERS |= {f.name: f for f in (*CONVROT, *HARDWARE)} | {"fp8-row": FP8}
_AFFINE = re.compile(r"int([2-8])(?:-(g32|g64|g128|channel))?(?:-(a?sym))?(-rot)?")
_BITS = (2, 3, 4, 5, 6, 7, 8)
_GROUPS = (32, 64, 128, None)


def format_named(name: str) -> Format:
    """The format called `name`.

    Raises:
        FormatError: there is no such format; the message lists the names.
    """
    wanted = name.strip().lower()
    if wanted in _OTHERS:
        return _OTHERS[wanted]
    found = _AFFINE.fullmatch(wanted)
    if found is None:
        raise FormatError(f"unknown format {name!r}; write {WRITE}")
    bits, group, symmetry, rotated = found.groups()
    channel = group == "channel" or (group is None and bits == "8")
    width = None if channel else int(group[1:]) if group else 64
    if rotated and width is None:
        raise FormatError(f"unknown format {name!r}: rotation needs groups of 32, 64 or 128 weights; add -g64")
    return affine(int(bits), width, symmetry == "sym" or (symmetry is None and bits == "8"), bool(rotated))


def affine(bits: int, group: int | None, symmetric: bool, rotated: bool = False) -> Format:
    """The integer format with these parameters, under its shortest name."""
    usual = (None, True) if bits == 8 else (64, False)
    if bits == 8 and (group, symmetric) == usual and not rotated:
        return INT8
    name = f"int{bits}"
    if group != usual[0]:
        name += "-channel" if group is None else f"-g{group}"
    if symmetric != usual[1]:
        name += "-sym" if symmetric else "-asym"
    return Affine(name + "-rot" * rotated, bits, group, symmetric, rotated)


def all_formats() -> tuple[Format, ...]:
    """Every format except those of particular programs and processors (`CONVROT`, `HARDWARE`), narrow ones first, FP16
    last."""
    plain = [affine(bits, group, symmetric) for bits in _BITS for group in _GROUPS for symmetric in (True, False)]
    rotated = [affine(bits, group, True, rotated=True) for bits in _BITS for group in _GROUPS if group]
    rotated += [affine(bits, group, False, rotated=True) for bits in _BITS for group in _GROUPS if group]
    floats = [_OTHERS["nf4"], FP8]
    return (*plain, *rotated, *floats, FP16)


def parse_formats(text: str | Sequence[str]) -> tuple[Format, ...]:
    """Parse "int4,int8,fp16", "all", or a sequence of names. Repeats are dropped and `fp16` is always last.

    fp16 is added if absent, because some layers suit no integer format.
    """
    names = re.split(r"[,\s]+", text.strip(", \t\n")) if isinstance(text, str) else list(text)
    if not names or names == [""]:
        raise FormatError(f"no format given; write for example --formats {','.join(DEFAULT_FORMATS)}")
    if any(name.strip().lower() == "all" for name in names):
        return all_formats()
    chosen = dict.fromkeys(format_named(name) for name in names)
    chosen.pop(FP16, None)
    return (*chosen, FP16)


def canonical_names(text: str | Sequence[str]) -> tuple[str, ...]:
    """The names of `parse_formats(text)`. "all" stays "all", since which formats suit a model is decided later."""
    formats = parse_formats(text)
    return ("all",) if formats == all_formats() else tuple(format.name for format in formats)


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
