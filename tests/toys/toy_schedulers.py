"""Schedulers for the toys, set as the published models set them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers

_STABLE_DIFFUSION = {  # the noise schedule that every Stable Diffusion 1.5 scheduler shares
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
Config = Mapping[str, Any] | None
NewScheduler = Callable[..., Any]


def _scheduler(kind: str, defaults: Mapping[str, Any], **own: Any) -> NewScheduler:
    """A scheduler from a config, as `from_config` does, or from `defaults` without one; `own` overrides both."""

    def new(config: Config = None) -> Any:
        return getattr(diffusers, kind).from_config(dict(defaults if config is None else config), **own)

    return new


def _denoising(kind: str, **own: Any) -> NewScheduler:
    return _scheduler(kind, _STABLE_DIFFUSION, **own)


SCHEDULERS: dict[str, NewScheduler] = {
    "PNDM": _denoising("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
    "DDIM": _denoising("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
    "DDPM": _denoising("DDPMScheduler", clip_sample=False),
    "Heun": _denoising("HeunDiscreteScheduler"),
    "Euler": _denoising("EulerDiscreteScheduler"),
    "Euler ancestral": _denoising("EulerAncestralDiscreteScheduler"),
    "DPM++ 2M": _denoising("DPMSolverMultistepScheduler"),
    "UniPC": _denoising("UniPCMultistepScheduler"),
    "LCM": _denoising("LCMScheduler"),
}
"""Name to `new(config=None)`, for pipelines that predict noise: the Stable Diffusion toy and its like."""

FLOW_SCHEDULERS: dict[str, NewScheduler] = {
    "flow Euler": _scheduler("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow Heun": _scheduler("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
}
"""The same for pipelines that predict a velocity, as Stable Diffusion 3. Flux sets its own sigmas, so Euler only."""
