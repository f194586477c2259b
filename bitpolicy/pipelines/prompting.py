"""What is asked of the pipeline: a file, the bundled pipeline's names, or a general list; and how it is split."""

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
from bitpolicy.sensitivity.samples import Request, Sample, beside, split_samples, takes_pictures

_DEFAULT_LABELS = 32
_USUAL_CLASSES = 1000  # of a model that does not say how many it knows
_SPLIT_FROM = 8  # prompts; with fewer, all parts use the same prompts with seeds of their own
_APART = 1_000_000  # between the seeds of two parts: they never meet


@dataclass(frozen=True)
class Split:
    """Samples for each purpose.

    No two parts share a (prompt, seed), and where `by_prompt`, none but `confirm` a prompt.

    Attributes:
        calibration: for the probe.
        search: for scoring trials.
        confirm: for choosing among finalists: the calibration prompts with seeds of their own.
        held_out: for the reported quality; nothing else sees them.
        by_prompt: whether the parts have prompts of their own.
    """

    calibration: tuple[Sample, ...]
    search: tuple[Sample, ...]
    confirm: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    by_prompt: bool


def load_requests(path: Path) -> list[Request]:
    """The requests of a file: a text with one prompt (or class label) a line, or .jsonl with call arguments.

    Raises:
        BitPolicyError: the file is missing, not text, not JSON lines of objects, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BitPolicyError(
            f"cannot read --prompts {path}: {error}; give a text file with one prompt a line"
        ) from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise BitPolicyError(f"--prompts {path} has no prompt in it; write one a line")
    if path.suffix != ".jsonl":
        return list(dict.fromkeys(line for _, line in lines))
    return _different([_call_arguments(path, i, line) for i, line in lines])


def requests_of(prompts: str | Path | Mapping[str, Any] | Sequence[str | int | Mapping[str, Any]]) -> list[Request]:
    """What a caller from Python asks for: a file of prompts; or a prompt, a class label, the arguments of one call, or
    several of these.

    Raises:
        BitPolicyError: there is none among them, or the file cannot be read.
    """
    if isinstance(prompts, Path):
        return load_requests(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not prompts:
        raise BitPolicyError("--prompts has no prompt in it; give at least one, or leave it out for a built-in list")
    return [prompt if isinstance(prompt, str | Mapping) else str(prompt) for prompt in prompts]


def _call_arguments(path: Path, number: int, line: str) -> Request:
    """One line of a .jsonl file; paths in it are relative to the file."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise BitPolicyError(f"--prompts {path}, line {number} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BitPolicyError(
            f'--prompts {path}, line {number}: expected an object such as {{"prompt": "a cat"}}, '
            f"found {type(found).__name__}"
        )
    return {name: beside(path.parent, value) if takes_pictures(name) else value for name, value in found.items()}


def _different(requests: Sequence[Request]) -> list[Request]:
    return list({json.dumps(request, sort_keys=True): request for request in requests}.values())


def default_requests(pipe: DiffusionPipeline, bundled: bool) -> list[Request]:
    """What is asked for where nobody says: 32 prompts, 32 class labels, or nothing for an unconditional pipeline."""
    signature = Signature.of(pipe)
    if signature.labels is not None:
        return [*map(str, _labels(pipe))]
    if signature.takes_text:
        name = "emoji.txt" if bundled else "general.txt"
        return [*(files("bitpolicy") / "prompts" / name).read_text(encoding="utf-8").splitlines()]
    return [""]


def _labels(pipe: DiffusionPipeline) -> list[int]:
    """Class labels over the whole range; the last class of a DiT is none at all, for guidance."""
    classes = class_count(pipe) or _USUAL_CLASSES
    count = min(_DEFAULT_LABELS, classes)
    return [i * classes // count for i in range(count)]


def split(requests: Sequence[Request], seed: int, calibration: int, search: int, confirm: int, held_out: int) -> Split:
    """Share out prompts and seeds: one half calibration, a quarter search, a quarter held out, where there are enough.

    Args:
        seed: of the shuffle and of all samples.
        calibration, search, confirm, held_out: how many samples each part gets.
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
