"""Share work between the processes that `accelerate launch` started, on one machine or several.

Every piece of work has a name; each process makes its share and hands the results to the others, so that all of them
end with all pieces, in whatever folder each keeps its own. Alone, a process makes everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.sensitivity.records import Piece, Records
from bitpolicy.sensitivity.trajectory.trajectories import LoopError

T = TypeVar("T")
Make = Callable[[Sequence[str]], Iterable[tuple[str, Piece]]]


def launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _state() -> PartialState:
    """This process among the others; the first call meets them."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_main() -> bool:
    """Whether this process is the one that speaks and writes results."""
    return not launched() or _state().is_main_process


def device_of_this_process() -> torch.device | None:
    """The accelerator that `accelerate launch` gave to this process; None where it runs alone."""
    return _state().device if launched() else None


def complete(records: Records, names: Sequence[str], make: Make) -> dict[str, dict[str, torch.Tensor]]:
    """All pieces of these names, those that are on disk as they are, the others made by `make`.

    Args:
        make: given the names to make, in order, yields each piece when it is finished; it is kept at once.

    Raises:
        LoopError: `make` raised it, in any process.
    """
    pieces = {name: found for name in names if (found := records.get(name)) is not None}
    missing = _agreed([name for name in names if name not in pieces], names)
    made: dict[str, Piece] = {}
    failures: list[str] = []
    try:
        for name, piece in make(_share(missing)):
            records.put(name, piece)
            made[name] = piece
    except LoopError as error:  # the others have to hear of it: they would wait for this process's pieces
        failures.append(str(error))
    if failures := _everyones(failures):
        raise LoopError(failures[0])
    for name, piece in dict(_everyones(list(made.items()))).items():
        pieces.setdefault(name, dict(piece))
        if name not in made and records.get(name) is None:  # each process may keep a folder of its own
            records.put(name, piece)
    return {name: pieces[name] for name in names}


def complete_files(
    paths: Mapping[str, Path], whole: Callable[[str], bool], make: Callable[[Sequence[str]], None]
) -> None:
    """The same for files that are too large to be held: those that are not whole are written by `make`.

    Args:
        paths: where the file of each name belongs.
        make: given the names to make, in order, writes their files.
    """
    missing = _agreed([name for name in paths if not whole(name)], list(paths))
    mine = set(_share(missing))
    make([name for name in missing if name in mine])
    if not launched():
        return
    for name in missing:
        if any(_everyones([not paths[name].exists()])):  # each process may keep a folder of its own
            content = _everyones([paths[name].read_bytes()] if name in mine else [])[0]
            if name not in mine:
                with written_aside(paths[name]) as aside:
                    aside.write_bytes(content)


def _agreed(missing: list[str], order: Sequence[str]) -> list[str]:
    """What any process lacks, in order."""
    anywhere = set(_everyones(missing))
    return [name for name in order if name in anywhere]


def _share(names: list[str]) -> list[str]:
    """This process's part: neighbours stay together."""
    if not launched():
        return names
    with _state().split_between_processes(names) as mine:
        return list(mine)


def _everyones(items: list[T]) -> list[T]:
    """The items of all processes, in their order."""
    if not launched():
        return items
    _state()
    return list(gather_object(items))
