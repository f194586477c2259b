"""What one trajectory starts from: a prompt or other arguments of the pipeline call, and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitpolicy.policies.identity import tensor_bytes
from bitpolicy.sensitivity.input_files import loaded

Request = str | Mapping[str, Any]
"""A prompt, or a mapping of call arguments such as {"prompt": "a cat", "image": "photo.png"}."""


@dataclass(frozen=True)
class Sample:
    """One request with one seed, which gives one trajectory.

    Attributes:
        prompt: text, or a class label in digits; empty if the pipeline takes neither.
        seed: of the initial noise.
        arguments: the other arguments that the request gives to the pipeline call, by name. Some strings name files
            (`bitpolicy.sensitivity.input_files`).
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
        """`arguments` as the pipeline takes them, with the files loaded that they name.

        Raises:
            BitPolicyError: a file cannot be read.
        """
        return {name: loaded(name, value) for name, value in self.arguments.items()}

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
