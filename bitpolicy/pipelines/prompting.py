"""The requests for a pipeline, and how they are split. They come from a file, the bundled pipeline's names, or a
general list."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.components import class_count
from bitpolicy.sensitivity.calls.signature import Signature
from bitpolicy.sensitivity.input_files import beside
from bitpolicy.sensitivity.samples import Request, Sample, split_samples

_DEFAULT_LABELS = 32
_USUAL_CLASSES = 1000  # for a model that does not say how many it knows
_SPLIT_FROM = 8  # prompts; with fewer, all parts use the same prompts with different seeds
_APART = 1_000_000  # distance between the seeds of two parts, so that they never overlap


@dataclass(frozen=True)
class Split:
    """Samples for each purpose.

    No two parts share a (prompt, seed) pair. If `by_prompt`, they do not share prompts either, except for `confirm`.

    Attributes:
        calibration: for the probe.
        search: for scoring trials.
        confirm: for choosing among the finalists: the calibration prompts with other seeds.
        held_out: for the reported quality; used for nothing else.
        by_prompt: whether each part has its own prompts.
    """

    calibration: tuple[Sample, ...]
    search: tuple[Sample, ...]
    confirm: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    by_prompt: bool


def load_requests(path: Path) -> list[Request]:
    """The requests in a file: text with one prompt (or class label) per line, or .jsonl with call arguments.

    Raises:
        BitPolicyError: the file is missing, not text, empty, or has a line that is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BitPolicyError(
            f"cannot read --prompts {path}: {error}; give a text file with one prompt per line"
        ) from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise BitPolicyError(f"--prompts {path} has no prompt in it; write one per line")
    if path.suffix != ".jsonl":
        return list(dict.fromkeys(line for _, line in lines))
    return _different([_call_arguments(path, i, line) for i, line in lines])


def requests_of(prompts: str | Path | Mapping[str, Any] | Sequence[str | int | Mapping[str, Any]]) -> list[Request]:
    """The requests of a caller from Python: a file of prompts; or a prompt, a class label, the arguments of one call,
    or several of these.

    Raises:
        BitPolicyError: there are none, or the file cannot be read.
    """
    if isinstance(prompts, Path):
        return load_requests(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not prompts:
        raise BitPolicyError("--prompts has no prompt in it; give at least one, or leave it out for a built-in list")
    return [prompt if isinstance(prompt, str | Mapping) else str(prompt) for prompt in prompts]


def _call_arguments(path: Path, number: int, line: str) -> Request:
    """The call arguments in one line of a .jsonl file. Paths in it are relative to the file."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise BitPolicyError(f"--prompts {path}, line {number} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BitPolicyError(
            f'--prompts {path}, line {number}: expected an object such as {{"prompt": "a cat"}}, '
            f"found {type(found).__name__}"
        )
    return {name: beside(path.parent, name, value) for name, value in found.items()}


def _different(requests: Sequence[Request]) -> list[Request]:
    return list({json.dumps(request, sort_keys=True): request for request in requests}.values())


def default_requests(pipe: DiffusionPipeline, bundled: bool) -> list[Request]:
    """The requests if the user gives none: 32 prompts, 32 class labels, or an empty one for an unconditional
    pipeline."""
    signature = Signature.of(pipe)
    if signature.labels is not None:
        return [*map(str, _labels(pipe))]
    if signature.takes_text:
        name = "emoji.txt" if bundled else "general.txt"
        return [*(files("bitpolicy") / "prompts" / name).read_text(encoding="utf-8").splitlines()]
    return [""]


def _labels(pipe: DiffusionPipeline) -> list[int]:
    """Class labels over the whole range. A DiT's last class is left out: it means "no class", for guidance."""
    classes = class_count(pipe) or _USUAL_CLASSES
    count = min(_DEFAULT_LABELS, classes)
    return [i * classes // count for i in range(count)]


def split(requests: Sequence[Request], seed: int, calibration: int, search: int, confirm: int, held_out: int) -> Split:
    """Split prompts and seeds: if there are enough prompts, half for calibration, a quarter for search, a quarter held
    out.

    Args:
        seed: seed of the shuffle and of all samples.
        calibration, search, confirm, held_out: number of samples in each part.
    """
    shuffled = list(requests)
    random.Random(seed).shuffle(shuffled)
    by_prompt = len(shuffled) >= _SPLIT_FROM
    quarter = len(shuffled) // 4
    parts = (
        [shuffled[2 * quarter :], shuffled[:quarter], shuffled[quarter : 2 * quarter]] if by_prompt else [shuffled] * 3
    )
    first = seed * 10 * _APART
    return Split(
        tuple(split_samples(parts[0], calibration, first)),
        tuple(split_samples(parts[1], search, first + _APART)),
        tuple(split_samples(parts[0], confirm, first + 2 * _APART)),
        tuple(split_samples(parts[2], held_out, first + 3 * _APART)),
        by_prompt,
    )
