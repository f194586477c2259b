"""The parts of a layer's error (scale error, bias, noise) by sampling step, and how the sampler amplifies it.

For sample n let x_n be the reference's final latent, u_n = x_n / |x_n|, and dx_n the error of one layer in one format.

    parallel   E <dx_n, u_n>^2             the image is scaled
    bias       |E r_n|^2                   r_n = dx_n - <dx_n, u_n> u_n: the same for every image
    noise      E|r_n|^2 - |E r_n|^2        the rest; the three add up to E|dx_n|^2
    mean       |E dx_n|^2                  the bias, including its parallel part

all divided by E|x_n|^2. The parallel part takes one backward pass per sample, along u_n, and is exact to first order.
The bias needs the same probe vectors v for all samples: E_v <v, r_n> <v, r_m> = <r_n, r_m>. Averaging over pairs n != m
leaves out the 1/N of the noise that the mean of N samples still contains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.policies.storage.file_source import open_tensors
from bitpolicy.policies.storage.sealed import sealed, unsealed
from bitpolicy.sensitivity.probes.measurement import pairs_mean
from bitpolicy.sensitivity.probes.stepwise import LocalSketch
from bitpolicy.sensitivity.sketches.sketch import Sketch


@dataclass(frozen=True)
class ErrorSplit:
    """The parts of each layer's error, float32, shape (2, 1 + T, L, F).

    The first axis is the layer's bias: unchanged, then corrected. The second axis is the whole trajectory, then each of
    its T steps, with the error that enters there. If models outside the loop are studied, the first of the T is theirs.

    Attributes:
        error: E|dx_0|^2 / E|x_0|^2, >= 0.
        parallel, bias: as above, >= 0. The rest of `error` is noise.
        mean: as above, >= 0.
        local: E|de_t|^2 / E|e_t|^2 of the denoiser's output at each step, shape (2, T, L, F).
        amplification: |dx_0| / |de_t|, from the denoiser's output at step t to the final latent, shape (2, T, L, F). It
            is 0 where de_t is 0: outside the loop there is no such output.
    """

    error: torch.Tensor
    parallel: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    local: torch.Tensor
    amplification: torch.Tensor

    @classmethod
    def of(
        cls,
        shared: Sequence[Sequence[Sketch]],
        signal: Sequence[Sketch],
        local: Sequence[LocalSketch],
        latent_power: float,
    ) -> ErrorSplit:
        """Compute the split from sketches.

        Args:
            shared: for each sample (two or more), the sketches along the shared vectors.
            signal: for each sample, the sketch along its own signal.
            local: stepwise sketches of any samples.
            latent_power: E|x_0|^2.
        """
        seen = torch.stack([torch.stack([_with_whole(s) for s in of_sample]) for of_sample in shared])  # N, S, 2, ...
        along = torch.tensor([[s.along for s in of_sample] for of_sample in shared])
        scaled = torch.stack([_with_whole(s) for s in signal])
        rest = seen - along[:, :, None, None, None, None] * scaled[:, None]
        error = seen.square().mean((0, 1)) / latent_power
        parallel = (scaled.square().mean(0) / latent_power).minimum(error)
        bias = (pairs_mean(rest).mean(0) / latent_power).clamp(min=0).minimum(error - parallel)
        mean = (pairs_mean(seen).mean(0) / latent_power).clamp(min=0).minimum(error)
        here = torch.stack([s.sketch.stacked() for s in local]).square().mean(0)
        power = torch.stack([s.power for s in local]).mean(0)[:, None, None]
        tiny = torch.finfo(torch.float32).tiny
        amplification = (error[:, 1:] * latent_power / here.clamp(min=tiny)).sqrt().where(here > 0, 0)
        return cls(error, parallel, bias, mean, here / power.clamp(min=tiny), amplification)

    @property
    def noise(self) -> torch.Tensor:
        return (self.error - self.parallel - self.bias).clamp(min=0)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        with written_aside(path) as aside:
            kept = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
            save_file(kept, aside, metadata={"bitpolicy": json.dumps(sealed({"kind": "split"}, kept))})

    @classmethod
    def load(cls, path: Path) -> ErrorSplit:
        """Read the file.

        Raises:
            BitPolicyError: the file is missing or is not an error split.
        """
        try:
            with open_tensors(path) as file:
                tensors = {field.name: file.get_tensor(field.name) for field in fields(cls)}
                unsealed(json.loads((file.metadata() or {}).get("bitpolicy", "{}")), tensors)
                return cls(**tensors)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise BitPolicyError(f"cannot read {path}: {error}; run `bitpolicy probe --split` again") from error


def _with_whole(sketch: Sketch) -> torch.Tensor:
    """The sum over steps, then the steps, shape (2, 1 + T, L, F)."""
    steps = sketch.stacked()
    return torch.cat([steps.sum(1, keepdim=True), steps], dim=1)
