"""Whether this process runs one of our commands, and then: imports that print nothing.

Importing diffusers imports every quantization library that is installed, and some print warnings about each other, as
torchao 0.18 does beside torch 2.14 or newer. Who runs a command can do nothing about them, and an error has to stay one
line. Who imports bitpolicy hears them, as from diffusers itself.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SILENT = frozenset({"--quiet", "--json", "--help", "--version"})
_COMMANDS = ("bitpolicy", "search-policy")


def runs_a_command() -> bool:
    """Whether this process was started as `bitpolicy`, `search-policy` or `python -m bitpolicy`."""
    if sys.argv[:1] == ["-m"]:  # the name comes when the package has been imported
        return _follows("-m", "bitpolicy")
    name = Path(sys.argv[0]) if sys.argv else Path()
    return name.stem in _COMMANDS or (name.name == "__main__.py" and name.parent.name == "bitpolicy")


@contextmanager
def quiet_if_a_command() -> Iterator[None]:
    """Neither warnings nor log records while a command imports what it needs; --debug lets them through."""
    if not runs_a_command() or "--debug" in sys.argv:
        yield
        return
    before = logging.root.manager.disable
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or counting allocations warns of those it did not see
    with _sign_of_life(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _sign_of_life() -> Iterator[None]:
    """A line on the terminal while the libraries are imported, which takes seconds; gone afterwards."""
    if not sys.stderr.isatty() or not _SILENT.isdisjoint(sys.argv):
        yield
        return
    sys.stderr.write("loading libraries ...")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _follows(option: str, name: str) -> bool:
    pairs = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return (option, name) in pairs
