"""What sets a command apart from a call in Python: it answers at once, and other libraries are quiet in it.

Importing diffusers takes seconds and imports every quantization library that is installed, some of which print warnings
about each other, as torchao 0.18 does beside torch 2.14 or newer. Who runs a command can do nothing about them, and an
error has to stay one line. So a command reads its options first, and imports what carries it out then, and quietly. Who
imports bitpolicy in Python hears everything, as from diffusers itself.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bitpolicy.kernels.errors import BitPolicyWarning

_in_a_command: ContextVar[bool] = ContextVar("in_a_command", default=False)


def in_a_command() -> bool:
    """Whether a command calls: messages then spell options as the command line does."""
    return _in_a_command.get()


@contextmanager
def command() -> Iterator[None]:
    """While the block runs, functions of the Python interface are called by a command."""
    before = _in_a_command.set(True)
    try:
        yield
    finally:
        _in_a_command.reset(before)


@contextmanager
def importing(options: Mapping[str, Any]) -> Iterator[None]:
    """Neither warnings nor log records while a command imports what carries it out, and little of them afterwards.

    Args:
        options: of the command; `debug` lets everything through, `quiet` and `as_json` show no sign of life.
    """
    if options.get("debug"):
        yield
        return
    before = logging.root.manager.disable
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or counting allocations warns of those it did not see
    shown = not (options.get("quiet") or options.get("as_json"))
    with _sign_of_life(shown), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
    _hush()


@contextmanager
def _sign_of_life(shown: bool) -> Iterator[None]:
    """A line on the terminal while the libraries are imported, which takes seconds; gone afterwards."""
    if not shown or not sys.stderr.isatty():
        yield
        return
    sys.stderr.write("loading libraries ...")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _hush() -> None:
    """Other libraries' chatter would bury the progress bars. Our own warnings are a line each."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=BitPolicyWarning)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    logging.getLogger("torch").setLevel(logging.ERROR)
    for library in (sys.modules.get("diffusers"), sys.modules.get("transformers")):
        if library is not None:
            library.utils.logging.set_verbosity(logging.CRITICAL)
            library.utils.logging.disable_progress_bar()
