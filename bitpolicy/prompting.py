"""Prompts: a file, the bundled pipeline's names, or a general list; and how they are split."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.sensitivity.trajectory import Sample, split_samples

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


def load_prompts(path: Path | None, bundled: bool) -> list[str]:
    """The prompts of a file, one a line, or the built-in list.

    Raises:
        BitPolicyError: the file is missing, not text, or has no prompt.
    """
    if path is None:
        text = (files("bitpolicy") / "prompts" / ("emoji.txt" if bundled else "general.txt")).read_text(
            encoding="utf-8"
        )
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BitPolicyError(
                f"cannot read --prompts {path}: {error}; give a text file with one prompt a line"
            ) from error
    prompts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not prompts:
        raise BitPolicyError(f"--prompts {path} has no prompt in it; write one a line")
    return prompts


def split(prompts: Sequence[str], seed: int, calibration: int, search: int, confirm: int, held_out: int) -> Split:
    """Share out prompts and seeds: one half calibration, a quarter search, a quarter held out, where there are enough.

    Args:
        seed: of the shuffle and of all samples.
        calibration, search, confirm, held_out: how many samples each part gets.
    """
    shuffled = list(prompts)
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
