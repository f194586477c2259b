"""Entry points. A user's mistake is one line on stderr and exit code 2; a bug keeps its traceback."""

from __future__ import annotations

import errno
import re
import sys
from typing import Any

import typer
from safetensors import SafetensorError

from bitpolicy.cli.command_line import Command
from bitpolicy.cli.commands import evaluate, export, formats, inspect, probe, report, search
from bitpolicy.cli.options import Version
from bitpolicy.command import command
from bitpolicy.kernels.errors import BitPolicyError

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's own, which typer does not export
_STOPPED = 130  # exit code of a shell for SIGINT; typer returns it, too
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "the disk, or a limit for this user, does not allow a file of this size",
}
_DISK[errno.EACCES] = "permission denied"
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors' own errors name it

_settings: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}
app = typer.Typer(
    help="Mixed-precision quantization of diffusion models, chosen by the finished image.",
    no_args_is_help=True,
    **_settings,
)
app.command("search", cls=Command)(search)
app.command("probe", cls=Command)(probe)
app.command("export", cls=Command)(export)
app.command("eval", cls=Command)(evaluate)
app.command("inspect", cls=Command)(inspect)
app.command("report", cls=Command)(report)
app.command("formats", cls=Command)(formats)
search_app = typer.Typer(**_settings)
search_app.command(cls=Command)(search)


@app.callback()
def _bitpolicy(version: Version = False) -> None:
    """Options of `bitpolicy` itself."""


def main() -> None:
    """The command `bitpolicy`."""
    sys.exit(_run(app, "bitpolicy"))


def search_policy() -> None:
    """The command `search-policy`."""
    sys.exit(_run(search_app, "search-policy"))


def _run(commands: typer.Typer, name: str) -> int:
    """Run a command line and return its exit code."""
    debug = "--debug" in sys.argv
    try:
        with command():
            code = int(commands(args=sys.argv[1:], prog_name=name, standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = _STOPPED
    except _UsageError as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        return _mistake(name, message, error, debug) if message else 2  # `bitpolicy` alone has printed its help
    except BitPolicyError as error:
        return _mistake(name, str(error), error, debug)
    except SafetensorError as error:
        found = _SYSTEM_ERROR.search(str(error))
        if found is None or int(found[1]) not in _DISK:
            raise
        return _mistake(name, f"{_DISK[int(found[1])]}; fix that and run the same command again", error, debug)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _mistake(name, f"{_DISK[error.errno]}{where}; fix that and run the same command again", error, debug)
    if code == _STOPPED:
        print(f"{name}: stopped; run the same command again to continue", file=sys.stderr)
    return code


def _mistake(name: str, message: str, error: Exception, debug: bool) -> int:
    if debug:
        raise error
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2
