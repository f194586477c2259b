"""What one trajectory starts from: a prompt or other arguments of the pipeline call, and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import load_image, load_video
from PIL import Image
from scipy.io import wavfile

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.identity import tensor_bytes

Request = str | Mapping[str, Any]
"""A prompt, or a mapping of call arguments such as {"prompt": "a cat", "image": "photo.png"}."""

_PICTURES = (
    "image",
    "video",
    "mask",
)  # an argument with one of these in its name takes pictures; a string there is a path
_SOUNDS = ("audio", "waveform")  # one with one of these takes sound; a string there that ends in .wav is a path


@dataclass(frozen=True)
class Sample:
    """One request with one seed, which gives one trajectory.

    Attributes:
        prompt: text, or a class label in digits; empty if the pipeline takes neither.
        seed: of the initial noise.
        arguments: the other arguments that the request gives to the pipeline call, by name. A string for an argument
            that takes pictures is a path or URL, and one that names a WAV file for an argument that takes sound a path.
    """

    prompt: str
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, request: Request, seed: int) -> Sample:
        if isinstance(request, str):
            return cls(request, seed)
        rest = {name: value for name, value in request.items() if name != "prompt"}
        return cls(str(request.get("prompt", "")), seed, rest)

    def call_arguments(self) -> dict[str, Any]:
        """`arguments` as the pipeline takes them, with pictures and sounds loaded.

        Raises:
            BitPolicyError: a picture or a sound cannot be read.
        """
        return {
            name: _read(name, value) if names_files(name, value) else value for name, value in self.arguments.items()
        }

    def identity(self) -> list[Any]:
        """JSON values that are equal for samples with the same trajectory. Pictures are compared by content."""
        found: list[Any] = [self.prompt, self.seed]
        if self.arguments:
            found.append({name: fingerprint(value) for name, value in sorted(self.call_arguments().items())})
        return found


def split_samples(requests: Sequence[Request], count: int, seed: int) -> list[Sample]:
    """`count` samples that cycle through `requests`, with the seeds `seed`, `seed` + 1 and so on."""
    return [Sample.of(requests[i % len(requests)], seed + i) for i in range(count)]


def fingerprint(value: Any) -> Any:
    """A JSON value that identifies a call argument. Pictures and tensors become a hash of their content."""
    if isinstance(value, Mapping):
        return {str(key): fingerprint(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Image.Image):
        about, content = f"{value.mode}{value.size}", value.tobytes()
    elif isinstance(value, torch.Tensor):
        about, content = f"{value.dtype}{tuple(value.shape)}", bytes(tensor_bytes(value))
    elif isinstance(value, np.ndarray):
        about, content = f"{value.dtype}{value.shape}", np.ascontiguousarray(value).tobytes()
    else:
        about, content = "", repr(value).encode()
    return f"{type(value).__name__}:{hashlib.sha256(about.encode() + content).hexdigest()[:16]}"


def takes_pictures(name: str) -> bool:
    """Whether a call argument of this name takes pictures."""
    return any(part in name for part in _PICTURES)


def names_files(name: str, value: Any) -> bool:
    """Whether strings in the value of a call argument are paths."""
    takes_sound = isinstance(value, str) and value.lower().endswith(".wav") and any(part in name for part in _SOUNDS)
    return takes_pictures(name) or takes_sound


def beside(folder: Path, value: Any) -> Any:
    """`value` with its paths taken relative to `folder`. URLs stay as they are."""
    if isinstance(value, list):
        return [beside(folder, item) for item in value]
    return str(folder / value) if isinstance(value, str) and "://" not in value else value


def _read(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_read("", item) for item in value]
    if not isinstance(value, str | Path):
        return value
    if str(value).lower().endswith(".wav"):
        return _sound(Path(value))
    try:
        return load_video(str(value)) if "video" in name else load_image(str(value))
    except (OSError, ValueError, ImportError) as error:
        raise BitPolicyError(f"cannot read the picture {value}: {error}; give a path or URL of an image") from error


def _sound(path: Path) -> torch.Tensor:
    """A WAV file, float32 in [-1, 1], shape (1, channels, samples), at the rate of the file."""
    try:
        _, found = wavfile.read(path)
    except (OSError, ValueError) as error:
        raise BitPolicyError(f"cannot read the sound {path}: {error}; give a WAV file") from error
    frames = torch.from_numpy(found.astype(np.float32)).reshape(len(found), -1)
    if found.dtype == np.uint8:
        frames -= 128
    largest = 1.0 if found.dtype.kind == "f" else 2.0 ** (8 * found.dtype.itemsize - 1)
    return (frames / largest).T[None].contiguous()
