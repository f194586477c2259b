"""The ordeal of files: one file of one artefact is damaged, then used as a user would use it.

A case is a number. Together with the seed it determines the artefact, the file, the damage and the operation.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from ordeals import operations as do
from ordeals.artefacts import Artefacts
from ordeals.damage import NOBODY, SYSTEM, damage
from ordeals.judge import SAME, Values, Verdict, judged
from ordeals.values import loaded_by_diffusers

Operation = Callable[[Path], Values]
"""An operation on a copy of an artefact's folder."""


OUTSIDE = [path for path in SYSTEM if not path.startswith("/proc")]  # inodes change by themselves there


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        name: the name of the row.
        root: the folder that is copied.
        files: patterns of the files that may be damaged in it.
        operations: name, weight and function of each.
        weight: how often the row is drawn.
        only_damaged: whether operations get the damaged file instead of its folder.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    operations: tuple[tuple[str, int, Operation], ...]
    weight: int
    only_damaged: bool = False

    def choose(self, draw: Random) -> tuple[str, Path]:
        """Draw the name of an operation and the relative path of a file in the folder."""
        name = draw.choices([n for n, _, _ in self.operations], [w for _, w, _ in self.operations])[0]
        found = sorted({p for glob in self.files for p in self.root.glob(glob) if p.is_file()})
        return name, draw.choice(found).relative_to(self.root)


@dataclass(frozen=True)
class Case:
    """One case and its verdict."""

    number: int
    row: str
    file: str
    done: str
    operation: str
    verdict: Verdict


