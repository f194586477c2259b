"""How far apart two sounds are, weighed about as an ear weighs it: the distance of their mel spectrograms, in dB.

With L the level of a mel band in one frame, 10 log10 of its power, no lower than 80 dB below the loudest band of the
reference, the distance is sqrt(E[(L - L_reference)^2]) over bands, frames and channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from bitpolicy.search.quality.psnr import Images, Paired, psnr
from bitpolicy.sensitivity.calls.outputs import is_sound

_RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")  # what configs of models call it, the surest first
_USUAL = 16_000  # samples a second, if no config has it
_FRAME = 0.064  # seconds
_BANDS, _BINS_A_BAND = 64, 4  # a band of a short frame needs some frequencies, too
_FLOOR = 80  # dB


def sampling_rate(pipe: DiffusionPipeline) -> int:
    """Samples a second of the sounds that a pipeline makes, from its models' configs."""
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for name in _RATES:
        for model in models:
            config: Any = getattr(model, "config", None)
            rate = getattr(config, name, None)
            if isinstance(rate, int):
                return rate
    return _USUAL


def are_sounds(results: Sequence[torch.Tensor]) -> bool:
    """Whether the results of a pipeline, one per sample, are sounds."""
    return bool(results) and all(map(is_sound, results))


def compared(reference: Images, results: Images, rate: int) -> Paired:
    """How close the results are to the reference's: the mel distance of sounds, the PSNR of anything else.

    Args:
        rate: samples a second of sounds.
    """
    return mel_distance(reference, results, rate) if are_sounds(reference) else psnr(reference, results)


def mel_distance(reference: Images, sounds: Images, rate: int) -> Paired:
    """The distance of pairs of sounds, shape (samples) or (channels, samples).

    Args:
        rate: samples a second.
    """
    pairs = zip(reference, sounds, strict=True)
    return Paired("mel", tuple(None if torch.equal(a, b) else _distance(a, b, rate) for a, b in pairs), "lower", "dB")


def _distance(reference: torch.Tensor, sound: torch.Tensor, rate: int) -> float:
    levels = _levels(reference, rate)
    floor = levels.max() - _FLOOR
    difference = np.maximum(levels, floor) - np.maximum(_levels(sound, rate), floor)
    return float(np.sqrt(np.square(difference).mean()))


def _levels(sound: torch.Tensor, rate: int) -> np.ndarray:
    """Levels in dB, shape (channels, bands, frames)."""
    frame = 2 ** max(6, round(math.log2(rate * _FRAME)))
    bins = frame // 2 + 1
    filters = mel_filter_bank(
        bins, min(_BANDS, bins // _BINS_A_BAND), 0.0, rate / 2, rate, triangularize_in_mel_space=True
    )
    channels = torch.nn.functional.pad(sound.reshape(-1, sound.shape[-1]), (0, max(0, frame - sound.shape[-1])))
    levels = [
        spectrogram(
            channel.double().numpy(),
            window_function(frame, "hann"),
            frame,
            frame // 4,
            power=2.0,
            mel_filters=filters,
            log_mel="dB",
            dtype=np.float64,
        )
        for channel in channels
    ]
    return np.stack(levels)
