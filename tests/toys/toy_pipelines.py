"""Every toy by name, and the schedulers to put into them.

`TOYS["FluxPipeline"]` draws with `toy.new()("a red heart", **toy.call, **toy.extra, generator=generator)`. `EVERY` adds
those of `families/`. Tests take their parameters from `every(names)`: a dozen that differ most run by default, the
others with `pytest -m every_pipeline`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from toy_recipe import Toy
from toy_schedulers import FLOW_SCHEDULERS, SCHEDULERS
from toy_transformer_pipelines import TRANSFORMER_TOYS
from toy_unet_pipelines import UNET_TOYS
from toy_video_pipelines import VIDEO_TOYS

__all__ = ["EVERY", "FLOW_SCHEDULERS", "SCHEDULERS", "TOYS", "Toy", "every"]

_FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("*.py"))
TOYS: dict[str, Toy] = {toy.name: toy for toy in [*UNET_TOYS, *TRANSFORMER_TOYS, *VIDEO_TOYS]}
EVERY: dict[str, Toy] = {
    **TOYS,
    **{toy.name: toy for family in _FAMILIES for toy in importlib.import_module(f"families.{family}").TOYS},
}
DIFFER_MOST = (
    "DDIMPipeline",
    "ConsistencyModelPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline",
    "DiTPipeline",
    "PixArtSigmaPipeline",
    "HunyuanDiTPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "TextToVideoSDPipeline",
    "StableVideoDiffusionPipeline",
    "WanPipeline-2.2",
)


def every(names: Iterable[str], by_default: Iterable[str] = DIFFER_MOST) -> list[Any]:
    """Parameters of a test: all names, of which those that are not `by_default` run on demand."""
    here = set(by_default)
    return [pytest.param(name, marks=() if name in here else pytest.mark.every_pipeline) for name in names]
