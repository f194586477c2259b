"""Compiles the C++ sources in `csrc/` on first use with the machine's own compiler, and loads them with ctypes.

    python -m bitpolicy.kernels.cpu.extension     builds the library in advance, and prints its path or why it failed

The sources have a plain C interface, so they compile in seconds. The library is stored in the cache folder. Its name
has a hash of sources, flags, compiler and processor, and its own checksum, so a stale or damaged library, or one built
for another machine, is never loaded. It is written atomically, so any number of processes may build it at once. If it
cannot be built, the kernels that need it refuse their calls, and plain torch code computes the same results.

`CXX` names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bitpolicy.kernels.cache_folder import cache_folder, is_own, keep

_log = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("c++", "g++", "clang++")
# No contraction: a product and a sum must be rounded separately, as in torch. -w: GCC warns about its own headers.
_FLAGS = "-std=c++17 -O3 -march=native -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -w".split()
_OPENMP: tuple[list[str], ...] = (
    ["-fopenmp"],
    [],
)  # for compiling only: at run time its functions come from the library that torch has loaded
_PATIENCE = 300  # seconds
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SIGNATURES: dict[str, list[Any]] = {
    "bitpolicy_dequantize_groups": [c_void_p] * 6 + [c_int],
    "bitpolicy_dequantize_bytes": [c_void_p] * 3 + [c_int64] * 2 + [c_void_p, c_int, c_int],
    "bitpolicy_few_rows": [c_void_p] * 6 + [c_int64] + [c_void_p] * 2 + [c_int],
    "bitpolicy_has_int8": [],
}
_SIGNATURES_OF_INT8: dict[str, list[Any]] = {
    "bitpolicy_int8_pack": [c_void_p] + [c_int64] * 3 + [c_void_p] * 2,
    "bitpolicy_int8_multiply": [c_void_p] * 9 + [c_int, c_int],
}


class Unavailable(Exception):
    """Why the library is not available, in a few words."""


def library() -> ctypes.CDLL | None:
    """The loaded library, or None if it cannot be built; `why_unavailable` then gives the reason."""
    return _loaded()[0]


def why_unavailable() -> str | None:
    """Why the kernels of this library refuse, in a few words; None if the library is available."""
    return _loaded()[1]


def has_int8() -> bool:
    """Whether the library can multiply 8-bit integers on this processor."""
    found = library()
    return found is not None and bool(found.bitpolicy_has_int8())


def dtype_code(dtype: torch.dtype) -> int | None:
    """The library's code for a dtype; None if it does not support it."""
    return _DTYPES.get(dtype)


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return build(), None
    except Unavailable as reason:
        _log.debug("no C++ kernels: %s", reason)
        return None, f"this machine cannot build it: {reason}"


def build() -> ctypes.CDLL:
    """The library, compiled if it is not in the cache.

    Raises:
        Unavailable: there is no compiler, it fails, or the cache folder is not writable.
    """
    compiler = find_compiler()
    reasons = []
    for openmp in (*_OPENMP, *_OPENMP):  # the second round is for a broken cache file, which the first one deleted
        try:
            return _open(_compiled(compiler, [*_FLAGS, *openmp]))
        except (Unavailable, OSError) as reason:
            reasons.append(str(reason))
    raise Unavailable(reasons[0])


def find_compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        Unavailable: there is no compiler.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [[name] for name in _COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"no C++ compiler: found none of {', '.join(command[0] for command in candidates)}")


def _compiled(compiler: list[str], flags: list[str]) -> Path:
    """The library for these flags, from the cache if an intact one is there."""
    cache, name = cache_folder(), f"kernels-{_key(compiler, flags)}"
    if found := next(filter(_is_sound, sorted(cache.glob(f"{name}-*.so"))), None):
        return found
    sources = sorted(SOURCES.glob("*.cpp"))
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as folder:
            objects = [os.path.join(folder, source.stem + ".o") for source in sources]
            for source, result in zip(sources, objects, strict=True):
                _run([*compiler, *flags, "-c", str(source), "-o", result])
            built = Path(folder) / "kernels.so"
            _run([*compiler, "-shared", *objects, "-o", str(built)])
            path = cache / f"{name}-{_checksum(built)}.so"
            if not keep(path, built.read_bytes()):
                raise Unavailable(f"cannot write to the cache folder {cache}")
    except OSError as error:
        raise Unavailable(f"cannot write to the cache folder {cache}: {error.strerror or error}") from None
    return path


def _checksum(path: Path) -> str:
    """The last part of a library's name. Loading an incomplete file would kill the process."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _is_sound(path: Path) -> bool:
    """Whether a cached library is unchanged and was written by this user."""
    try:
        return is_own(path) and path.stem.rpartition("-")[2] == _checksum(path)
    except OSError:
        return False


def _key(compiler: list[str], flags: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*compiler, *flags, _run([*compiler, "--version"]), _processor()]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took longer than {_PATIENCE} s") from None
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error.strerror}") from None
    if done.returncode:
        complaint = (done.stderr.strip() or "no message").splitlines()
        raise Unavailable(f"{command[0]} fails: {next((line for line in complaint if 'error' in line), complaint[0])}")
    return done.stdout


def _processor() -> str:
    """The properties that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def _open(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)  # an incomplete file, or one for another system
        raise
    signatures = dict(_SIGNATURES)
    if found.bitpolicy_has_int8():
        signatures |= _SIGNATURES_OF_INT8
    for name, arguments in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, c_int if name == "bitpolicy_has_int8" else None
    return found


def main() -> int:
    found = library()
    print(found._name if found is not None else f"no C++ kernels: {why_unavailable()}; plain torch computes instead")
    return 0 if found is not None else 1


if __name__ == "__main__":
    sys.exit(main())
