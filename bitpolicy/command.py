"""What makes a command different from a call in Python: it responds at once, and other libraries stay quiet.

Importing diffusers takes seconds and imports every quantization library that is installed. Some of them print warnings
about each other, as torchao 0.18 does with torch 2.14 or newer. The user of a command can do nothing about these
warnings, and an error must stay on one line. A command therefore parses its options first, and then quietly imports the
code that carries it out. Code that imports bitpolicy in Python gets all warnings, as from diffusers itself.
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
    """Whether a command is running. Messages then spell options as on the command line."""
    return _in_a_command.get()


@contextmanager
def command() -> Iterator[None]:
    """Inside the block, functions of the Python interface are called by a command."""
    before = _in_a_command.set(True)
    try:
        yield
    finally:
        _in_a_command.reset(before)


@contextmanager
def importing(options: Mapping[str, Any]) -> Iterator[None]:
    """Silence warnings and logs while a command imports the code that carries it out, and most of them afterwards.

    Args:
        options: the command's options; `debug` lets everything through, `quiet` and `as_json` hide the loading message.
    """
    if options.get("debug"):
        yield
        return
    before = logging.root.manager.disable
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise counting allocations warns about those it missed
    shown = not (options.get("quiet") or options.get("as_json"))
    with _loading_message(shown), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
    _silence_libraries()


@contextmanager
def _loading_message(shown: bool) -> Iterator[None]:
    """A line on the terminal during the imports, which take seconds. It is erased afterwards."""
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


def _silence_libraries() -> None:
    """Silence other libraries, whose output would bury the progress bars. Print our own warnings in one line each."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=BitPolicyWarning)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    logging.getLogger("torch").setLevel(logging.ERROR)
    for library in (sys.modules.get("diffusers"), sys.modules.get("transformers")):
        if library is not None:
            library.utils.logging.set_verbosity(logging.CRITICAL)
            library.utils.logging.disable_progress_bar()
