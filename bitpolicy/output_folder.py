"""The output folder of a search: who may write to it, what may be removed, and whether the search has finished."""

from __future__ import annotations

import hashlib
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
    *("compare-sounds", "checkpoint", "work", "report.html"),
)
_PROBED = ("split.safetensors", "check.json")  # files of a probe that no search writes
EXTENDABLE = ("trials", "timeout", "all_trials", "probe_memory")  # with other values of these, a search continues


def identity_of(settings: Settings) -> dict[str, Any]:
    """JSON values that are equal for two runs exactly if the runs ask for the same. Of a given policy, the content of
    its file counts, not where it is."""
    held = asdict(settings)
    if settings.policy is not None:
        held["policy"] = hashlib.sha256(Path(settings.policy).read_bytes()).hexdigest()
    return json.loads(json.dumps(fingerprint(held)))


class OutputFolder:
    """The output folder of one search. `run.json` claims it, and `result.json` marks it as finished.

    Raises:
        BitPolicyError: on opening, if the folder holds something else or cannot be written.
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
                (path / "result.json").unlink(missing_ok=True)  # the result of fewer trials
            write_text(path / "run.json", json.dumps(identity, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise _not_writable(path, error) from error

    @classmethod
    @contextmanager
    def claimed(cls, path: Path, settings: Settings, *, overwrite: bool, resume: bool) -> Iterator[OutputFolder]:
        """The folder, reserved for this process while the block runs.

        Raises:
            BitPolicyError: as on opening; or another process is using the folder.
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
        """The result of this exact search if `path` holds it and it has finished. Writes nothing.

        Raises:
            BitPolicyError: the folder holds something else, or another process is using it.
        """
        identity = identity_of(settings)
        held = _claimed(path, identity, overwrite)
        if (path / LOCK).exists():
            with working_in(path):  # fails if another process is still using it
                pass
        return _finished(path) if resume and held == identity else None

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        return _finished(self.path)

    def finish(self, result: dict[str, Any]) -> None:
        write_text(self.path / RESULT, json.dumps(sealed(result), indent=2, allow_nan=False) + "\n")

    def _clear(self, keep_work: bool) -> None:
        """Remove what an earlier search wrote here, and nothing else. The probe's records are keyed, so they may
        stay."""
        for name in (*_OURS, *_PROBED):
            entry = self.path / name
            if entry.is_dir() and not (keep_work and name == "work"):
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()

    def _clear_probed(self) -> None:
        """Remove the other results of a probe, because the search is going to replace the table they belong to."""
        for name in _PROBED:
            (self.path / name).unlink(missing_ok=True)


def _not_writable(path: Path, error: OSError) -> BitPolicyError:
    return BitPolicyError(f"cannot write to {path}: {error.strerror}; choose a writable --output-dir")


def require_no_search(path: Path) -> None:
    """Check that a probe may write to the folder.

    Raises:
        BitPolicyError: the folder holds a search, whose sensitivity table a probe would replace.
    """
    if holds_a_search(path):
        raise BitPolicyError(
            f"{path} holds a search, and a probe would replace its sensitivity table; give the probe another folder, "
            f"e.g. --output-dir {for_a_probe(path)}"
        )


def holds_a_search(path: Path) -> bool:
    """Whether the folder holds a search, finished or not."""
    return (path / "run.json").is_file() or (path / "policy.yaml").is_file()


def for_a_probe(path: Path) -> Path:
    """A folder for a probe of the model that was searched in `path`."""
    whole = path if path.name not in ("", "..") else path.resolve()
    return whole.with_name(f"{whole.name}-probe")


def _claimed(path: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The settings of the search in the folder, or None. Refuses a folder that must not be touched."""
    require_nameable(path)
    held = _held_identity(path)
    if held is not None and not overwrite and not _same_study(held, identity):
        raise BitPolicyError(
            f"{path} holds a search with {_difference(held, identity)}; "
            "choose another --output-dir, or give --overwrite"
        )
    if held is None and path.exists() and (foreign := _foreign(path)) and not overwrite:
        raise BitPolicyError(
            f"{path} holds something else ({foreign[0]}); choose another --output-dir, or give --overwrite"
        )
    return held


def _difference(held: dict[str, Any], asked: dict[str, Any]) -> str:
    """How the folder's search differs from the requested one."""
    if changed := ", ".join(sorted(k for k in asked if held.get(k) != asked[k] and k not in EXTENDABLE)):
        return f"a different {changed}"
    trials = held.get("trials")
    if isinstance(trials, int) and held.get("all_trials") and trials <= asked["trials"]:
        return "--all-trials, and their number cannot be reduced"
    return f"{trials} trials, and their number cannot be reduced" if isinstance(trials, int) else "a damaged run.json"


def _same_study(held: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether the request continues the folder's search: the same one, with at least as many trials."""
    if any(held.get(name) != value for name, value in asked.items() if name not in EXTENDABLE):
        return False
    if held.get("all_trials") and not asked["all_trials"]:
        return False
    return isinstance(held.get("trials"), int) and held["trials"] <= asked["trials"]


def _finished(path: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None if it is missing or not as it was written. The search then continues from what
    it has, and writes the file again."""
    try:
        return read_result(path)
    except BitPolicyError as error:
        warnings.warn(str(error), BitPolicyWarning, stacklevel=2)
        return None


def read_result(path: Path) -> dict[str, Any] | None:
    """The result of the search in a folder; None until the search has finished.

    Raises:
        BitPolicyError: the file is damaged, or from an older version.
    """
    try:
        return read_sealed(path / RESULT, required=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BitPolicyError(
            f"cannot read {path / RESULT}: {error}; run the same search again to rewrite it"
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
