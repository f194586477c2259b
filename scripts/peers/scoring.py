"""Images of an entry on one part of the samples, stored on disk, and their distance from the reference's images.

Images are made one piece at a time. A piece is one file, named by a hash of the weights, the samples and the call. So a
killed run loses at most one piece, the first sixteen images are reused when 256 are requested, and two entries with
equal weights are measured once. A piece stores the images (float16) and each image's squared error in float64, computed
before rounding the images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from peers.entry import read_weights, weights_key
from peers.one_step import outputs, some_calls
from safetensors.torch import load_file, save_file

from bitpolicy.sensitivity.samples import Sample
from bitpolicy.workflow.plan import Plan

REFERENCE = "reference"
_PIECES = (0, 4, 16)  # where the first pieces start; later pieces have sixteen images
_BATCH = 8


class Scores:
    """The pipeline of the comparison and the images that it has made so far.

    Args:
        plan: the plan of the pipeline.
        work: folder with `candidates/`; images go to `images/`.
    """

    def __init__(self, plan: Plan, work: Path) -> None:
        self._plan, self._images = plan, work / "images"
        self._entries = work / "candidates"
        self._images.mkdir(parents=True, exist_ok=True)
        self._keys: dict[str, str] = {}
        self._called: dict[str, torch.Tensor] = {}
        self._loaded = REFERENCE
        self._reference = {k: v.clone() for k, v in plan.trajectories.denoisers[0].state_dict().items()}
        plan.trajectories.batch = _BATCH
        plan.trajectories.denoisers[0].to(memory_format=torch.channels_last)  # 10% faster

    def errors(self, name: str, part: str, count: int, make: bool = True) -> list[float]:
        """Mean squared error of each of the first `count` images of a part. Without `make`, only of those that
        exist."""
        return [e for piece in self._of(name, part, count, make) for e in piece["mse"].tolist()][:count]

    def call_error(self, name: str) -> float:
        """Relative squared error of single denoiser calls on calibration trajectories, a cheap first estimate."""
        path = self._images / self.key(name) / "calls.json"
        if not path.is_file():
            exact = self._outputs(REFERENCE)
            error = (self._outputs(name) - exact).double().square().mean() / exact.double().square().mean()
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{float(error)}\n")
        return float(path.read_text())

    def _outputs(self, name: str) -> torch.Tensor:
        if name not in self._called:
            self._load(name)
            self._called[name] = outputs(self._plan.trajectories.denoisers[0], self._calls)
        return self._called[name] if name == REFERENCE else self._called.pop(name)

    @cached_property
    def _calls(self) -> dict[str, torch.Tensor]:
        calls = some_calls(self._entries.parent, self._plan.trajectories.call["num_inference_steps"])
        return {key: value[::2] for key, value in calls.items()}

    def images(self, name: str, part: str, count: int) -> torch.Tensor:
        """Those of the first `count` images that exist, float32, shape (n, C, H, W), in [0, 1]."""
        return torch.cat([piece["images"] for piece in self._of(name, part, count, False)]).float()[:count]

    def _of(self, name: str, part: str, count: int, make: bool) -> Iterator[Mapping[str, torch.Tensor]]:
        samples = getattr(self._plan.split, part)[:count]
        for piece in pieces(samples):
            path = self._path(name, piece)
            if path.is_file():
                yield load_file(path)
            elif make:
                yield self._made(name, part, piece, path)
            else:
                return

    def _made(self, name: str, part: str, samples: Sequence[Sample], path: Path) -> Mapping[str, torch.Tensor]:
        wanted = None if name == REFERENCE else self._piece_of_reference(part, samples)
        self._load(name)
        exact = torch.stack([image for image, _ in self._plan.trajectories.images(samples)])
        mse = torch.zeros(len(exact)) if wanted is None else (exact - wanted).double().square().flatten(1).mean(1)
        kept = exact if name == REFERENCE else exact.half()  # others are measured against the reference
        piece = {"images": kept.contiguous(), "mse": mse.double()}
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        save_file(piece, aside)
        aside.replace(path)
        return piece

    def _piece_of_reference(self, part: str, samples: Sequence[Sample]) -> torch.Tensor:
        path = self._path(REFERENCE, samples)
        piece = load_file(path) if path.is_file() else self._made(REFERENCE, part, samples, path)
        return piece["images"]

    def _load(self, name: str) -> None:
        """Load the weights of `name` into the pipeline; missing or extra entries of the state dict are an error."""
        if name != self._loaded:
            weights = self._reference if name == REFERENCE else read_weights(self._entries, name)
            self._plan.trajectories.denoisers[0].load_state_dict(weights)
            self._loaded = name

    def prompts(self, part: str) -> list[str]:
        """The prompt of each sample of a part."""
        return [sample.prompt for sample in getattr(self._plan.split, part)]

    def key(self, name: str) -> str:
        """A hash of the weights that an entry computes with."""
        if name not in self._keys:
            weights = self._reference if name == REFERENCE else read_weights(self._entries, name)
            self._keys[name] = weights_key(weights)
        return self._keys[name]

    def _path(self, name: str, samples: Sequence[Sample]) -> Path:
        what = [[sample.identity() for sample in samples], self._plan.trajectories.call]
        asked = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return self._images / self.key(name) / f"{asked}.safetensors"


def pieces(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """The samples split into files; the last piece may be shorter."""
    starts = [start for start in (*_PIECES, *range(32, len(samples), 16)) if start < len(samples)]
    for start, end in zip(starts, [*starts[1:], len(samples)], strict=True):
        yield samples[start:end]


def decibels(errors: Sequence[float]) -> list[float]:
    """PSNR of each image; identical images count as 120 dB, the resolution of float32."""
    return [min(120.0, -10 * float(torch.tensor(error, dtype=torch.float64).log10())) for error in errors]
