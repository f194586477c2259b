"""What one search is asked to do, and the folder that holds what it made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import DEFAULT
from bitpolicy.policies.storage.atomic import require_nameable, write_text
from bitpolicy.policies.storage.folder_lock import NAME as LOCK
from bitpolicy.policies.storage.folder_lock import working_in
from bitpolicy.sensitivity.samples import Request, fingerprint

MOST_SEED = 2**31 - 1  # NumPy's generators take twice that, and a study adds the number of the trial
_OURS = (
    *("run.json", "result.json", "policy.yaml", "calibration.safetensors", "sensitivity.safetensors"),
    *("sensitivity.csv", "frontier", "study.journal", "study.journal.torn", "trials.csv", "compare.png"),
    *("checkpoint", "work", "report.html"),
)


@dataclass(frozen=True)
class _Limit:
    """The numbers that an option takes: from `least` to `most`, `least` itself only if `closed`."""

    least: float
    most: float
    words: str
    closed: bool = True

    def holds(self, value: float) -> bool:
        above = value >= self.least if self.closed else value > self.least
        return above and value <= self.most  # NaN is neither

    def __str__(self) -> str:
        return self.words


_LIMITS = {
    "target_psnr": _Limit(0, 150, "dB above 0, at most 150: float32 images cannot be told apart beyond", closed=False),
    "target_lpips": _Limit(0, 1, "a distance above 0, at most 1, e.g. 0.01", closed=False),
    "seed": _Limit(0, MOST_SEED, f"a whole number from 0 to {MOST_SEED}"),
}
_COUNTS = ("calibration_samples", "vectors", "shared", "search_samples", "confirm_samples", "held_out_samples")
_PROBED = ("split.safetensors", "check.json")  # what a probe leaves, and no search makes
_LEAST = dict.fromkeys((*_COUNTS, "batch_size", "height", "width"), 1)
_LEAST |= dict.fromkeys(("trials", "frontier", "remeasure", "remeasure_close", "timeout"), 0)
_GOES_ON = ("trials", "timeout")  # with more trials or another time limit a search goes on with what it has


@dataclass(frozen=True)
class Settings:
    """One search. Two runs with equal settings give the same policy.

    Attributes:
        budget: as written, e.g. "5MB"; None where a quality is asked for, or the whole curve.
        model: hub id, folder or .safetensors file; None is the bundled pipeline.
        component: what is quantized, names separated by commas or "all"; None finds the denoiser.
        formats: names of the candidate formats.
        prompts: prompts, class labels or mappings of call arguments; None is a built-in list.
        call: arguments of every pipeline call.
        seed: of samples, split, random directions and sampler.
        trials: Optuna trials in all; 0 keeps the exact solution.
        probe: "adjoint", "stepwise", "ablation" or "weight".
        dtype, device: of the computation; see `load_source`.
        revision, variant: of a hub model.
        config: folder or hub id with the configs of a model that is a single file.
        offload: stream the weights to the device, for models larger than it.
        storage: Optuna storage URL; None is a journal file in the output folder.
        remeasure: how many estimates too large for first order are at most measured by ablation.
        remeasure_close: the same for estimates that close choices hang on.
        quantizer: who rounds weights, or "auto"; see `bitpolicy.kernels.quantizers.named`.
        compute: of packed layers, "exact", "int8" or "fp8": in all that is predicted and measured, and in the
            checkpoint.
        target_psnr, target_lpips: a quality to reach with as few bytes as possible, instead of a budget.
        frontier: policies of the curve of bytes against error to write; 0 is none.
        keep: GLOB=FORMAT, formats that layers keep.
        share_qkv: whether query, key and value projections of an attention share a format.
        target: a program that has to hold the policy, e.g. "comfy"; see `bitpolicy.policies.exporters.targets`.
        scope: what the budget covers: "weights", "pipeline" or "peak".
        height, width, batch_size: of the call whose peak is meant.
        sampler, space: of the study; see `bitpolicy.search.study.samplers`.
        timeout: seconds after which no trial is begun.
        features: file or folder of the networks that measure quality.
        calibration_samples, vectors, shared, search_samples, confirm_samples, held_out_samples: sizes of the parts.
    """

    budget: str | None
    model: str | None = None
    component: str | None = None
    formats: tuple[str, ...] = ("int4", "int8", "fp16")
    prompts: tuple[Request, ...] | None = None
    call: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    trials: int = 24
    probe: str = "adjoint"
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    storage: str | None = None
    offload: bool = False
    calibration_samples: int = 16
    vectors: int = 2
    shared: int = 8
    remeasure: int = 8
    remeasure_close: int = 0
    quantizer: str = DEFAULT
    compute: str = Compute.EXACT.value
    target_psnr: float | None = None
    target_lpips: float | None = None
    frontier: int = 0
    keep: tuple[str, ...] = ()
    share_qkv: bool = False
    target: str | None = None
    scope: str = "weights"
    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    sampler: str = "tpe"
    space: str = "group"
    timeout: float | None = None
    features: str | None = None
    search_samples: int = 16
    confirm_samples: int = 16
    held_out_samples: int = 16

    def __post_init__(self) -> None:
        aims = [name for name in ("budget", "target_psnr", "target_lpips") if getattr(self, name) is not None]
        if len(aims) > 1 or not (aims or self.frontier):
            found = " and ".join(f"--{name.replace('_', '-')}" for name in aims) or "nothing"
            raise BitPolicyError(
                f"asked for {found}; give one of --budget SIZE, --target-psnr DB, --target-lpips DISTANCE, "
                "or --frontier"
            )
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and not value >= least:
                raise BitPolicyError(f"{name} is {value}; it has to be at least {least}")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limit.holds(value):
                raise BitPolicyError(f"--{name.replace('_', '-')} is {value}; give {limit}")

    def identity(self) -> dict[str, Any]:
        """JSON values that two runs share exactly when they ask for the same."""
        return json.loads(json.dumps(fingerprint(asdict(self))))


def require_seed(seed: int) -> None:
    """Raises:
    BitPolicyError: it is not one that every generator takes.
    """
    if not _LIMITS["seed"].holds(seed):
        raise BitPolicyError(f"--seed is {seed}; give {_LIMITS['seed']}")


class OutputFolder:
    """The output of one search. It is claimed by `run.json`; finished once `result.json` is there.

    Raises:
        BitPolicyError: on opening, if the folder holds something else, or cannot be written.
    """

    def __init__(self, path: Path, settings: Settings, *, overwrite: bool, resume: bool) -> None:
        self.path = path
        identity = settings.identity()
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
        _claimed(path, settings.identity(), overwrite)
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
        identity = settings.identity()
        held = _claimed(path, identity, overwrite)
        if (path / LOCK).exists():
            with working_in(path):  # or it is somebody else's, and they are still at it
                pass
        return _finished(path) if resume and held == identity else None

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        return _finished(self.path)

    def finish(self, result: dict[str, Any]) -> None:
        write_text(self.path / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")

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
        changed = ", ".join(sorted(k for k in identity if held.get(k) != identity[k] and k not in _GOES_ON))
        found = f"another {changed}" if changed else f"{held['trials']} trials, which are not made fewer"
        raise BitPolicyError(f"{path} holds a search with {found}; choose another --output-dir, or --overwrite it")
    if held is None and path.exists() and (foreign := _foreign(path)) and not overwrite:
        raise BitPolicyError(
            f"{path} holds something else ({foreign[0]}); choose another --output-dir, or --overwrite it"
        )
    return held


def _same_study(held: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether what is asked goes on with what is held: the same search, with as many trials or more."""
    if any(held.get(name) != value for name, value in asked.items() if name not in _GOES_ON):
        return False
    return isinstance(held.get("trials"), int) and held["trials"] <= asked["trials"]


def _finished(path: Path) -> dict[str, Any] | None:
    result = path / "result.json"
    return json.loads(result.read_text()) if result.is_file() else None


def _held_identity(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _foreign(path: Path) -> list[str]:
    if not path.is_dir():
        return [f"{path.name} is a file"]
    return sorted(p.name for p in path.iterdir() if not p.name.startswith((".run.json", LOCK)))
