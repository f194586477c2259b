"""Damage to one file of a folder: its content changes, or something that is not a regular file takes its place."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from ordeals.byte_damage import BYTES, header_damaged
from ordeals.text_damage import json_damaged, yaml_damaged

NOBODY = 65534  # a user without access to files that are closed to others
SYSTEM = ("/etc/passwd", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/no/such/file", "/")


def damage(path: Path, draw: Random) -> str:
    """Damage the file and return a description. The damage depends only on `draw` and the content."""
    if draw.random() < 0.12:
        name = draw.choice(sorted(_PLACES))
        _PLACES[name](path, draw)
        return name
    data = path.read_bytes()
    for _ in range(20):
        how = _how(path, draw)
        try:
            found = how(data, draw) if data else draw.randbytes(9)
        except (ValueError, KeyError, IndexError):
            continue  # this kind of damage needs another kind of file
        if found != data:
            path.write_bytes(found)
            return how.__name__.replace("_", " ").strip()
    path.write_bytes(data[:-1])
    return "truncated"


def _how(path: Path, draw: Random) -> Callable[[bytes, Random], bytes]:
    surgeon = {
        ".safetensors": header_damaged,
        ".json": json_damaged,
        ".yaml": yaml_damaged,
        ".journal": _line_damaged,
    }.get(path.suffix)
    return surgeon if surgeon is not None and draw.random() < 0.55 else draw.choice(BYTES)


def _line_damaged(data: bytes, draw: Random) -> bytes:
    """Changes, removes or repeats one line of a journal of JSON lines."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    match draw.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case _:
            lines[at] = json_damaged(lines[at], draw).replace(b"\n", b"") + b"\n"
    return b"".join(lines)


def _missing(path: Path, draw: Random) -> None:
    path.unlink()


def _folder(path: Path, draw: Random) -> None:
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / path.name).write_text("x")


def _link(path: Path, draw: Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice((*SYSTEM, path.name)))


def _pipe(path: Path, draw: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _unreadable(path: Path, draw: Random) -> None:
    path.chmod(0)


def _pickle(path: Path, draw: Random) -> None:
    """Write the output of torch.save, or a plain pickle, under the file's name."""
    import torch

    held = io.BytesIO()
    if draw.random() < 0.5:
        torch.save({"weight": torch.zeros(3)}, held)
    else:
        held.write(pickle.dumps({"weight": [0.0] * 3}))
    path.write_bytes(held.getvalue())


def _beside(path: Path, draw: Random) -> None:
    """Replace the content by that of another file of the folder."""
    files = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    if not files:
        files = [other for other in sorted(path.parents[1].rglob("*")) if other.is_file() and other != path]
    shutil.copy(draw.choice(files), path)


_PLACES: dict[str, Callable[[Path, Random], None]] = {
    "missing": _missing,
    "a folder": _folder,
    "a link": _link,
    "a pipe": _pipe,
    "unreadable": _unreadable,
    "a pickle": _pickle,
    "another file": _beside,
}