class Files:
    """All cases of one seed.

    Args:
        work: the folder for copies, which are removed after each case.
    """

    def __init__(self, made: Artefacts, seed: int, work: Path) -> None:
        self._made, self._seed, self._work = made, seed, work
        self.kinds = kinds(made)
        self._expected: dict[tuple[str, str, str], Values] = {}
        self._outside = _identities(OUTSIDE)

    def case(self, number: int) -> Case:
        """Run one case."""
        draw = Random(f"{self._seed} {number}")
        kind = draw.choices(self.kinds, [kind.weight for kind in self.kinds])[0]
        name, file = kind.choose(draw)
        expected = self._whole(kind, name, file)
        copy = self._copy(kind, "case")
        done = damage(copy / file, draw)
        act = partial(self._act, kind, name, file, copy)
        verdict = judged(act, expected, as_nobody=done == "unreadable" and _open_to_all(copy))
        self._require_untouched(number)
        _removed(copy.parent)
        return Case(number, kind.name, str(file), done, name, verdict)

    def _require_untouched(self, number: int) -> None:
        """Stop at once if a case replaced a file of the system that a link leads to: root can."""
        now = _identities(OUTSIDE)
        if changed := [path for path, identity in self._outside.items() if now[path] != identity]:
            raise RuntimeError(f"case {number} replaced {', '.join(changed)}, to which a damaged file is a link")

    def cases(self, first: int, count: int) -> Iterator[Case]:
        for number in range(first, count):
            yield self.case(number)

    def _whole(self, kind: Kind, name: str, file: Path) -> Values:
        """What the operation returns when nothing is damaged."""
        key = (kind.name, name, str(file) if kind.only_damaged else "")
        if key not in self._expected:
            copy = self._copy(kind, "whole")
            verdict = judged(partial(self._act, kind, name, file, copy), None)
            _removed(copy.parent)
            if verdict.outcome != SAME:
                raise RuntimeError(
                    f"{kind.name}, {name}: with undamaged files the outcome is {verdict.outcome}: {verdict.detail}"
                )
            self._expected[key] = json.loads(verdict.detail)
        return self._expected[key]

    def _act(self, kind: Kind, name: str, file: Path, copy: Path) -> Values:
        operation = next(act for n, _, act in kind.operations if n == name)
        return operation(copy / file if kind.only_damaged else copy)

    def _copy(self, kind: Kind, name: str) -> Path:
        copy = self._work / name / kind.root.name
        _removed(copy.parent)
        shutil.copytree(kind.root, copy)
        if os.geteuid() == 0:  # the user of the case writes to it
            for path in (copy.parent, copy, *copy.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        return copy


def _identities(paths: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """The type and inode of what is at each path; None if there is nothing."""
    found: dict[str, tuple[int, int] | None] = {}
    for path in paths:
        try:
            state = os.stat(path)
        except OSError:
            found[path] = None
        else:
            found[path] = (state.st_mode, state.st_ino)
    return found


def _open_to_all(folder: Path) -> bool:
    """Whether another user can reach the folder: one of its parents may be private."""
    return all(parent.stat().st_mode & 0o001 for parent in folder.resolve().parents)


def _removed(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def kinds(made: Artefacts) -> list[Kind]:
    """The rows of the table. Resumed searches take seconds, so there are few of them."""
    load = (("load_pipeline", 8, do.loaded), ("inspect", 1, do.inspected), ("eval", 1, partial(do.evaluated, made)))
    plain = (("from_pretrained", 1, loaded_by_diffusers),)
    run, checkpoint = made.run, made.run / "checkpoint"
    names = _layers(checkpoint)
    resume = ("resume", 1, partial(do.resumed, made, reset=True))
    again = ("the same command", 1, partial(do.resumed, made, reset=False))
    found = [
        Kind("denoiser", checkpoint, ("unet/*",), load, 14),
        Kind("denoiser in shards", made.sharded, ("unet/*",), load, 8),
        Kind("all components packed", made.whole, ("*/*.safetensors", "*/config.json"), load, 10),
        Kind("text encoder", checkpoint, ("text_encoder/*",), load, 6),
        Kind("VAE", checkpoint, ("vae/*",), load, 6),
        Kind("tokenizer", checkpoint, ("tokenizer/*",), load, 6),
        Kind("scheduler", checkpoint, ("scheduler/*",), load, 4),
        Kind("model_index.json", checkpoint, ("model_index.json",), load, 6),
        Kind("manifest, policy, card", checkpoint, ("*.json", "*.yaml", "*.md"), load, 3),
        Kind("packed models, from_pretrained", made.whole, ("*/*.safetensors", "*/config.json"), plain, 6),
        Kind("other files, from_pretrained", checkpoint, ("[tsv]*/*", "*.json"), plain, 6),
        Kind("source pipeline", made.toy, ("**/*.*",), (("export", 1, partial(_source, made)),), 6),
        Kind(
            "policy.yaml",
            run,
            ("policy.yaml",),
            (("load", 5, partial(_policy, names, run)), ("export", 1, partial(_by_policy, made, names))),
            8,
        ),
        Kind(
            "calibration",
            run,
            ("calibration.safetensors",),
            (("load", 3, partial(_calibration, names)), _export(made)),
            5,
        ),
        Kind("table, split, check", made.probed, ("s*.safetensors", "check.json"), (("load", 40, do.probed),), 6),
        Kind("report", made.probed, ("s*.safetensors", "check.json"), (("report", 1, do.reported),), 1),
        Kind("run.json", run, ("run.json",), (again,), 3),
        Kind("result.json", run, ("result.json",), (again,), 3),
        Kind("study.journal", run, ("study.journal",), (resume,), 2),
        Kind("pieces of a probe", run, ("work/**/*.safetensors",), (("get", 1, partial(_piece, run)),), 4, True),
        Kind("a search's folder, resumed", run, ("*.*", "work/**/*.safetensors"), (resume,), 1),
        Kind("kernel cache", made.cache, ("*",), (("draw", 1, partial(_computed, checkpoint)),), 3),
    ]
    return found


def _source(made: Artefacts, folder: Path) -> Values:
    return do.source_exported(made, folder, folder.parent / "out")


def _export(made: Artefacts) -> tuple[str, int, Operation]:
    return "export", 1, lambda folder: do.exported(made, folder, folder.parent / "out")


def _policy(names: list[str], whole: Path, folder: Path) -> Values:
    return do.policy_values(folder / "policy.yaml", names, whole / "policy.yaml")


def _by_policy(made: Artefacts, names: list[str], folder: Path) -> Values:
    found = do.exported(made, folder, folder.parent / "out")
    _policy(names, made.run, folder)  # raises KnownDifference for another valid policy, which makes another checkpoint
    return found


def _calibration(names: list[str], folder: Path) -> Values:
    return do.calibration_values(folder / "policy.yaml", names)


def _piece(run: Path, path: Path) -> Values:
    inside = path.parts[
        len(path.parts) - 1 - path.parts[::-1].index("work") :
    ]  # a parent folder may have that name too
    return do.piece_values(path, run.joinpath(*inside))


def _computed(checkpoint: Path, folder: Path) -> Values:
    return do.computed(folder, checkpoint)


def _layers(checkpoint: Path) -> list[str]:
    """Names of the denoiser's quantizable layers, from its config."""
    import torch
    from diffusers import UNet2DConditionModel

    from bitpolicy.kernels.layers import quantizable_layers

    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    return [name for name, _ in quantizable_layers(model)]
