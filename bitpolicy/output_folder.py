"""The folder that holds what a search made: who may write to it, what may be removed, whether it is done."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError, BitPolicyWarning
from bitpolicy.policies.storage.atomic import require_nameable, write_text
from bitpolicy.policies.storage.folder_lock import NAME as LOCK
from bitpolicy.policies.storage.folder_lock import working_in
from bitpolicy.policies.storage.sealed import read_sealed, sealed
from bitpolicy.sensitivity.samples import fingerprint
from bitpolicy.settings import Settings

RESULT = "result.json"
_OURS = (
    *("run.json", "result.json", "policy.yaml", "calibration.safetensors", "sensitivity.safetensors"),
    *("sensitivity.csv", "frontier", "study.journal", "study.journal.torn", "trials.csv", "compare.png"),
    *("checkpoint", "work", "report.html"),
)
_PROBED = ("split.safetensors", "check.json")  # what a probe leaves, and no search makes
_GOES_ON = ("trials", "timeout")  # with more trials or another time limit a search goes on with what it has


def identity_of(settings: Settings) -> dict[str, Any]:
    """JSON values that two runs share exactly when they ask for the same."""
    return json.loads(json.dumps(fingerprint(asdict(settings))))


class OutputFolder:
    """The output of one search. It is claimed by `run.json`; finished once `result.json` is there.

    Raises:
        BitPolicyError: on opening, if the folder holds something else, or cannot be written.
    """

    def __init__(self, path: Path, settings: Settings, *, overwrite: bool, resume: bool) -> None:
        self.path = path
        identity = identity_of(settings)
        held = _claimed(path, identity, overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if held is not None and not (resume and _same_study(held, identity)):
                self._clear(keep_work=resume)
            elif held is None:
                self._clear_probed()
            elif held != identity:
                (path / "result.json").unlink(missing_ok=True)  # of fewer trials
            write_text(path / "run.json", json.dumps(identity, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise _not_writable(path, error) from error

    @classmethod
    @contextmanager
    def claimed(cls, path: Path, settings: Settings, *, overwrite: bool, resume: bool) -> Iterator[OutputFolder]:
        """The folder, for this process alone while the block runs.

        Raises:
            BitPolicyError: as on opening; or another process works in it.
        """
        _claimed(path, identity_of(settings), overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(path, error) from error
        with working_in(path):
            yield cls(path, settings, overwrite=overwrite, resume=resume)

    @staticmethod
    def peek(path: Path, settings: Settings, *, overwrite: bool, resume: bool) -> dict[str, Any] | None:
        """The result of this very search if `path` holds it, finished; nothing is written.

        Raises:
            BitPolicyError: the folder holds something else, or another process works in it.
        """
        identity = identity_of(settings)
        held = _claimed(path, identity, overwrite)
        if (path / LOCK).exists():
            with working_in(path):  # or it is somebody else's, and they are still at it
                pass
        return _finished(path) if resume and held == identity else None

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        return _finished(self.path)

    def finish(self, result: dict[str, Any]) -> None:
        write_text(self.path / RESULT, json.dumps(sealed(result), indent=2, allow_nan=False) + "\n")

    def _clear(self, keep_work: bool) -> None:
        """Remove what an earlier search wrote here, and nothing else; the probe's records may stay, they are keyed."""
        for name in (*_OURS, *_PROBED):
            entry = self.path / name
            if entry.is_dir() and not (keep_work and name == "work"):
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()

    def _clear_probed(self) -> None:
        """Remove what a probe found out beside its table, which the search's own is going to replace."""
        for name in _PROBED:
            (self.path / name).unlink(missing_ok=True)


def _not_writable(path: Path, error: OSError) -> BitPolicyError:
    return BitPolicyError(f"cannot write to {path}: {error.strerror}; choose an --output-dir that can be written")


def require_no_search(path: Path) -> None:
    """
    Raises:
        BitPolicyError: the folder holds a search, whose sensitivity table a probe would replace.
    """
    if holds_a_search(path):
        raise BitPolicyError(
            f"{path} holds a search, and a probe would replace its sensitivity table; give the probe a folder of its "
            f"own, e.g. --output-dir {for_a_probe(path)}"
        )


def holds_a_search(path: Path) -> bool:
    """Whether a search, done or stopped, lies in the folder."""
    return (path / "run.json").is_file() or (path / "policy.yaml").is_file()


def for_a_probe(path: Path) -> Path:
    """A folder for a probe of what the search in `path` was of."""
    whole = path if path.name not in ("", "..") else path.resolve()
    return whole.with_name(f"{whole.name}-probe")


def _claimed(path: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The settings of the search that the folder holds, or None; refuses what must not be touched."""
    require_nameable(path)
    held = _held_identity(path)
    if held is not None and not overwrite and not _same_study(held, identity):
        raise BitPolicyError(
            f"{path} holds a search with {_difference(held, identity)}; choose another --output-dir, or --overwrite it"
        )
    if held is None and path.exists() and (foreign := _foreign(path)) and not overwrite:
        raise BitPolicyError(
            f"{path} holds something else ({foreign[0]}); choose another --output-dir, or --overwrite it"
        )
    return held


def _difference(held: dict[str, Any], asked: dict[str, Any]) -> str:
    """Why the folder's search is not the one that is asked for."""
    if changed := ", ".join(sorted(k for k in asked if held.get(k) != asked[k] and k not in _GOES_ON)):
        return f"another {changed}"
    trials = held.get("trials")
    return f"{trials} trials, which are not made fewer" if isinstance(trials, int) else "a damaged run.json"


def _same_study(held: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether what is asked goes on with what is held: the same search, with as many trials or more."""
    if any(held.get(name) != value for name, value in asked.items() if name not in _GOES_ON):
        return False
    return isinstance(held.get("trials"), int) and held["trials"] <= asked["trials"]


def _finished(path: Path) -> dict[str, Any] | None:
    """What `result.json` says; None where it is not there, or not as it was written: the search then goes on with what
    it has, and writes it again."""
    try:
        return read_result(path)
    except BitPolicyError as error:
        warnings.warn(str(error), BitPolicyWarning, stacklevel=2)
        return None


def read_result(path: Path) -> dict[str, Any] | None:
    """The result of the search in a folder; None while it is not finished.

    Raises:
        BitPolicyError: the file is damaged, or of an older version.
    """
    try:
        return read_sealed(path / RESULT, required=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BitPolicyError(
            f"cannot read {path / RESULT}: {error}; give the same search again, which writes it"
        ) from error


def _held_identity(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads((path / "run.json").read_text()) if (path / "run.json").is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def _foreign(path: Path) -> list[str]:
    if not path.is_dir():
        return [f"{path.name} is a file"]
    return sorted(p.name for p in path.iterdir() if not p.name.startswith((".run.json", LOCK)))
