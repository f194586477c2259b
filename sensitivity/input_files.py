"""Files that call arguments name: pictures, sounds and tensors.

A string is the path or URL of a picture if the name of its argument says that it takes pictures. For any other argument
but a prompt, a string is a path if it ends as one of the files below do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import load_image, load_video
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.io import wavfile

from bitpolicy.kernels.errors import BitPolicyError

_TAKE_PICTURES = ("image", "video")  # parts of the names of arguments
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_VIDEOS = (".mp4", ".mov", ".webm", ".avi", ".mkv", ".gif")
_SOUNDS = (".wav",)
_TENSORS = (".safetensors", ".npy")


def takes_pictures(name: str) -> bool:
    """Whether a call argument of this name takes pictures."""
    return any(part in name for part in _TAKE_PICTURES)


def names_files(name: str, value: Any) -> bool:
    """Whether strings in the value of the call argument `name` are paths."""
    if isinstance(value, list | tuple) and value:
        return all(names_files(name, item) for item in value)
    named = isinstance(value, str) and "prompt" not in name and _ends(value, (*_PICTURES, *_SOUNDS, *_TENSORS))
    return takes_pictures(name) or named


def beside(folder: Path, name: str, value: Any) -> Any:
    """The value of the call argument `name`, with its paths taken relative to `folder`. URLs stay as they are."""
    if isinstance(value, list):
        return [beside(folder, name, item) for item in value]
    if not isinstance(value, str) or not names_files(name, value) or "://" in value:
        return value
    return str(folder / value)


def loaded(name: str, value: Any) -> Any:
    """The value of the call argument `name`, with the files loaded that it names.

    Raises:
        BitPolicyError: a file cannot be read.
    """
    if isinstance(value, list | tuple):
        return [loaded(name, item) for item in value]
    if not isinstance(value, str | Path) or not names_files(name, str(value)):
        return value
    if _ends(value, _SOUNDS):
        return _sound(Path(value))
    if "video" in name and _ends(value, _VIDEOS):
        return _video(value)
    return _tensor(Path(value)) if _ends(value, _TENSORS) else _picture(value)


def _ends(value: str | Path, endings: tuple[str, ...]) -> bool:
    return str(value).lower().endswith(endings)


def _picture(path: str | Path) -> Image.Image:
    try:
        picture: Image.Image = load_image(str(path))
    except (OSError, ValueError) as error:
        raise BitPolicyError(f"cannot read the picture {path}: {error}; give a path or URL of an image") from error
    return picture


def _video(path: str | Path) -> list[Image.Image]:
    try:
        frames: list[Image.Image] = load_video(str(path))
    except (OSError, ValueError, ImportError) as error:
        raise BitPolicyError(f"cannot read the video {path}: {error}; give a path or URL of a video") from error
    return frames


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


def _tensor(path: Path) -> torch.Tensor:
    """The one tensor in a file."""
    try:
        found = [np.load(path, allow_pickle=False)] if path.suffix == ".npy" else list(load_file(path).values())
    except (OSError, EOFError, ValueError, SafetensorError) as error:
        raise BitPolicyError(f"cannot read the tensor {path}: {error}; give a .safetensors or .npy file") from error
    if len(found) != 1:
        raise BitPolicyError(f"{path} holds {len(found)} tensors; give a file with one")
    return torch.as_tensor(found[0])
