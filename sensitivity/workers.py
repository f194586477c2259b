"""Share work between the processes that `accelerate launch` started, on one machine or several.

Every piece of work has a name. Each process makes its share and sends the results to the others, so that every process
ends up with all pieces, even if each has its own folder. A process that runs alone makes everything.
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
    """The state of this process. The first call connects it to the others."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_main() -> bool:
    """Whether this process prints and writes the results."""
    return not launched() or _state().is_main_process


def device_of_this_process() -> torch.device | None:
    """The accelerator that `accelerate launch` assigned to this process; None if it runs alone."""
    return _state().device if launched() else None


def complete(records: Records, names: Sequence[str], make: Make) -> dict[str, dict[str, torch.Tensor]]:
    """All pieces of these names. Pieces on disk are reused, and `make` makes the others.

    Args:
        make: receives the names to make, in order, and yields each piece when it is finished; it is stored at once.

    Raises:
        LoopError: `make` raised it, in any process.
    """
    pieces = {name: found for name in names if (found := records.get(name)) is not None}
    missing = _missing_anywhere([name for name in names if name not in pieces], names)
    made: dict[str, Piece] = {}
    failures: list[str] = []
    try:
        for name, piece in make(_share(missing)):
            records.put(name, piece)
            made[name] = piece
    except LoopError as error:  # the others must be told, or they would wait for this process's pieces
        failures.append(str(error))
    if failures := _gathered(failures):
        raise LoopError(failures[0])
    for name, piece in dict(_gathered(list(made.items()))).items():
        pieces.setdefault(name, dict(piece))
        if name not in made and records.get(name) is None:  # each process may have its own folder
            records.put(name, piece)
    return {name: pieces[name] for name in names}


def complete_files(
    paths: Mapping[str, Path], whole: Callable[[str], bool], make: Callable[[Sequence[str]], None]
) -> None:
    """Like `complete`, for files too large to hold in memory. `make` writes those that are not whole.

    Args:
        paths: name -> file.
        whole: whether the file of a name is there and undamaged.
        make: receives the names to make, in order, and writes their files.
    """
    missing = _missing_anywhere([name for name in paths if not whole(name)], list(paths))
    mine = set(_share(missing))
    make([name for name in missing if name in mine])
    if not launched():
        return
    for name in missing:
        if any(_gathered([not paths[name].exists()])):  # each process may have its own folder
            content = _gathered([paths[name].read_bytes()] if name in mine else [])[0]
            if name not in mine:
                with written_aside(paths[name]) as aside:
                    aside.write_bytes(content)


def _missing_anywhere(missing: list[str], order: Sequence[str]) -> list[str]:
    """The names that any process lacks, in order."""
    anywhere = set(_gathered(missing))
    return [name for name in order if name in anywhere]


def _share(names: list[str]) -> list[str]:
    """This process's share of the names. Neighbours stay together.

    accelerate's own `split_between_processes` is made for padding: it gives the last name to every process that would
    get none, and two processes would then write the same file.
    """
    if not launched():
        return names
    rank, processes = _state().process_index, _state().num_processes
    return names[len(names) * rank // processes : len(names) * (rank + 1) // processes]


def _gathered(items: list[T]) -> list[T]:
    """The items of all processes, in the order of the processes."""
    if not launched():
        return items
    _state()
    return list(gather_object(items))
