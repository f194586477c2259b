"""The distance of sounds: exact where the answer is known, and what the other metrics say about sounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.search.quality.metrics import METRICS, Comparison, measure
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Paired
from bitpolicy.search.quality.sound import compared, mel_distance, sampling_rate

RATE = 16_000


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def distance(reference: torch.Tensor, sound: torch.Tensor, rate: int = RATE) -> float | None:
    return mel_distance([reference], [sound], rate).mean


@pytest.mark.parametrize("shape", [(RATE,), (1, RATE), (2, RATE)])
def test_a_sound_of_half_the_amplitude_is_six_decibels_away(shape: tuple[int, ...]) -> None:
    sound = noise(*shape)
    assert distance(sound, sound / 2) == pytest.approx(6.02, abs=0.01)
    assert distance(sound, sound.clone()) is None


def test_what_is_too_quiet_to_hear_does_not_count() -> None:
    """Below 80 dB under the loudest band, levels are equal."""
    tone = torch.sin(torch.arange(RATE) * 0.5)
    hiss = noise(RATE)
    assert (distance(tone, tone + 1e-7 * hiss) or 0) < 0.1 < (distance(tone, tone + 1e-2 * hiss) or 0)
    silence = torch.zeros(RATE)
    assert distance(tone, silence) is not None
    assert distance(silence, tone) is not None
    assert distance(noise(2, 7), -noise(2, 7).flip(1)) is not None


def test_a_moved_tone_is_farther_away_than_a_shifted_one() -> None:
    """A shift in phase makes no difference to the ear, though it is as large as the tone in mean squared error."""
    times = torch.arange(RATE) * 0.5
    tone, shifted, higher = torch.sin(times), torch.cos(times), torch.sin(1.5 * times)
    assert 2 * (distance(tone, shifted) or 0) < (distance(tone, higher) or 0)


def pipe(**rates: dict[str, int]) -> Any:
    models: dict[str, Any] = {}
    for name, config in rates.items():
        models[name] = nn.Linear(1, 1)
        models[name].config = SimpleNamespace(**config)
    return SimpleNamespace(components={**models, "feature_extractor": SimpleNamespace(sampling_rate=48_000)})


def test_the_rate_is_that_of_the_model_that_makes_the_sound() -> None:
    assert sampling_rate(pipe(vae={"sampling_rate": 44_100})) == 44_100
    assert sampling_rate(pipe(vae={"sample_rate": 16_000}, vocoder={"output_sampling_rate": 24_000})) == 24_000
    assert sampling_rate(pipe(unet={})) == 16_000


def test_sounds_are_compared_by_ear_and_pictures_by_pixel() -> None:
    sounds, pictures = [noise(2, 4000), noise(4000)], [torch.rand(3, 8, 8)] * 2
    assert compared(sounds, [sound / 2 for sound in sounds], RATE).name == "mel"
    assert compared(pictures, [picture / 2 for picture in pictures], 0).name == "psnr"


def test_metrics_of_pictures_are_not_measured_on_sounds() -> None:
    sounds = [noise(2, 4000), noise(4000)]
    others = [sound / 2 for sound in sounds]
    found = measure(METRICS, Comparison(sounds, others, (sounds, others), ["a", "b"], rate=RATE), Networks())
    assert {name for name, result in found.items() if isinstance(result, Paired)} == {"psnr", "mel", "latent"}
    assert "sounds" in found["ssim"].as_dict()["unavailable"]
